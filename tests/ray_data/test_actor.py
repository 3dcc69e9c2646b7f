"""FlexGenActor without a cluster: batches in, the same kind of batches out, over a fake engine."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import FakeEngine, byte_id, fake_text, open_fakes

from flexgen import LLM, ModelError, OptionError, SamplingParams
from flexgen.ray_data import FlexGenActor, actor
from flexgen.ray_data.assigned import Assigned
from flexgen.request import TokenRequest, TokenResult

GREEDY = {"temperature": 0, "max_tokens": 4}
TABLE = pa.table({"id": [3, 1, 2], "text": ["abc", "x" * 100, None], "tags": [["a"], None, ["b", "c"]]})
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"


@pytest.fixture
def made(model_folder: Path, scorers: list[FakeEngine]) -> Iterator[FlexGenActor]:
    found = FlexGenActor(model_folder, "{text}{tags}", sampling_params=GREEDY, finish_reason=True, token_counts=True)
    yield found
    found.close()


def as_pandas(table: pa.Table) -> Any:
    pytest.importorskip("pandas")
    return table.to_pandas()


def as_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table.column(name).to_numpy() for name in table.column_names}


def test_a_table_is_answered_as_map_answers_it(made: FlexGenActor, model_folder: Path) -> None:
    found = made(TABLE)
    with LLM(model_folder) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        assert found.equals(llm.map(TABLE, "{text}{tags}", sampling_params=params, finish_reason=True, token_counts=True))
    assert found.select(TABLE.column_names).equals(TABLE)
    assert found.column("answer").to_pylist() == [fake_text('abc["a"]', 4), None, fake_text('["b", "c"]', 4)]
    assert [bool(each) for each in found.column("error").to_pylist()] == [False, True, False]
    assert found.column("answer_finish_reason").to_pylist() == ["length", None, "length"]
    assert found.column("answer_prompt_tokens").to_pylist() == [8, None, 10]
    assert found.column("answer_completion_tokens").to_pylist() == [4, None, 4]


@pytest.mark.parametrize("convert", [as_pandas, as_arrays])
def test_other_formats_have_the_same_answers(made: FlexGenActor, convert: Any) -> None:
    found, wanted = made(convert(TABLE)), made(TABLE)
    assert list(found) == wanted.column_names
    for name in ("id", "answer", "answer_finish_reason", "error"):
        assert list(found[name]) == wanted.column(name).to_pylist()
    for name in ("answer_prompt_tokens", "answer_completion_tokens"):
        assert [each if isinstance(each, int) else None for each in found[name].tolist()] == wanted.column(name).to_pylist()


def test_the_engine_stays_open(made: FlexGenActor, scorers: list[FakeEngine]) -> None:
    for _ in range(3):
        made(TABLE)
    assert [engine.closed for engine in scorers] == [False]
    made.close()
    assert [engine.closed for engine in scorers] == [True]


def test_a_block_of_nulls_keeps_the_types_of_its_columns(made: FlexGenActor) -> None:
    assert {made(TABLE.slice(start, 1)).schema for start in range(3)} == {made(TABLE).schema}
    assert made(TABLE.slice(0, 0)).schema == made(TABLE).schema


def test_conversations(model_folder: Path, scorers: list[FakeEngine]) -> None:
    chats = [[{"role": "user", "content": "hi", "name": None}], None]
    table = pa.table({"chat": chats})
    asked = FlexGenActor(model_folder, messages="chat", chat_template=TEMPLATE, sampling_params=GREEDY)
    for batch in (table, as_pandas(table), as_arrays(table)):
        found = asked(batch)
        assert list(np.asarray(found["answer"])) == [fake_text("uhi;", 4), None]
        assert "holds nothing" in np.asarray(found["error"])[1]
    asked.close()


class JsonEngine(FakeEngine):
    """Answers with one JSON text or another, whole or cut."""

    def _answer(self, request: TokenRequest) -> TokenResult:
        text, reason = ('{"age":3}', "stop") if request.prompt_token_ids[0] == byte_id("a") else ('{"age"', "length")
        ids = tuple(ord(character) - 33 for character in text)
        return TokenResult(index=request.index, token_ids=ids, finish_reason=reason)


def test_fields_of_a_schema(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_fakes(monkeypatch, JsonEngine)
    asked = FlexGenActor(model_folder, "{text}", schema=SCHEMA, raw=True, sampling_params=GREEDY)
    found = asked(pa.table({"text": ["a", "b"]}))
    asked.close()
    assert found.schema.field("age").type == pa.int64()
    assert found.select(["answer", "age"]).to_pylist() == [{"answer": '{"age":3}', "age": 3}, {"answer": '{"age"', "age": None}]
    assert "not JSON" in found.column("error").to_pylist()[1]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"answer_colum": "a"}, "FlexGenActor has no option 'answer_colum'; did you mean answer_column?"),
        ({"hostmem": "1GiB"}, "did you mean host_mem?"),
        ({"prompt": "{text}", "messages": "chat"}, "prompt and messages both"),
        ({"prompt": None}, "give prompt"),
        ({"sampling_params": {"temperatur": 0}}, "sampling_params: SamplingParams has no 'temperatur'; did you mean temperature?"),
        ({"sampling_params": 0.5}, "sampling_params must be SamplingParams or a dict of its fields, not 0.5"),
        ({"sampling_params": {"n": 2}}, "a row has one answer"),
        ({"regex": "("}, "regex: the regular expression"),
        ({"chat": True}, "the model has no chat template"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_errors_come_before_any_batch(model_folder: Path, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        FlexGenActor(model_folder, **{"prompt": "{text}", **keywords})
    assert said in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # Ray hands it to the driver


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelError):
        FlexGenActor("no/such/folder/anywhere", "{text}")


def test_what_concerns_all_rows_fails_the_batch(made: FlexGenActor) -> None:
    with pytest.raises(OptionError, match="has no column 'tags'"):
        made(TABLE.drop_columns(["tags"]))
    with pytest.raises(OptionError, match="has a column 'answer' already"):
        made(made(TABLE))


def test_an_actor_keeps_within_its_share(model_folder: Path, scorers: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    node = {"node_cpus": 4, "node_gpus": 0, "node_memory_bytes": 8 << 30}
    share = Assigned(cpus=1, gpus=0, memory_bytes=0, **node)
    monkeypatch.setattr(actor, "assigned", lambda: share)
    threads, before = torch.get_num_threads(), os.sched_getaffinity(0)
    asked = FlexGenActor(model_folder, "{text}")
    try:
        assert asked.llm.options.host_mem == share.host_bytes
        assert asked.llm.options.device == "cpu"
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
    finally:
        asked.close()
        torch.set_num_threads(threads)
    assert os.sched_getaffinity(0) == before
    with pytest.raises(OptionError, match="regex"):
        FlexGenActor(model_folder, "{text}", regex="(")
    torch.set_num_threads(threads)
    assert os.sched_getaffinity(0) == before  # what failed to start holds nothing
