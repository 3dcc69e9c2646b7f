"""Templates of prompts: text with the names of columns in braces, or Jinja."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from flexgen.errors import OptionError, RequestError
from flexgen.tables.values import text_of

_LOOKS_LIKE_JINJA = re.compile(r"\{%-?\s|\{\{-?\s")
_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_EITHER_BRACE = {"{{": "{", "}}": "}"}
_ROW = "row"  # the name by which a Jinja template has the whole row


class Template(Protocol):
    """A template of prompts."""

    @property
    def columns(self) -> frozenset[str]:
        """The names of the columns that the template uses."""
        ...

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row.

        Raises:
            RequestError: The row lacks a column, or the template fails on it.
        """
        ...


def make_template(text: str, language: str = "auto", *, what: str = "prompt") -> Template:
    """Compile a template.

    Args:
        text: The template.
        language: "braces", "jinja", or "auto": Jinja where the text has an opening `{{` or `{%` with a space after it.
        what: The name of the option that has the template, for messages.

    Raises:
        OptionError: The language is unknown, or the template is not valid.
    """
    if language == "auto":
        found = _LOOKS_LIKE_JINJA.search(text)
        return BraceTemplate(text, what) if found is None else _seen_as_jinja(text, what, found[0])
    if language not in _LANGUAGES:
        raise OptionError(f"template {language!r} is unknown; known: auto, {', '.join(_LANGUAGES)}")
    return _LANGUAGES[language](text, what)


def _seen_as_jinja(text: str, what: str, sign: str) -> Template:
    try:
        return JinjaTemplate(text, what)
    except OptionError as error:
        raise OptionError(f"{error} (the {sign!r} in it makes it Jinja, unless template is braces)") from error


class BraceTemplate:
    """Text with `{name}` for the value of a column, and `{{` and `}}` for braces.  Whatever stands between braces is the name."""

    def __init__(self, text: str, what: str) -> None:
        self._pieces: list[tuple[str, str | None]] = []  # text, then the name of the column behind it
        literal, end = "", 0
        for found in _PIECES.finditer(text):
            literal += text[end : found.start()]
            end = found.end()
            if found[1] is not None:
                self._pieces.append((literal, found[1]))
                literal = ""
            elif found[0] in _EITHER_BRACE:
                literal += _EITHER_BRACE[found[0]]
            else:
                near = text[max(found.start() - 10, 0) : found.start() + 20]
                raise OptionError(f"{what}: the {found[0]} in {near!r} stands alone: {{name}} is a column, {found[0] * 2} is a brace")
        self._pieces.append((literal + text[end:], None))
        self.columns = frozenset(name for _, name in self._pieces if name is not None)

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row."""
        return "".join(literal if name is None else literal + _value(row, name) for literal, name in self._pieces)


def _value(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise RequestError(f"the row has no column {name!r}", code="invalid_row", param=name)
    return text_of(row[name])


class JinjaTemplate:
    """A Jinja template whose variables are the columns; `row` has the whole row, for names that Jinja cannot write."""

    def __init__(self, text: str, what: str) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_finalized)
        try:
            tree = environment.parse(text)
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise OptionError(f"{what}: line {error.lineno} of the Jinja template is not valid: {error.message}") from error
        self.columns = _columns(tree)
        self._failures = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row."""
        try:
            return self._template.render({_ROW: row, **row})
        except self._failures as error:
            raise RequestError(f"the template fails on the row: {error}"[:500], code="invalid_row") from error


def _finalized(value: Any) -> Any:
    """Return what Jinja writes for the value of an expression; an undefined one still fails."""
    import jinja2

    return value if isinstance(value, jinja2.Undefined) else text_of(value)


def _columns(tree: Any) -> frozenset[str]:
    """Return the names of the columns that a parsed Jinja template uses."""
    from jinja2 import meta, nodes

    names = meta.find_undeclared_variables(tree) - {_ROW}
    for node in tree.find_all((nodes.Getitem, nodes.Getattr)):
        if isinstance(node.node, nodes.Name) and node.node.name == _ROW:
            if isinstance(node, nodes.Getattr):
                names.add(node.attr)
            elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                names.add(node.arg.value)
    return frozenset(names)


_LANGUAGES: Mapping[str, type[BraceTemplate] | type[JinjaTemplate]] = {"braces": BraceTemplate, "jinja": JinjaTemplate}
