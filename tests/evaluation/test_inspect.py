"""The provider inside inspect-ai itself, where it is installed (in an environment of its own, docs/helm.md).

There, `-W default` is needed, because inspect-ai leaves streams open, and warnings are errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="needs inspect-ai==0.3.285")
pytestmark = pytest.mark.filterwarnings("default")

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402

from flexgen import FlexGenError  # noqa: E402
from flexgen.evaluation.inspect import FlexGenAPI  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    answer = FlexGenAPI._answer

    def counting(self: FlexGenAPI, lines: Sequence[Any]) -> Any:
        sizes.append(len(lines))
        return answer(self, lines)

    monkeypatch.setattr(FlexGenAPI, "_answer", counting)
    return sizes


def test_a_task_is_answered_in_batches(novels_opt: Path, tmp_path: Path, batches: list[int]) -> None:
    config = GenerateConfig(max_tokens=4, temperature=0.7, num_choices=2, logprobs=True, top_logprobs=2)
    model = get_model(f"flexgen/{novels_opt}", chat_template=TEMPLATE, dtype="float32", host_mem="2GiB", config=config, gather_seconds=2)
    task = Task(dataset=[Sample(input=f"It was {number}", target="the") for number in range(12)], scorer=includes())
    (log,) = eval(task, model=model, epochs=2, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert sum(batches) == 24
    assert len(batches) < 24
    assert log.samples is not None
    outputs = [sample.output for sample in log.samples]
    assert all(len(output.choices) == 2 and output.usage is not None and output.usage.input_tokens > 0 for output in outputs)
    first = outputs[0].choices[0]
    assert first.logprobs is not None
    assert len(first.logprobs.content) == 4
    assert all(len(each.top_logprobs or []) == 2 for each in first.logprobs.content)
    assert first.stop_reason == "max_tokens"


def test_a_model_without_a_template_needs_one(novels_opt: Path) -> None:
    with pytest.raises(FlexGenError, match="chat_template"):
        get_model(f"flexgen/{novels_opt}")
