"""Tasks and the columns that records become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgen.errors import OptionError
from flexgen.tables.answers import NOT_ANSWERED, Answers
from flexgen.tables.task import Task

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}}}


def said(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"id": 1, "index": 1, "text": text, "finish_reason": finish_reason}


def test_text() -> None:
    answers = Answers(Task(prompt="{t}"))
    assert answers.values(said(" yes \n")) == {"answer": "yes", "error": None}
    assert answers.values(said("ye", "length")) == {"answer": "ye", "error": None}
    assert answers.values({"error": {"message": "too long"}}) == {"answer": None, "error": "too long"}
    assert answers.values({"error": {"message": "no prompt"}}, "no column 'x'") == {"answer": None, "error": "no column 'x'"}
    assert answers.values(None) == {"answer": None, "error": NOT_ANSWERED}
    assert (answers.num_errors, answers.num_unanswered, answers.num_cut) == (2, 1, 1)


def test_choices() -> None:
    record = {"text": " no", "labels": [{"text": " yes", "probability": 0.25}, {"text": " no", "probability": 0.75}]}
    plain = Answers(Task(prompt="{t}", choices=(" yes", "no"), answer_column="label"))
    assert plain.values(record) == {"label": "no", "error": None}
    task = Task(prompt="{t}", choices=(" yes", "no"), answer_column="label", error_column="why", probabilities=True)
    assert Answers(task).values(record) == {"label": "no", "label_yes": 0.25, "label_no": 0.75, "why": None}
    assert [column.name for column in task.columns] == ["label", "label_yes", "label_no", "why"]


def test_a_schema() -> None:
    answers = Answers(Task(prompt="{t}", schema=SCHEMA, raw=True))
    text = json.dumps({"name": "Ada", "age": 36.0, "tags": ["x"]})
    assert answers.values(said(text)) == {"answer": text, "name": "Ada", "age": 36, "tags": ["x"], "error": None}
    found = answers.values(said('{"name": 7, "age": 1}'))
    assert (found["name"], found["age"], found["error"]) == (None, 1, "name: 7 is not of type text")
    found = answers.values(said('{"name": "A', "length"))
    assert (found["answer"], found["name"]) == ('{"name": "A', None)
    assert found["error"].endswith("and it was cut: more tokens may help")
    assert "not a JSON object but [1]" in answers.values(said("[1]"))["error"]


def test_an_answer_that_is_an_error_stands_beside_it() -> None:
    """As the record of a job has it; the reason is the record's own, and what fits is kept."""
    task = Task(prompt="{t}", schema=SCHEMA, raw=True)
    record = {**said('{"name": 7, "age": 1}'), "error": {"message": "name: no"}}
    assert Answers(task).fault(said('{"name": 7, "age": 1}')) == "name: 7 is not of type text"
    assert Answers(task).fault(said('{"name": "A", "age": 1}')) is None
    found = Answers(task).values(record)
    assert (found["answer"], found["name"], found["age"], found["error"]) == ('{"name": 7, "age": 1}', None, 1, "name: no")


def test_an_answer_that_was_cut_before_it_matched() -> None:
    task = Task(prompt="{t}", regex="a+b")
    answers = Answers(task, lambda text: text.endswith("b"))
    assert answers.values(said("aab", "length")) == {"answer": "aab", "error": None}
    assert answers.values(said("aab")) == {"answer": "aab", "error": None}
    fault = answers.fault(said("aa", "length"))
    assert fault == "the answer was cut before it matched the pattern: more tokens may help"
    assert answers.values(said("aa", "length")) == {"answer": None, "error": fault}
    assert Answers(task).values({**said("aa", "length"), "error": {"message": fault}}) == {"answer": None, "error": fault}


