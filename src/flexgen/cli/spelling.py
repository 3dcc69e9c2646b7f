"""Messages of the library as the command line says them: it names options as Python's callers write them, here they are flags.

In a message an option is `host_mem`, `disk=` where its name is a word that may mean something else, or `host_mem='4GiB'` with a value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from flexgen.base.scalars import in_json
from flexgen.jobs.spelling import Spelling
from flexgen.options import EngineOptions


def flag_of(name: str) -> str:
    """Return the flag of an option or parameter that has no other one."""
    return f"--{name.replace('_', '-')}"


def _given(value: object) -> str:
    """Return a value as it stands after a flag."""
    return value if isinstance(value, str) else in_json(value)


OF_JOBS = Spelling(
    option=lambda name, value: f"{flag_of(name)} {_given(value)}",
    value=_given,
    accept_changes="--accept-changes",
    anew="--fresh starts anew, another output keeps both",
    folder=" (--state DIR)",
)
_NAMES = (*(field.name for field in dataclasses.fields(EngineOptions)), "tokenizer")
ENGINE_FLAGS: Mapping[str, str] = {name: flag_of(name) for name in _NAMES}
_NOT_WITHIN = r"(?<![\w./'\"`\\-])"  # a word, a path, or a text in quotes
_VALUE = r"(=)(?=['\"\w.\[{(<-])"
_NO_VALUE = r"=(?=[\s,;:)]|$)"
_BARE = r"(?![\w/='\"-]|\.\w)"


def in_flags(message: str, flags: Mapping[str, str] = ENGINE_FLAGS) -> str:
    """Return a message with flags in place of names: `dtype='int8'` becomes `--dtype 'int8'`, and `max_model_len` `--max-model-len`.

    Args:
        message: The message.
        flags: The flags by the names of the options.  One that is not the engine's is left alone where the message has its flag already.
    """
    for name, flag in flags.items():
        message = message.replace(f"{name} ({flag})", flag)
        if name in ENGINE_FLAGS or flag not in message:
            message = re.sub(_pattern(name), lambda found, flag=flag: flag + " " * bool(found[1]), message)
    return message


def _pattern(name: str) -> str:
    """Return the pattern of an option in a message; a single word counts only before an equals sign, and a value then is in quotes."""
    if "_" in name:
        return f"{_NOT_WITHIN}{name}(?:{_VALUE}|{_NO_VALUE}|{_BARE})"
    return f"{_NOT_WITHIN}{name}(?:(=)(?=['\"])|{_NO_VALUE})"
