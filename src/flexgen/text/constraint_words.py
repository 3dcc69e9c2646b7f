"""The errors of constraints on answers, in words for who wrote the constraint: which it is, and why it cannot be used.

Knows how llguidance writes its messages, and nothing of tokens.
"""

from __future__ import annotations

import re

from flexgen.base.structured import StructuredOutputsParams
from flexgen.errors import RequestError

PARAM = "structured_outputs"
_MOST_REASON_CHARS, _MOST_SHOWN_CHARS = 500, 80
# llguidance's words, and ours.
_WORDS = (
    (re.compile(r"^.*\bUnsatisfiable schema: "), "nothing meets it: "),
    (re.compile(r"\banyOf is empty"), "an enum or anyOf is empty"),
    (re.compile(r"^.*\(in regex\): "), ""),
    (re.compile(r"^(?:at )?(\d+)\((\d+)\): "), r"line \1, column \2: "),
    (re.compile(r"^Unimplemented keys: "), "these keywords are not supported: "),
    (re.compile(r"^Failed to convert the grammar from GBNF to Lark: "), "it is neither Lark's notation nor GBNF: "),
)
_LISTING = re.compile(r"\s*(\d+ \||\^)")  # lines of its messages that show where in the constraint something is


class ConstraintError(RequestError):
    """A constraint that no answer can be kept to.

    Args:
        message: What is wrong, for the person who wrote the request.
        reason: The same without the name of the constraint.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, code="unsupported_constraint", param=PARAM)
        self.reason = reason


def refused(params: StructuredOutputsParams, reason: str) -> ConstraintError:
    """Return the error of a constraint that no answer can be kept to."""
    named = {
        "the JSON schema": params.json is not None,
        f"the regular expression {short(params.regex or '')}": params.regex is not None,
        "the choice": params.choice is not None,
        "the grammar": params.grammar is not None,
        "a JSON object": True,
    }
    what = next(name for name, given in named.items() if given)
    return ConstraintError(f"{PARAM}: {what} cannot be used: {reason}", reason)


def short(text: str) -> str:
    """Return a text in quotes, cut where it is long."""
    written = f"'{text}'" if text.isprintable() else repr(text)
    return written if len(written) <= _MOST_SHOWN_CHARS else f"{written[: _MOST_SHOWN_CHARS - 3]}..."


def in_our_words(text: str) -> str:
    """Return llguidance's words in one line, without the parts of the constraint that it lists."""
    said = text.replace("<non-verbose/>", "").rpartition("\nerror: ")[2]
    said = " ".join(" ".join(line for line in said.splitlines() if not _LISTING.match(line)).split())
    for theirs, ours in _WORDS:
        said = theirs.sub(ours, said)
    return said[:_MOST_REASON_CHARS]
