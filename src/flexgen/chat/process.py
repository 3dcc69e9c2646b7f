"""Renders chat templates in a process of their own, because they come from strangers and jinja2's sandbox bounds neither time nor memory.

The process (child.py) imports jinja2 only, gets nothing but conversations, and is replaced when a conversation brings it to an end.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.quantities import MIB, format_size
from flexgen.chat.messages import Chat
from flexgen.errors import FlexGenError, RequestError

_SCRIPT = Path(__file__).with_name("child.py")
_LENGTH = struct.Struct("<I")  # before every frame; alone, before a batch, it is the number of its frames
_BATCH_CHATS = 256
_BATCH_BYTES = 8 * MIB
_BATCH_CHARS = 16 * MIB  # of prompts that may come back at once
_CHAT_FIELDS = tuple(field.name for field in dataclasses.fields(Chat))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of rendering one conversation.

    Attributes:
        cpu_seconds: Processor time; up to a second more is tolerated.
        wall_seconds: Time until the prompt is there.
        memory_bytes: Memory beyond that of the idle process.
        output_chars: Length of the prompt.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 512 * MIB
    output_chars: int = 16 * MIB


DEFAULT_LIMITS = Limits()


class TemplateProcess:
    """Renders conversations by one template.  The process starts with the first conversation.

    Args:
        template: The template, Jinja as Hugging Face models have it.
        variables: Variables of the template besides those of a conversation (special tokens, defaults of chat_template_kwargs), as JSON
            values.
        limits: Limits of each conversation.
    """

    def __init__(self, template: str, variables: Mapping[str, Any], *, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self._opening = json.dumps({"template": template, "variables": dict(variables), **dataclasses.asdict(limits)}).encode()
        self._child: _Child | None = None
        self._refusal: RequestError | None = None  # why this template renders nothing at all
        self._failed_openings = 0  # in a row
        self._lock = threading.Lock()  # held while a batch is rendered: threads take turns

    def render(self, chats: Sequence[Chat], *, now: float | None = None) -> list[str | RequestError]:
        """Return what `render_each` yields, all at once."""
        return list(self.render_each(chats, now=now))

    def render_each(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of every conversation, or its error; a few are held at a time.

        Args:
            chats: The conversations.
            now: The time that templates see, in seconds since 1970; None is the clock's.

        Raises:
            FlexGenError: The process cannot be started.
        """
        most_chats = max(1, min(_BATCH_CHATS, _BATCH_CHARS // self.limits.output_chars))
        waiting: list[bytes | RequestError] = []
        size = 0
        for chat in chats:
            payload = self._payload(chat, now)
            num_bytes = len(payload) if isinstance(payload, bytes) else 0
            if waiting and (len(waiting) == most_chats or size + num_bytes > _BATCH_BYTES):
                yield from self._answers(waiting)
                waiting, size = [], 0
            waiting.append(payload)
            size += num_bytes
        yield from self._answers(waiting)

    def close(self) -> None:
        """End the process, if there is one; the next conversation would start another."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answers(self, waiting: Sequence[bytes | RequestError]) -> list[str | RequestError]:
        payloads = [payload for payload in waiting if isinstance(payload, bytes)]
        answers: list[str | RequestError] = []
        with self._lock:
            while len(answers) < len(payloads):
                answers += self._exchange(payloads[len(answers) :])
        left = iter(answers)
        return [payload if isinstance(payload, RequestError) else next(left) for payload in waiting]

    def _payload(self, chat: Chat, now: float | None) -> bytes | RequestError:
        try:
            payload = json.dumps({**{name: getattr(chat, name) for name in _CHAT_FIELDS}, "now": now}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return RequestError(f"the conversation cannot be written as JSON: {error}", param="messages")
        if len(payload) > self.limits.memory_bytes // 4:
            return RequestError(f"the conversation has {format_size(len(payload))} of JSON, which is too much", param="messages")
        return payload

    def _exchange(self, payloads: list[bytes]) -> list[str | RequestError]:
        """Return the answers to the first of these conversations, at least one.

        A conversation is to blame for the end of the process if that is certain, or if it happened twice.  Once may have another reason,
        such as a kernel that needs memory.
        """
        answers: list[str | RequestError] = []
        for is_last_attempt in (False, True):
            try:
                child = self._running()
                child.send(payloads)
                for _ in payloads:
                    answers.append(child.receive())
                break
            except RequestError as refusal:
                self.close()
                return [refusal] * len(payloads)
            except _EndedError as end:
                self.close()
                if end.is_certain or (is_last_attempt and not answers):
                    return [*answers, _error(f"the chat template {end}")]
                if answers:
                    break  # the next exchange begins with the one that it ended at
        return answers

    def _running(self) -> _Child:
        """Return the running process; start it if need be.

        Raises:
            RequestError: The template cannot be compiled, or crosses a limit as soon as it is used.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._child is not None and not self._child.is_alive():
            self.close()
        if self._child is None:
            self._child = _Child(self.limits)
            try:
                self._child.open(self._opening)
            except RequestError as error:
                self._refusal = error
                raise
            except _EndedError as end:
                self._failed_openings += 1
                if not end.is_certain and self._failed_openings < 2:
                    raise
                self._refusal = _error(f"the chat template is refused: on a greeting it {end}")
                raise self._refusal from end
            self._failed_openings = 0
        return self._child


def _error(message: str, code: str = "chat_template_error", param: str = "messages") -> RequestError:
    return RequestError(message, code=code, param=param)


class _EndedError(Exception):
    """The process ended, or had to be ended.

    Args:
        reason: The reason, as the rest of a sentence that begins with "the chat template".
        is_certain: Whether the template is certainly to blame.
    """

    def __init__(self, reason: str, *, is_certain: bool) -> None:
        super().__init__(reason)
        self.is_certain = is_certain


class _Child:
    """This side's end of the process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._is_open = False
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:  # in a session of its own, so that Ctrl-C is for us alone; it ends when the socket does
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_SCRIPT)],
                    stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._socket.close()
            raise FlexGenError(f"the process that renders chat templates cannot be started: {error}") from error
        self._socket.settimeout(limits.wall_seconds)
        self._file = self._socket.makefile("rb")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def open(self, opening: bytes) -> None:
        """Hand over the template.

        Raises:
            RequestError: The template is not valid.
        """
        self._send(_LENGTH.pack(len(opening)) + opening)
        reply = self._read()
        self._is_open = True
        if "error" in reply:
            raise _error(reply["error"])

    def send(self, payloads: list[bytes]) -> None:
        """Hand over a batch.  It is read whole before the first answer is written, so that neither side waits for the other."""
        self._send(_LENGTH.pack(len(payloads)) + b"".join(_LENGTH.pack(len(payload)) + payload for payload in payloads))

    def receive(self) -> str | RequestError:
        reply = self._read()
        if "text" in reply:
            return reply["text"]
        return _error(reply["error"], reply.get("code", "chat_template_error"), reply.get("param", "messages"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._file.close()
        self._socket.close()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise self._too_slow() from error
        except OSError as error:
            raise self._end() from error

    def _read(self) -> dict[str, str]:
        try:
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if length > 12 * self._limits.output_chars + MIB:  # the JSON of a character has at most 12 bytes
                raise self._end()
            return json.loads(self._exactly(length))
        except TimeoutError as error:
            raise self._too_slow() from error
        except OSError as error:
            raise self._end() from error

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise self._end()
        return data

    def _too_slow(self) -> _EndedError:
        return _EndedError(f"took longer than {self._limits.wall_seconds:g} seconds", is_certain=False)

    def _end(self) -> _EndedError:
        """Return the error of a process that ended, with its own exit as the reason if it has one."""
        self._process.kill()
        code = self._process.wait()
        if code > 0 and not self._is_open:
            raise FlexGenError(f"the process that renders chat templates does not start (exit code {code}); is jinja2 installed?")
        if code == -signal.SIGXCPU:
            return _EndedError(f"took more than {self._limits.cpu_seconds} seconds of processor time", is_certain=True)
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _EndedError(f"brought its process to an end ({reason})", is_certain=False)
