"""LLM.map: a table in, the same kind of table out, by the lines and records of a job."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import FakeEngine, fake_text
from table_fakes import fake_score

from flexgen import LLM, OptionError, SamplingParams
from flexgen.tables.task import DEFAULT_MAX_TOKENS

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def llm(model_folder: Path, scorers: list[FakeEngine]) -> LLM:
    return LLM(model_folder)


def test_rows_are_answered_in_order(llm: LLM, scorers: list[FakeEngine]) -> None:
    table = pa.table({"id": [3, 1, 2], "text": ["abc", "d", "ef"]})
    found = llm.map(table, "{text}!", sampling_params=GREEDY)
    assert found.select(["id", "text"]).equals(table)
    assert found.column("answer").to_pylist() == [fake_text(f"{text}!", 4) for text in ("abc", "d", "ef")]
    assert found.column("error").to_pylist() == [None] * 3
    assert len(scorers) == 1


def test_without_parameters_an_answer_is_greedy_and_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []

    def generate(prompts: Any, params: list[SamplingParams], **more: Any) -> Any:
        seen.extend(params)
        raise OptionError("enough")

    monkeypatch.setattr(llm, "generate", generate)
    with pytest.raises(OptionError, match="enough"):
        llm.map(pa.table({"text": ["abc"]}), "{text}")
    assert [(each.temperature, each.max_tokens, each.stop) for each in seen] == [(0.0, DEFAULT_MAX_TOKENS, ("\n",))]


def test_a_row_that_cannot_be_answered_stops_no_other(llm: LLM) -> None:
    found = llm.map(pa.table({"text": ["abc", "x" * 100, "d"]}), "{text}", sampling_params=GREEDY)
    assert found.column("answer").to_pylist() == [fake_text("abc", 4), None, fake_text("d", 4)]
    assert [bool(each) for each in found.column("error").to_pylist()] == [False, True, False]


def test_an_answer_that_was_cut_before_it_matched(llm: LLM) -> None:
    found = llm.map(pa.table({"text": ["abc"]}), "{text}", sampling_params=GREEDY, regex="[a-z]{6}")
    assert found.select(["answer", "error"]).to_pylist() == [
        {"answer": None, "error": "the answer was cut before it matched the pattern: more tokens may help"}
    ]


def test_a_prompt_that_is_not_unicode(llm: LLM) -> None:
    pandas = pytest.importorskip("pandas")
    found = llm.map(pandas.DataFrame({"text": pandas.Series(["ab", "\ud800"], dtype=object)}), "{text}", sampling_params=GREEDY)
    assert found["answer"].tolist() == [fake_text("ab", 4), None]
    assert found["error"].tolist() == [None, "the prompt has half of a surrogate pair (\\ud800), which is no character"]


def test_choices_with_probabilities(llm: LLM) -> None:
    found = llm.map(pa.table({"t": ["a", "b", "cd"]}), "{t}:", choices=["yes", "no"], probabilities=True, answer_column="label")
    assert found.column_names == ["t", "label", "label_yes", "label_no", "error"]
    for row in found.to_pylist():
        assert row["label_yes"] + row["label_no"] == pytest.approx(1)
        assert row["label"] == ("yes" if row["label_yes"] >= row["label_no"] else "no")


def test_scores_are_those_of_the_choices(llm: LLM) -> None:
    (row,) = llm.map(pa.table({"t": ["a"]}), "{t}:", choices=["b", "c"], probabilities=True).to_pylist()
    scores = [fake_score(llm.encode("a:")[0], choice) for choice in llm.encode([" b", " c"])]
    assert scores[0] != scores[1]
    assert row["answer_b"] == pytest.approx(1 / (1 + math.exp(scores[1] - scores[0])))


def test_examples_come_from_dicts_or_tables(llm: LLM) -> None:
    examples = [{"t": "a", "answer": "b"}]
    table = pa.table({"t": ["c"]})
    found = [llm.map(table, "{t}:", examples=each, sampling_params=GREEDY) for each in (examples, pa.Table.from_pylist(examples))]
    ids = llm.encode("a: b\n\nc:")[0]
    wanted = llm.generate([ids], GREEDY)[0].outputs[0].text
    assert [each.column("answer").to_pylist() for each in found] == [[wanted]] * 2


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"regex": "("}, "^regex: the regular expression '\\(' cannot be used: "),
        ({"schema": {"type": "string", "minLength": 2, "maxLength": 1}}, "^schema: the JSON schema cannot be used: nothing meets it"),
        (
            {"regex": "[a-c]+", "examples": [{"t": "a", "answer": "abc"}, {"t": "b", "answer": "d"}]},
            "^examples: row 2: the answer 'd' does not match",
        ),
        ({"schema": SCHEMA, "examples": [{"t": "a", "answer": "no"}]}, "^examples: row 1: the answer 'no' does not follow the schema"),
        ({"schema": SCHEMA, "examples": [{"t": "a", "answer": '{"age": 1, "name": "x"}'}]}, "properties in its order"),
        ({"schema": SCHEMA, "examples": [{"t": "a", "name": "x", "age": ""}]}, 'row 1: the answer \'{"name": "x", "age": null}\' does not'),
    ],
    ids=["regex", "schema", "example of a regex", "example of a schema", "order", "property"],
)
def test_what_no_answer_can_be_is_refused_once(llm: LLM, scorers: list[FakeEngine], keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        llm.map(pa.table({"t": ["a", "b"]}), "{t}", **keywords)
    assert scorers == []


def test_examples_that_the_answers_can_be(llm: LLM) -> None:
    shots = [{"t": "a", "answer": '{\n  "name": "Ada",\n  "age": 3}'}, {"t": "b", "answer": '{"name":"","age":0}'}]
    assert llm.map(pa.table({"t": []}), "{t}", schema=SCHEMA, examples=shots).num_rows == 0
    assert llm.map(pa.table({"t": []}), "{t}", regex="[a-c]+", examples=[{"t": "x", "answer": "abc"}]).num_rows == 0


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"prompt": "{note}"}, "the table has no column 'note', which the prompt uses; there are 't', 'error2'"),
        (
            {"prompt": "{t.name}"},
            "no column 't.name', which the prompt uses; there are 't', 'error2'; a part of 't' is written in Jinja: {{ t.name }}",
        ),
        ({"answer_column": "t"}, "has a column 't' already"),
        ({"choices": "yes"}, "must be a list"),
        ({"columns": ["x"]}, "map has no option 'columns'"),
        ({"error_column": "error2"}, "give error_column another name"),
    ],
)
def test_what_is_refused(llm: LLM, keywords: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"prompt": "{t}", **keywords}
    with pytest.raises(OptionError) as caught:
        llm.map(pa.table({"t": ["a"], "error2": ["b"]}), **given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("params", "keywords", "said"),
    [
        ({"n": 2}, {}, "n is 2"),
        ({"max_tokens": 0}, {}, "max_tokens is 0"),
        ({"structured_outputs": {"choice": ["b"]}}, {"regex": "a"}, "not as structured_outputs"),
        ({}, {"choices": ["a", "b"]}, "are scored"),
    ],
)
def test_parameters_that_no_row_can_have(llm: LLM, params: dict[str, Any], keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        llm.map(pa.table({"text": ["a"]}), "{text}", sampling_params=SamplingParams(**params), **keywords)


def test_no_rows(llm: LLM, scorers: list[FakeEngine]) -> None:
    found = llm.map(pa.table({"t": pa.array([], pa.string())}), "{t}")
    assert (found.column_names, found.num_rows, scorers) == (["t", "answer", "error"], 0, [])


def test_dicts_of_arrays_are_answered_as_tables_are(llm: LLM) -> None:
    table = pa.table({"id": [7, 8, 9], "text": ["abc", "x" * 100, None], "tags": [["a"], [], ["b", "c"]]})
    arrays = {name: table.column(name).to_numpy() for name in table.column_names}
    keywords: dict[str, Any] = {"sampling_params": GREEDY, "finish_reason": True, "token_counts": True}
    found, wanted = (llm.map(given, "{text}{tags}", **keywords) for given in (arrays, table))
    assert list(found) == wanted.column_names
    assert all(found[name] is arrays[name] for name in arrays)
    added = wanted.column_names[3:]
    assert {name: found[name].tolist() for name in added} == {name: wanted.column(name).to_pylist() for name in added}
    assert wanted.column("answer").to_pylist() == [fake_text('abc["a"]', 4), None, fake_text('["b", "c"]', 4)]


TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]
TALK = [{"role": "system", "content": "be"}, *HELLO]


def test_conversations_of_a_column(model_folder: Path, scorers: list[FakeEngine]) -> None:
    pandas = pytest.importorskip("pandas")
    bad = [None, "hello", "[1", [], [{"role": "user"}], '[{"role": "user", "content": "\\ud800"}]']
    talks = [HELLO, json.dumps(TALK), np.array(HELLO, dtype=object), *bad]
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        frame = pandas.DataFrame({"chat": pandas.Series(talks, dtype=object)})
        found = llm.map(frame, messages="chat", sampling_params=GREEDY)
        scored = llm.map(frame[:1], messages="chat", choices=["a", "b"])
    answers = [fake_text(prompt, 4) for prompt in ("uhello;", "sbe;uhello;", "uhello;")]
    assert found["answer"].tolist() == answers + [None] * len(bad)
    assert scored["answer"].tolist()[0] in ("a", "b")
    said = found["error"].tolist()
    assert said[:3] == [None] * 3
    for error, why in zip(said[3:], ["nothing", "not JSON", "not JSON", r"'\[\]'", "has no content", "surrogate"], strict=True):
        assert re.search(why, error)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({}, "^give prompt, the template of a prompt, or messages"),
        ({"messages": "t"}, "^chat: the model has no chat template"),
        ({"messages": "t", "chat": False}, "^chat: conversations of a column are messages"),
        ({"messages": "t", "examples": [{"t": "a", "answer": "b"}]}, "^examples: conversations of a column have turns of their own"),
    ],
)
def test_conversations_that_cannot_be_asked(llm: LLM, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        llm.map(pa.table({"t": ["a"]}), **keywords)
