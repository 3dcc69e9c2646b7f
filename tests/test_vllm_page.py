"""docs/vllm.md as its reader follows it: the arguments that it lists exist, and its script runs on the bundled model."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from flexgen import LLM, SamplingParams
from flexgen.plan.workload import Workload

PAGE = (Path(__file__).parent.parent / "docs" / "vllm.md").read_text()


def test_every_argument_of_stream_is_told() -> None:
    (section,) = re.findall(r"^## Results as they finish\n(.*?)^## ", PAGE, flags=re.MULTILINE | re.DOTALL)
    for call in (LLM.stream, LLM.plan, LLM.open):
        assert not [name for name in inspect.signature(call).parameters if name != "self" and not re.search(rf"`{name}=?`", section)]
    told = re.findall(r"`(\w+)`", section)
    assert set(inspect.signature(Workload).parameters) <= set(told)


def test_results_as_they_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, novels_opt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/novels-opt-7m").symlink_to(novels_opt)
    exec(compile(code, "docs/vllm.md", "exec"), {"__name__": "__main__"})
    seconds, told = capsys.readouterr().out.split("\n", 1)
    assert float(seconds) > 0
    with LLM("models/novels-opt-7m") as llm:
        prompts = ["The old house stood", "It was a dark and stormy night"]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32))
    for index, output in enumerate(outputs):
        (answer,) = output.outputs
        assert f"{index} {answer.finish_reason} {llm.get_tokenizer().decode(answer.token_ids)}\n" in told
