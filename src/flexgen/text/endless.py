"""Finds constraints that no text of any length can meet, because what they ask for always contains itself.

llguidance follows such a constraint until the answer is cut off.  What cannot be judged here counts as finite.  Knows the notations of
constraints, and neither tokens nor llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Alternatives = Sequence[Sequence[Any]]  # of a rule; each item is the name of a rule, or alternatives again

# -- JSON schemas -----------------------------------------------------------------------------------------------------------------------


def is_endless_schema(schema: Mapping[str, Any]) -> bool:
    """Return whether every JSON value that a schema allows would be infinitely deep, because what is required refers back to itself."""
    targets = {reference: target for reference in _references(schema) if (target := _target(schema, reference)) is not None}
    finite: set[str] = set()
    try:
        while found := {each for each in targets.keys() - finite if _is_finite(targets[each], targets.keys() - finite)}:
            finite |= found
        return not _is_finite(schema, targets.keys() - finite)
    except RecursionError:
        return False


def _references(value: Any) -> Iterator[str]:
    """Yield every reference in a schema."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            if isinstance(found.get("$ref"), str):
                yield found["$ref"]
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _target(schema: Any, reference: str) -> Any:
    """Return what a reference within the document stands for; None for any other."""
    if not reference.startswith("#"):
        return None
    found = schema
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            return None
    return found if reference == "#" or reference.startswith("#/") else None


def _is_finite(schema: Any, endless: Collection[str]) -> bool:
    """Return whether a schema allows a finite value, where references in `endless` do not."""
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference in endless:
        return False
    if not all(_is_finite(each, endless) for each in _listed(schema.get("allOf"))):
        return False
    for name in ("anyOf", "oneOf"):
        if (options := _listed(schema.get(name))) and not any(_is_finite(each, endless) for each in options):
            return False
    kind = schema.get("type")
    return all(_is_finite(each, endless) for each in (*_needed_values(schema, kind), *_needed_items(schema, kind)))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _needed_values(schema: Mapping[str, Any], kind: object) -> list[Any]:
    """Return the schemas of the properties that an object must have."""
    properties = schema.get("properties")
    if kind not in ("object", ["object"]) or not isinstance(properties, Mapping):
        return []
    return [properties[name] for name in _listed(schema.get("required")) if isinstance(name, str) and name in properties]


def _needed_items(schema: Mapping[str, Any], kind: object) -> list[Any]:
    """Return the schemas of the items that a list must have."""
    least = schema.get("minItems")
    if kind not in ("array", ["array"]) or not isinstance(least, int) or least < 1:
        return []
    first = _listed(schema.get("prefixItems"))
    return [*first[:least], *([schema.get("items")] if least > len(first) else [])]


# -- grammars ---------------------------------------------------------------------------------------------------------------------------

_START = "start"
_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+|(?:\#|//)[^\n]*)
    |(?P<line>(?:\r?\n)+)
    |(?P<text>"(?:\\.|[^"\\])*"i?|/(?:\\.|[^/\\\n])+/[imslux]*|<[^<>\s]+>|@[\w-]+)
    |(?P<json>%(?:json|regex|llguidance)\b)
    |(?P<statement>%\w+)
    |(?P<rule>[!?]{0,2}_?[a-z][_a-z0-9-]*)
    |(?P<terminal>_?[A-Z][_A-Z0-9-]*)
    |(?P<number>[+-]?[0-9]+(?:\.[0-9]+)?)
    |(?P<sign>\.\.|->|::|[:|()\[\]{}*+?~,.=&_])""",
    re.VERBOSE,
)
_NOT_JUDGED = ("&", "::")  # signs of what is more than a context-free grammar


class _NotJudgedError(Exception):
    """The grammar has something that is not understood here."""


def is_endless_grammar(grammar: str) -> bool:
    """Return whether every text of a grammar in Lark's notation would be infinitely long, because its rules lead back to themselves."""
    try:
        rules = _rules(grammar)
        finite: set[str] = set()
        while found := {name for name in rules.keys() - finite if _is_complete(rules[name], rules.keys() - finite)}:
            finite |= found
    except (_NotJudgedError, ValueError, IndexError, StopIteration, RecursionError):
        return False
    return _START in rules.keys() - finite


