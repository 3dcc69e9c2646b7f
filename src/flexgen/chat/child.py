"""The program of a template process: it takes one template, then conversations, and answers with prompts.

It is a script, not a module of the package.  It imports jinja2, the standard library and content.py only, so that it starts in a
tenth of a second.  The environment that templates see is that of transformers (utils/chat_template_utils.py), so that prompts are
the same to the character.  A frame is a length of four bytes and JSON.  The process ends when its input does.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import importlib.util
import json
import math
import os
import resource
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

for _late in ("pprint", "textwrap", "jinja2.constants", "jinja2.debug"):
    importlib.import_module(_late)  # jinja2 imports them when a template needs them, and later nothing can be opened

LENGTH = struct.Struct("<I")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where a message that is to be continued ends; its space shows whether templates trim it
GREETING = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True, "continue_final_message": False}
MOST_REASON_CHARS = 500


def _sibling(name: str) -> Any:
    """Load a module that lies beside this script."""
    spec = importlib.util.spec_from_file_location(f"flexgen_chat_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


content = _sibling("content")


class TooLongError(Exception):
    """The prompt has more characters than allowed."""


class NoToolsError(Exception):
    """The conversation has tools, and the template does not read them."""


class Parts(list[Any]):
    """Content as a list of parts.  Where a template writes it as if it were text, it is its text."""

    def __str__(self) -> str:
        return "\n".join(part["text"] for part in self)

    def __add__(self, other: Any) -> Any:
        return str(self) + other if isinstance(other, str) else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return other + str(self) if isinstance(other, str) else NotImplemented


class Generation(jinja2.ext.Extension):
    """The tag {% generation %} ... {% endgeneration %}, which marks answers for training; what is between stays as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block, which has a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which lead to the interpreter's internals."""

    def __init__(*args: Any, **values: Any) -> None:  # no name for self, so that a value may have it
        values = dict(*args[1:], **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Do what the type's own method does."""
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def raise_exception(message: object) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(str(message))


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Serve as the filter `tojson`; jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Renderer:
    """One compiled template.

    Raises:
        jinja2.TemplateError: The template is not valid.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], output_chars: int) -> None:
        self.now: float | None = None
        self._source, self._variables, self._output_chars = source, variables, output_chars
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=raise_exception, strftime_now=self.strftime_now, dict=Dict(), namespace=Namespace)
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        self._form = content.content_form(tree)
        self._reads_tools = any(each.name == "tools" and each.ctx == "load" for each in tree.find_all(jinja2.nodes.Name))

    def strftime_now(self, format: str) -> str:
        """Return the local time that templates see."""
        return (datetime.now() if self.now is None else datetime.fromtimestamp(self.now)).strftime(format)

    def render(self, chat: Mapping[str, Any]) -> str:
        """Return the prompt of a conversation.

        Raises:
            Exception: Whatever the template raises.
        """
        if chat.get("tools") and not self._reads_tools:
            raise NoToolsError
        self.now = chat.get("now")
        messages = [self._shaped(message) for message in chat["messages"]]
        text = self._open_ended(chat, messages) if chat["continue_final_message"] else self._text(chat, messages)
        text.encode()  # a lone surrogate would reach the tokenizer
        return text

    def _text(self, chat: Mapping[str, Any], messages: list[Any]) -> str:
        variables = {
            "tools": None,
            "documents": None,
            **self._variables,
            **chat.get("chat_template_kwargs", {}),
            "messages": messages,
            "add_generation_prompt": chat["add_generation_prompt"],
        }
        if chat.get("tools"):
            variables["tools"] = chat["tools"]
        pieces: list[str] = []
        left = self._output_chars
        for piece in self._template.generate(variables):
            left -= len(piece)
            if left < 0:
                raise TooLongError(f"the prompt has more than {self._output_chars:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    def _shaped(self, message: Any) -> Any:
        """Return a message with its content in the form that the template takes: text, or a list of parts."""
        given = message.get("content")
        if isinstance(given, list):
            shaped = Parts(given) if self._form != content.TEXT else str(Parts(given))
        elif isinstance(given, str) and self._form == content.PARTS:
            shaped = Parts([{"type": "text", "text": given}])
        else:
            return message
        return {**message, "content": shaped}

    def _open_ended(self, chat: Mapping[str, Any], messages: list[Any]) -> str:
        """Return the prompt up to the end of the last message's content."""
        *before, last = messages
        if "content" not in self._source:
            raise ValueError("continue_final_message: the template does not read the content of messages")
        if isinstance(last["content"], Parts):
            *parts, part = last["content"] or [{"type": "text", "text": ""}]
            end, marked = part["text"], Parts([*parts, {**part, "text": part["text"] + TAG}])
        else:
            end, marked = last["content"], last["content"] + TAG
        text = self._text(chat, [*before, {**last, "content": marked}])
        if end.strip() not in text or TAG.strip() not in text:
            raise ValueError("continue_final_message: the template changes or drops the last message")
        place = text.rindex(TAG.strip())
        return text[:place] if text.startswith(TAG, place) else text[:place].rstrip()


def answer(renderer: Renderer, frame: bytes) -> bytes:
    """Return a reply with the prompt of a conversation, or with an error."""
    try:
        return json.dumps({"text": renderer.render(json.loads(frame))}, ensure_ascii=False).encode()
    except TooLongError as error:
        return json.dumps({"error": f"{error}, made by the chat template", "code": "context_length_exceeded"}).encode()
    except NoToolsError:
        return json.dumps({"error": "the chat template has no place for tools", "code": "unsupported_field", "param": "tools"}).encode()
    except jinja2.TemplateError as error:
        reason = f"{'refuses this conversation' if type(error) is jinja2.TemplateError else 'failed'}: {error}"
    except MemoryError:
        reason = "needs too much memory"
    except Exception as error:  # noqa: BLE001  (whatever a template raises is the error of its conversation)
        reason = f"failed: {type(error).__name__}: {error}"
    return failure(reason)  # here, where what the exception held is free again


def failure(reason: str) -> bytes:
    """Return a reply with an error."""
    return json.dumps({"error": f"the chat template {reason}"[:MOST_REASON_CHARS].encode(errors="replace").decode()}).encode()


def restrict(memory_bytes: int) -> None:
    """Restrict this process: from now on it can open no file, write none and start no process, and its memory is bounded."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # a kernel in want of memory ends this process, not its owner
    datetime.now().strftime("%c")  # reads the time zone
    codecs.lookup("unicode_escape")  # of string literals in templates
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used_bytes + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    for name in set(os.environ) - {"TZ"}:
        del os.environ[name]


def allow_seconds(cpu_seconds: int) -> None:
    """Allow this much more processor time; beyond it the kernel ends the process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(usage.ru_utime + usage.ru_stime) + cpu_seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def read_number(source: BinaryIO) -> int:
    """Read a number; end the process at the end of the input."""
    data = source.read(LENGTH.size)
    if len(data) < LENGTH.size:
        sys.exit(0)
    return LENGTH.unpack(data)[0]


def write_frame(sink: BinaryIO, data: bytes) -> None:
    """Write the data with its length before it."""
    sink.write(LENGTH.pack(len(data)))
    sink.write(data)
    sink.flush()


def main() -> None:
    """Serve until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    opening = json.loads(source.read(read_number(source)))
    restrict(opening["memory_bytes"])
    allow_seconds(opening["cpu_seconds"])
    try:
        renderer = Renderer(opening["template"], opening["variables"], opening["output_chars"])
    except Exception as error:  # noqa: BLE001  (jinja2 passes on what Python's compiler raises)
        return write_frame(sink, failure(f"is not valid: {error}"))
    answer(renderer, json.dumps(GREETING).encode())  # a template that cannot even do this within the limits never renders anything
    write_frame(sink, b"{}")
    while True:
        frames = [source.read(read_number(source)) for _ in range(read_number(source))]
        for frame in frames:
            allow_seconds(opening["cpu_seconds"])
            write_frame(sink, answer(renderer, frame))


if __name__ == "__main__":
    main()
