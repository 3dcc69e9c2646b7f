"""Templates: names in braces or Jinja, what they use, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.errors import OptionError, RequestError
from flexgen.tables.template import BraceTemplate, JinjaTemplate, make_template


@pytest.mark.parametrize(
    ("text", "row", "wanted"),
    [
        ("Text: {text}\nLabel:", {"text": "good"}, "Text: good\nLabel:"),
        ('{{"label": ...}} {a}{b}', {"a": 1, "b": None}, '{"label": ...} 1'),
        ("{first name} of {a.b} and {x:y}", {"first name": "Ada", "a.b": 2, "x:y": 3}, "Ada of 2 and 3"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a} {a}", {"a": "{b}"}, "{b} {b}"),
        ("{a}", {"a": "{{ b }} {% if"}, "{{ b }} {% if"),
    ],
)
def test_braces(text: str, row: dict[str, Any], wanted: str) -> None:
    template = make_template(text, "braces")
    assert template.render(row) == wanted
    assert template.columns == set(row)


@pytest.mark.parametrize(
    ("text", "row", "wanted"),
    [
        ("Text: {{ text }}\n", {"text": "a <b> & c"}, "Text: a <b> & c\n"),
        ("{% if note %}({{ note }}){% endif %}{{ x }}", {"note": None, "x": None}, ""),
        ("{% for each in tags %}{{ each }};{% endfor %}", {"tags": ["a", "b"]}, "a;b;"),
        ("{{ row['first name'] }} {{ row.last }}", {"first name": "Ada", "last": True}, "Ada true"),
        ("{{ '%.2f' % price }} {{ price }}", {"price": 1.5}, "1.50 1.5"),
        ("{{ a|length }}", {"a": "abc"}, "3"),
    ],
)
def test_jinja(text: str, row: dict[str, Any], wanted: str) -> None:
    template = make_template(text)
    assert isinstance(template, JinjaTemplate)
    assert template.render(row) == wanted
    assert template.columns == set(row)


def test_jinja_names_that_are_not_columns() -> None:
    assert make_template("{% set b = a %}{{ b }} {% for i in range(3) %}{{ loop.index }}{% endfor %}").columns == {"a"}


@pytest.mark.parametrize(
    ("text", "is_jinja"),
    [("{{ a }}", True), ("{%- if a %}x{% endif %}", True), ("{{a}}{a}", False), ("{a} 100%", False), ("{{-\na }}", True)],
)
def test_the_language_is_seen(text: str, is_jinja: bool) -> None:
    assert isinstance(make_template(text), JinjaTemplate) == is_jinja
    assert isinstance(make_template("{a}", "braces"), BraceTemplate)


@pytest.mark.parametrize(
    ("text", "language", "said"),
    [
        ("a { b", "auto", "system: the { in 'a { b' stands alone"),
        ("{a} }", "auto", "}} is a brace"),
        ("{% if a %}", "auto", "system: line 1 of the Jinja template is not valid"),
        ('{{ "label": 1 }} {a}', "auto", "(the '{{ ' in it makes it Jinja, unless template is braces)"),
        ("{a}", "mustache", "known: auto, braces, jinja"),
    ],
)
def test_templates_that_are_not_valid(text: str, language: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_template(text, language, what="system")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{note}", "no column 'note'"),
        ("{{ note }}", "'note' is undefined"),
        ("{{ a + 1 }}", "fails on the row"),
        ("{{ row.nothing }}", "nothing"),
        ("{b}", "not UTF-8"),
        ("{{ b }}", "not UTF-8"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_row_that_a_template_fails_on(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_template(text).render({"a": "x", "b": b"\xff"})
    assert said in str(caught.value)


def test_a_missing_cell_may_be_asked_for_in_jinja() -> None:
    template = make_template("{% if note is defined %}{{ note }}{% else %}none{% endif %}")
    assert [template.render({}), template.render({"note": "x"})] == ["none", "x"]