def _is_complete(alternatives: Alternatives, endless: Collection[str]) -> bool:
    """Return whether one of the alternatives needs no endless rule."""
    return any(
        all(item not in endless if isinstance(item, str) else _is_complete(item, endless) for item in sequence)
        for sequence in alternatives
    )  # fmt: skip


def _rules(grammar: str) -> dict[str, Alternatives]:
    """Return the alternatives of every rule.

    Raises:
        _NotJudgedError: See there.
    """
    found: dict[str, Alternatives] = {}
    tokens = list(_tokens(grammar))
    starts = [place for place, (kind, _) in enumerate(tokens) if kind == "rule" and (place == 0 or tokens[place - 1][0] == "line")]
    for place in starts:
        reader = _Reader(tokens, place + 1)
        reader.skip_to_body()
        found[tokens[place][1].lstrip("!?")] = reader.alternatives()
    return found


def _tokens(grammar: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of every token; a line end before a bar is none."""
    place, waiting = 0, False
    while place < len(grammar):
        match = _TOKEN.match(grammar, place)
        if match is None or match[0] in _NOT_JUDGED or match[0] in ("%override", "%if", "%lark"):
            raise _NotJudgedError
        kind, text, place = match.lastgroup or "", match[0], match.end()
        if kind == "json":
            value, length = json.JSONDecoder().raw_decode(grammar[place:].lstrip())
            place += len(grammar[place:]) - len(grammar[place:].lstrip()) + length
            kind = "endless" if text == "%json" and isinstance(value, dict) and is_endless_schema(value) else "text"
        if kind == "line":
            waiting = True
        elif kind != "blank":
            if waiting and text != "|":
                yield "line", "\n"
            waiting = False
            yield kind, text
    yield "line", "\n"


class _Reader:
    """Reads the body of one rule."""

    def __init__(self, tokens: Sequence[tuple[str, str]], place: int) -> None:
        self._tokens, self._place = tokens, place

    def skip_to_body(self) -> None:
        """Go behind the colon after a rule's name, its priority and its attributes."""
        while self._text not in (":", "\n", "{"):
            self._place += 1
        self._take(":")

    def alternatives(self) -> Alternatives:
        """Return the alternatives that begin here."""
        found = [self._sequence()]
        while self._text == "|":
            self._place += 1
            found.append(self._sequence())
        return found

    @property
    def _text(self) -> str:
        return self._tokens[self._place][1]

    def _take(self, text: str) -> None:
        if self._text != text:
            raise _NotJudgedError
        self._place += 1

    def _sequence(self) -> list[Any]:
        """Return what an alternative needs; what may be left out is not in it."""
        found: list[Any] = []
        while self._text not in ("|", "\n", ")", "]", "->"):
            item = self._item()
            if not self._may_be_left_out() and item is not None:
                found.append(item)
        if self._text == "->":
            self._place += 2
        return found

    def _item(self) -> Any:
        """Return a rule's name or alternatives; None for what is finite by itself."""
        kind, text = self._tokens[self._place]
        self._place += 1
        if text in ("(", "["):
            inner = self.alternatives()
            self._take(")" if text == "(" else "]")
            return inner if text == "(" else None
        if kind == "endless":
            return []  # without any alternative
        if kind not in ("rule", "text", "terminal") or (self._text == "{" and not self._is_count()):
            raise _NotJudgedError
        if self._text == "..":
            self._place += 2
        return text if kind == "rule" else None

    def _is_count(self) -> bool:
        """Return whether the brace here begins a number of times, and not the arguments of a rule."""
        return self._tokens[self._place + 1][0] == "number" or self._tokens[self._place + 1][1] == ","

    def _may_be_left_out(self) -> bool:
        """Return whether what was read last may be there no time, by the sign behind it."""
        if self._text in ("?", "*", "+"):
            self._place += 1
            return self._tokens[self._place - 1][1] != "+"
        least = "1"
        if self._text == "~":
            least = self._tokens[self._place + 1][1]
            self._place += 4 if self._tokens[self._place + 2][1] == ".." else 2
        elif self._text == "{":
            least = self._tokens[self._place + 1][1].replace(",", "0")
            self._place = next(place for place in range(self._place, len(self._tokens)) if self._tokens[place][1] == "}") + 1
        return least.isdigit() and int(least) == 0
