"""Lines for rows: prompts or messages, examples before them, and where the answer begins."""

from __future__ import annotations

import pytest

from flexgen.errors import OptionError
from flexgen.tables.prompts import Prompts, Shot, read_shots
from flexgen.tables.task import Task

SHOTS = [Shot(prompt="Text: a\nLabel:", answer="yes"), Shot(prompt="Text: b\nLabel:", answer="no")]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def test_a_prompt() -> None:
    assert Prompts(Task(prompt="Text: {t}\nLabel:")).line({"t": "x"}) == {"prompt": "Text: x\nLabel:"}


def test_an_instruction_and_examples_come_first() -> None:
    task = Task(prompt="Text: {t}\nLabel:", system="About {s}.", choices=("yes", "no"))
    line = Prompts(task, SHOTS).line({"t": "x", "s": "cats"})
    assert line == {
        "prompt": "About cats.\n\nText: a\nLabel: yes\n\nText: b\nLabel: no\n\nText: x\nLabel:",
        "choices": [" yes", " no"],
    }
    assert Prompts(task).columns == ["s", "t"]


def test_messages() -> None:
    task = Task(prompt="Text: {t}\nLabel:", system="Be brief.", choices=("yes", "no"))
    line = Prompts(task, SHOTS[:1], chat=True).line({"t": "x"})
    assert line == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Text: a\nLabel:"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Text: x\nLabel:"},
        ],
        "choices": ["yes", "no"],
    }


@pytest.mark.parametrize(
    ("end", "seam"), [(":", " "), ("?", " "), ("is", " "), (": ", ""), ("\n", ""), ('"', ""), ("标签：", ""), ("<a>", "")]
)
def test_a_space_before_the_answer(end: str, seam: str) -> None:
    assert Prompts(Task(prompt="{t}" + end, choices=("A", " B"))).line({"t": "x"})["choices"] == [f"{seam}A", " B"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("what", ["prompt", "instruction"])
def test_a_prompt_that_is_not_unicode(chat: bool, what: str) -> None:
    row = {"t": "x\ud800" if what == "prompt" else "x", "s": "\ud800" if what == "instruction" else "s"}
    fault = Prompts(Task(prompt="{t}", system="{{ s }}", template="auto"), chat=chat).fault(row)
    assert fault == f"the {what} has half of a surrogate pair (\\ud800), which is no character"


def test_constraints() -> None:
    assert Prompts(Task(prompt="{t}", schema=SCHEMA)).line({"t": "x"})["structured_outputs"] == {"json": SCHEMA}
    assert Prompts(Task(prompt="{t}", regex="[a-z]+")).line({"t": "x"})["structured_outputs"] == {"regex": "[a-z]+"}


def test_what_ends_an_answer() -> None:
    task = Task(prompt="{t}")
    assert Prompts(task).default_stop == ("\n",)
    assert Prompts(task, [Shot(prompt="a", answer="two\nlines")]).default_stop == ("\n\n",)
    assert Prompts(task, chat=True).default_stop == ()
    assert Prompts(Task(prompt="{t}", regex="a")).default_stop == ()
    assert Prompts(Task(prompt="{t}", choices=("a",))).default_stop == ()


def test_examples_are_read_from_rows() -> None:
    task = Task(prompt="{t}:", choices=("yes", "no"))
    assert read_shots(task, [{"t": "a", "answer": " yes "}]) == [Shot(prompt="a:", answer="yes")]
    shots = read_shots(Task(prompt="{t}", schema=SCHEMA), [{"t": "a", "name": "Ada", "age": "36"}, {"t": "b", "name": "7", "age": ""}])
    assert [shot.answer for shot in shots] == ['{"name": "Ada", "age": 36}', '{"name": "7", "age": null}']
    assert read_shots(Task(prompt="{t}", schema=SCHEMA), [{"t": "a", "answer": "{}"}])[0].answer == "{}"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"t": "a"}, "row 1: there is no column 'answer'"),
        ({"answer": "yes"}, "no column 't'"),
        ({"t": "a", "answer": "maybe"}, "not one of the choices"),
        ({"t": "a", "answer": "  "}, "row 1: the column 'answer' with the answer is empty"),
        ({"t": "a", "answer": None}, "row 1: the column 'answer' with the answer is empty"),
    ],
)
def test_examples_that_cannot_be(row: dict[str, str | None], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_shots(Task(prompt="{t}:", choices=("yes", "no")), [row])
    assert said in str(caught.value)


def test_a_property_of_an_example_that_is_not_json() -> None:
    with pytest.raises(OptionError, match="holds 'old'"):
        read_shots(Task(prompt="{t}", schema=SCHEMA), [{"t": "a", "name": "Ada", "age": "old"}])