@pytest.mark.parametrize("text", ['{"name": "a\\ud800"}', '{"tags": [{"x": "\\udfff"}]}', '{"tags": {"\\ud800": 1}}'])
def test_an_answer_that_is_not_unicode(text: str) -> None:
    found = Answers(Task(prompt="{t}", schema=SCHEMA, raw=True)).values(said(text))
    assert (found["answer"], found["name"], found["tags"]) == (text, None, None)
    assert "the answer has half of a surrogate pair (\\ud" in found["error"]
    whole = Answers(Task(prompt="{t}", schema=SCHEMA)).values(said('{"name": "\\ud83d\\ude00"}'))
    assert (whole["name"], whole["error"]) == ("\U0001f600", None)


def test_a_schema_of_something_else() -> None:
    answers = Answers(Task(prompt="{t}", schema={"type": "array"}))
    assert answers.values(said("[1, 2]")) == {"answer": [1, 2], "error": None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"choices": ("a",), "regex": "a"}, "choices and regex"),
        ({"choices": ("a", " a")}, "twice"),
        ({"choices": ("a", " ")}, "empty"),
        ({"probabilities": True}, "there are none"),
        ({"raw": True}, "there is none"),
        ({"prompt": "the same for all"}, "names no column"),
        ({"prompt": "{{t}}"}, "for Jinja"),
        ({"answer_column": "error"}, "'error'"),
        ({"schema": {"properties": {"error": {}}}}, "'error'"),
        ({"prompt": "{t"}, "stands alone"),
        ({"prompt": "{t}\udcff"}, "prompt: it has half of a surrogate pair (\\udcff)"),
        ({"choices": ("a", "\udcff")}, "choices: it has half"),
        ({"answer_column": "\udcff"}, "answer_column: it has half"),
        ({"schema": {"properties": {"\ud800": {}}}}, "schema: it has half"),
    ],
)
def test_tasks_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        Task(**{"prompt": "{t}", **given})
    assert said in str(caught.value)


def test_an_instruction_may_name_the_column() -> None:
    assert Task(prompt="Go on.", system="{t}").columns[0].name == "answer"


def test_a_task_through_json() -> None:
    for task in (Task(prompt="{t}", choices=("a", "b"), probabilities=True), Task(prompt="{t}", schema=SCHEMA, raw=True, system="x")):
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    with pytest.raises(OptionError, match="unknown keys: more"):
        Task.from_json({**Task(prompt="{t}").to_json(), "more": 1})


def test_how_answers_came_about() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    task = Task(prompt="{t}", finish_reason=True, token_counts=True, answer_column="a")
    names = ["a", "a_finish_reason", "a_prompt_tokens", "a_completion_tokens", "error"]
    assert [column.name for column in task.columns] == names
    found = Answers(task).values({**said("yes", "length"), "usage": usage})
    assert list(found.values()) == ["yes", "length", 7, 2, None]
    failed = Answers(task).values({"error": {"message": "too long"}})
    assert [failed[name] for name in names] == [None, None, None, None, "too long"]
    cut = Answers(Task(prompt="{t}", schema={"type": "integer"}, finish_reason=True)).values(said("[1", "length"))
    assert cut["answer_finish_reason"] == "length"
    assert "more tokens may help" in cut["error"]


def test_a_task_of_an_earlier_job() -> None:
    kept = Task(prompt="{t}").to_json()
    for later in ("messages", "finish_reason", "token_counts"):
        del kept[later]
    assert Task.from_json(kept) == Task(prompt="{t}")
    with pytest.raises(OptionError, match="missing keys: raw"):
        Task.from_json({name: value for name, value in kept.items() if name != "raw"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "{t}", "messages": "chat"}, "prompt and messages both"),
        ({"messages": ""}, "messages must be the name of a column"),
        ({"messages": "chat", "system": "Be kind."}, "system: conversations of a column"),
        ({}, "prompt: '' names no column"),
        ({"prompt": "{t}", "choices": ("a", "b"), "finish_reason": True}, "finish_reason is that of generated answers"),
        ({"prompt": "{t}", "finish_reason": True, "error_column": "answer_finish_reason"}, "two columns of the result"),
    ],
)
def test_what_is_asked_must_be_plain(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Task(**fields)
