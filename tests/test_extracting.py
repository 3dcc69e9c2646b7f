"""docs/structured-output.md as its reader follows it: the table, both scripts, and the run between them by the bundled model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import jsonschema
import pytest
from chat.jinja import CHATML
from machines import machine_of

from flexgen import LLM
from flexgen.jobs.durable import answer_lines
from flexgen.session import prepare

PAGE = (Path(__file__).parent.parent / "docs" / "structured-output.md").read_text()


def test_the_page(novels_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (table,) = re.findall(r"```csv\n(.*?)```", PAGE, flags=re.DOTALL)
    first, second, _ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    Path("mails.csv").write_text(table)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(first, "docs/structured-output.md", "exec"), names)
    requests = [json.loads(line) for line in Path("requests.jsonl").read_text().splitlines()]
    for request in requests:  # this model knows nothing of JSON, and would waste its context on white space
        request["response_format"]["json_schema"]["schema"]["x-guidance"] = {"whitespace_flexible": False}
    cut = {**requests[0], "id": "cut", "max_tokens": 2}
    bad = {**requests[0], "id": "bad", "response_format": {"type": "json_schema", "json_schema": {"name": "m", "schema": {"not": {}}}}}
    machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    monkeypatch.setattr(prepare, "cached_machine", lambda *_, **__: machine)
    with LLM(novels_opt, dtype="float32", device="cpu", chat_template=CHATML) as llm:
        answers = list(answer_lines(llm, [*requests, cut, bad], tmp_path / "job"))
    Path("answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    for answer in answers[:2]:
        assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", None)
        jsonschema.validate(json.loads(answer["text"]), names["SCHEMA"])  # pyright: ignore[reportArgumentType]
    exec(compile(second, "docs/structured-output.md", "exec"), {"__name__": "__main__"})
    with Path("fields.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["m1", "m2", "cut", "bad"]
    assert [row["topic"] in ("complaint", "question", "other") for row in rows] == [True, True, False, False]
    assert rows[2]["problem"].startswith("cut off")
    assert "not" in rows[3]["problem"]


def test_the_request_with_tools_is_valid() -> None:
    from flexgen.api.openai import OpenAIForm
    from flexgen.jobs.forms import Forms
    from flexgen.jobs.lines import Line
    from flexgen.request import SamplingParams

    (line,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    forms = Forms(model="m", created=0, defaults=SamplingParams())
    request = forms.parse(Line(number=1, content=json.dumps(json.loads(line)).encode(), digest=1))
    assert request.error is None
    assert isinstance(request.form, OpenAIForm)
    assert request.tools is not None
    assert request.tools.required
