"""Jobs among whose good lines are hostile ones, and runs in hostile surroundings.

The input has places for hostile lines.  The answers of all other lines are those of a run in which a bad line stands in these places;
what stands there ends in exactly one record, an answer or an error, and in none that tells of a bug unless the trial put it there.
"""

from __future__ import annotations

import json
import os
import pty
import random
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.trials import MODEL, REQUESTS, Fault, JobOutcome, Workshop, key_of, same_answer
from flexgen.base.failpoints import FAILPOINTS

_NUM_PLACES = 8
_MARK = "~~~"  # at the end of a prompt: something goes wrong in the run's own process with this line
_VOCABULARY = 259  # 256 bytes and three special tokens
_INTERNAL = "internal_error"
_SPARE_BYTES = 1 << 30  # what a run may take under "memory before the plan", over what the process has when it is forked


class PanicException(BaseException):
    """By its name what pyo3 raises when a library in Rust panics."""


# -- lines ------------------------------------------------------------------------------------------------------------------------------


def _good_lines() -> list[dict[str, Any]]:
    numbers = random.Random(1)
    lines: list[dict[str, Any]] = []
    for n in range(5):
        prompt = [numbers.randrange(3, _VOCABULARY) for _ in range(numbers.randrange(2, 30))]
        lines.append({"id": f"ids-{n}", "prompt": prompt, "max_tokens": 2 + 2 * n, "temperature": 0, "ignore_eos": True})
    for n in range(4):
        lines.append({"id": f"text-{n}", "prompt": "Once upon a " + "time " * n, "max_tokens": 3 + n, "temperature": 1, "ignore_eos": True})
    lines.append({"id": "several", "prompt": "Several", "max_tokens": 5, "temperature": 1, "n": 2, "logprobs": 2})
    messages = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "seed": 5}
    lines.append({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": messages})
    return lines


def input_lines(hostile: list[str]) -> list[str]:
    """The good lines, and those for the places between them."""
    good = list(map(json.dumps, _good_lines()))
    return [line for pair in zip(hostile, good, strict=False) for line in pair] + good[len(hostile) :]


_EXTREMES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1e-38, 1e38, 1e-37, 3e37, 1e-320, 5e-324, 1e308, float("inf"), 0, -1),
    "temperature": (5e-324, 1e-320, 1e-38, 1e-5, 1e38, 1.7e308, -1e-320, float("nan")),
    "top_p": (5e-324, 1e-320, 1e-38, 0, 1 - 2**-53, 1.0000001),
    "min_p": (1.0, 5e-324, 1 - 2**-53),
    "top_k": (1, -1, 0, 2**31, 2**63, 10**30),
    "presence_penalty": (2, -2, 2.0001, 1e308),
    "frequency_penalty": (2, -2, -1e308),
    "logit_bias": (
        {str(n): 100 for n in range(_VOCABULARY)}, {str(n): -100 for n in range(_VOCABULARY)}, {"7": 1e308, "8": -1e308}, {"9": 5e-324},
        {str(2**63 - 1): 1}, {str(10**30): 1},
    ),
    "stop": (["x" * n for n in range(1, 400)], "\ud800", "", ["a"] * 5000, [chr(n) for n in range(32, 127)]),
    "stop_token_ids": (list(range(_VOCABULARY)), [2**63], [-1]),
    "bad_words": ([chr(n) for n in range(33, 256)], [" "], ["\ud800"], ["a" * 5000]),
    "allowed_token_ids": ([0], [_VOCABULARY + 3], [10**18], [], list(range(_VOCABULARY)) * 3),
    "min_tokens": (40, 10**9, 2**63),
    "max_tokens": (1, 10**18, 0),
    "n": (8, 10**6),
    "seed": (2**64, -1, 0),
    "logprobs": (_VOCABULARY, 10**9, -1),
    "prompt": ([], [2**63], [0] * 127, [0] * 128, [-1], [1e308], "", "\ud800", None, {}, [[1]]),
}  # fmt: skip
_RAW = (
    "[" * 100_000,
    '{"prompt": ' * 5000,
    '{"prompt": "a", "prompt": "b"}',
    '{"prompt": 1' + "0" * 5000 + "}",
    "\0",
    "null",
    '"text"',
    "{}",
)


def _extreme_line(numbers: random.Random, place: int) -> str:
    """Sampling at the limits of what is allowed, and beyond them."""
    if numbers.random() < 0.1:
        return numbers.choice(_RAW)
    line: dict[str, Any] = {"id": f"hostile-{place}", "prompt": "Hostile " * numbers.randint(1, 3), "max_tokens": numbers.randint(1, 10)}
    if numbers.random() < 0.3:
        line["prompt"] += _MARK
    for name in numbers.sample(sorted(_EXTREMES), numbers.choice((1, 1, 1, 2, 3))):
        line[name] = numbers.choice(_EXTREMES[name])
    return json.dumps(line)


def _panicking_line(numbers: random.Random, place: int) -> str:
    """A text that the tokenizer's pattern gives up on, or one that the run's own panics concern."""
    text = "a" * numbers.randint(40, 120) + "!" if numbers.random() < 0.5 else "Panic " * numbers.randint(1, 3) + _MARK
    if numbers.random() < 0.3:
        return _chat_line(text, place)
    return json.dumps({"id": f"hostile-{place}", "prompt": text, "max_tokens": numbers.randint(1, 8)})


def _huge_line(numbers: random.Random, place: int) -> str:
    """Megabytes of text, ids, or what a chat template makes of a few characters."""
    size = int(2 ** numbers.uniform(16, 23.5))
    kind = numbers.randrange(7)
    if kind == 0:
        return _chat_line("expand " + "a b c d " * numbers.randint(1, 9), place)
    if kind == 1:
        return _chat_line("a b c d " * (size // 8), place)
    if kind == 2:
        return json.dumps({"id": f"hostile-{place}", "prompt": [7] * (size // 4)})
    if kind == 3:
        words = [f"{n} " * numbers.randint(1, 40) for n in range(size // 160)]
        return json.dumps({"id": f"hostile-{place}", "prompt": "Stop", "max_tokens": 4, numbers.choice(["stop", "bad_words"]): words})
    text = {4: "a b c d " * (size // 8), 5: " " * size, 6: "\N{GRINNING FACE}" * (size // 4)}[kind]
    return json.dumps({"id": f"hostile-{place}", "prompt": text, "max_tokens": 4}, ensure_ascii=numbers.random() < 0.5)


def _chat_line(text: str, place: int) -> str:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    return json.dumps({"custom_id": f"hostile-{place}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def _plain_line(numbers: random.Random, place: int) -> str:
    return "no JSON"


# -- what holds during a run ------------------------------------------------------------------------------------------------------------


def _let_code_fail(job: Path, numbers: random.Random) -> None:
    """Code that works for one request raises what nobody foresaw."""
    import flexgen.engine.sampler as sampler
    from flexgen.jobs.reading import Reader
    from flexgen.jobs.serving import Serving

    kinds = (IndexError, ZeroDivisionError, FloatingPointError, ValueError, OverflowError, RecursionError, KeyError, PanicException)
    error = numbers.choice(kinds)

    def failing(call: Callable[..., Any], ids_of: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any) -> Any:
            if _is_marked(ids_of(*arguments)):
                _strike(job)
                raise error("a test says so")
            return call(*arguments)

        return instead

    which = numbers.randrange(3)
    if which == 0:
        sampler._choose = failing(sampler._choose, lambda row, greedy, request, past: request.prompt_token_ids)
    elif which == 1:
        Serving._record = failing(Serving._record, lambda self, request, prompt, results: prompt)
    else:
        Reader._token_requests = failing(Reader._token_requests, lambda self, request, ids: ids)


def _let_tokenizer_panic(job: Path, numbers: random.Random) -> None:
    """When it encodes, or when it decodes, what ends in the mark."""
    from transformers import PreTrainedTokenizerFast

    encode, decode, encodes = PreTrainedTokenizerFast.__call__, PreTrainedTokenizerFast.decode, numbers.random() < 0.5

    def encoding(self: Any, texts: list[str], **keywords: Any) -> Any:
        if any(_MARK in text for text in texts):
            _panic(job)
        return encode(self, texts, **keywords)

    def decoding(self: Any, token_ids: list[int], **keywords: Any) -> Any:
        if _holds_mark(token_ids):
            _panic(job)
        return decode(self, token_ids, **keywords)

    if encodes:
        PreTrainedTokenizerFast.__call__ = encoding
    else:
        PreTrainedTokenizerFast.decode = decoding


def _panic(job: Path) -> None:
    _strike(job)
    raise PanicException("a test says so")


def _limit_memory(job: Path, numbers: random.Random) -> None:
    """So much for the whole process, whatever its own budget."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = int(fields["VmData"].split()[0]) * 1024 + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    _strike(job)


def _spoil_descriptors(job: Path, numbers: random.Random) -> None:
    """Standard streams that are closed, full, or that nobody reads any more."""
    names = ("stdin", "stdout", "stderr")
    for descriptor in numbers.sample(range(3), numbers.randint(1, 3)):
        numbers.choice(_SPOILT)(descriptor)
        if not _is_open(descriptor):  # what the interpreter makes of it when it starts
            setattr(sys, names[descriptor], None)
            setattr(sys, f"__{names[descriptor]}__", None)
    if numbers.random() < 0.3:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _strike(job)


def _full(descriptor: int) -> None:
    _become(descriptor, os.open("/dev/full", os.O_RDWR))


def _without_reader(descriptor: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    _become(descriptor, writer)


def _without_terminal(descriptor: int) -> None:
    master, terminal = pty.openpty()
    os.close(master)
    _become(descriptor, terminal)


def _read_only(descriptor: int) -> None:
    _become(descriptor, os.open(os.devnull, os.O_RDONLY))


def _become(descriptor: int, opened: int) -> None:
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)


_SPOILT = (_close, _full, _without_reader, _without_terminal, _read_only)
_CONDITIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "code fails": _let_code_fail,
    "the tokenizer panics": _let_tokenizer_panic,
    "descriptors": _spoil_descriptors,
    "memory": _limit_memory,
    "lines": lambda job, numbers: None,
    "planted": lambda job, numbers: None,
}


def _strike(job: Path) -> None:
    with suppress(OSError):
        (job / "struck").touch()


def _is_marked(token_ids: Any) -> bool:
    return token_ids is not None and tuple(token_ids)[-len(_MARK) :] == _mark_ids()


def _holds_mark(token_ids: Any) -> bool:
    ids, mark = tuple(token_ids), _mark_ids()
    return any(ids[start : start + len(mark)] == mark for start in range(len(ids)))


def _mark_ids() -> tuple[int, ...]:
    return tuple(sorted(_alphabet()).index(each) + 3 for each in _MARK)


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


# -- planted files ----------------------------------------------------------------------------------------------------------------------


_IN_STATE = ("lock", "export.lock", "job.sqlite", "job.sqlite-wal", "job.sqlite-shm", "input", "input.new")
_PLACES = ("out.jsonl", "out.jsonl.flexgen", "metrics.json", ".out.jsonl.flexgen-new", *(f"out.jsonl.flexgen/{name}" for name in _IN_STATE))
_REPLACED = ("out.jsonl.flexgen/lock", "out.jsonl.flexgen/export.lock", "metrics.json")  # though they are there
_SECRET = b"what somebody else wrote\n" * 100


@contextmanager
def _planted(job: Path, numbers: random.Random) -> Iterator[list[object]]:
    """Something lies where the job writes; afterwards nothing outside may have changed, and it is taken away."""
    outside = job / "outside"
    outside.mkdir(exist_ok=True)
    secret = outside / "secret"
    secret.write_bytes(_SECRET)
    name = numbers.choice(_PLACES)
    path, plant = job / name, numbers.choice(_PLANTS)
    if name in _REPLACED:
        path.unlink(missing_ok=True)
    planted = None
    if not os.path.lexists(path) and not (name == "out.jsonl" and plant is _dangling_link):  # an output's own link is followed
        path.parent.mkdir(mode=0o700, exist_ok=True)
        plant(path, secret)
        planted = path.lstat()
        print(f"planted: {name} {plant.__name__}", file=(job / "log").open("a"))
        _strike(job)
    found: list[object] = []
    yield found
    if secret.read_bytes() != _SECRET or list(outside.iterdir()) != [secret]:
        found.append(f"{name} {plant.__name__}: the outside has changed")
        print(found, file=(job / "log").open("a"))
    is_taken = name == "out.jsonl.flexgen" and plant is _folder  # an empty folder of one's own may hold the job from then on
    if planted is not None and not is_taken and os.path.lexists(path) and os.path.samestat(planted, path.lstat()):
        _remove(path)
    with suppress(OSError):
        (job / "out.jsonl.flexgen").rmdir()  # if nothing is in it


def _hard_link(path: Path, secret: Path) -> None:
    path.hardlink_to(secret)


def _link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def _dangling_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret.with_name("new"))


def _pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def _foreign_file(path: Path, secret: Path) -> None:
    path.write_bytes(_SECRET)


def _folder(path: Path, secret: Path) -> None:
    path.mkdir()


def _folder_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent)


_PLANTS = (_hard_link, _link, _dangling_link, _pipe, _foreign_file, _folder, _folder_link)


def _remove(path: Path) -> None:
    if stat.S_ISDIR(path.lstat().st_mode):
        for each in path.iterdir():
            _remove(each)
        path.rmdir()
    else:
        path.unlink()


# -- runs -------------------------------------------------------------------------------------------------------------------------------


@dataclass
class HostileWorkshop(Workshop):
    """A model with a tokenizer, and an input of its own for every job.

    Attributes:
        hostile: the lines for the places of the next job. may_be_bug: whether its code is made to fail.
    """

    hostile: list[str] = field(default_factory=lambda: ["no JSON"] * _NUM_PLACES)
    may_be_bug: bool = False

    def _write_model(self) -> None:
        write_model(self.folder / MODEL)

    def _write_requests(self) -> None:
        """Every job has its own."""

    def new_folder(self) -> Path:
        job = Workshop.new_folder(self)
        (job / REQUESTS).write_text("".join(f"{line}\n" for line in input_lines(self.hostile)))
        return job

    def _requests(self, job: Path) -> Path:
        return job / REQUESTS

    def _under_condition(self, job: Path, fault: Fault) -> int:
        _CONDITIONS[fault.condition](job, random.Random(fault.seed))
        code = self._flexgen(job, *fault.flags)
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except OSError:
                return 120  # as the interpreter ends then
        return code

    @contextmanager
    def _around(self, job: Path, fault: Fault) -> Iterator[list[object]]:
        if fault.condition == "planted":
            with _planted(job, random.Random(fault.seed)) as found:
                yield found
            return
        if fault.condition == "lines":
            _strike(job)
        yield []

    def _is_whole(self, output: Path) -> bool:
        wanted, found = self.reference.splitlines(keepends=True), output.read_bytes().splitlines(keepends=True) if output.exists() else []
        pairs = enumerate(zip(wanted, found, strict=False))
        return len(wanted) == len(found) and all(_is_hostile(place) or same_answer(*pair) for place, pair in pairs)

    def _faults_of(self, output: Path) -> tuple[int, int, int]:
        """As of other jobs, but the records in the places of hostile lines are known by the lines' numbers only."""
        wanted = [line for place, line in enumerate(self.reference.splitlines(keepends=True)) if not _is_hostile(place)]
        found = output.read_bytes().splitlines(keepends=True) if output.exists() else []
        good = {key_of(line): line for line in wanted}
        keys = [key_of(line) for line in found]
        wrong = sum(key in good and not same_answer(good[key], line) for key, line in zip(keys, found, strict=True))
        wrong += sum(_INTERNAL in line.decode() for line in found) if not self.may_be_bug else 0
        duplicated = len(keys) - len(set(keys))
        num_missing = len(good.keys() - set(keys)) + max(_NUM_PLACES - len(set(keys) - good.keys()), 0)
        return duplicated, wrong, num_missing


def _is_hostile(place: int) -> bool:
    """Whether the line of the input, counted from 0, is one of those for hostile lines."""
    return place % 2 == 0 and place < 2 * _NUM_PLACES


def write_model(folder: Path) -> None:
    """Two layers with random weights, and a tokenizer of bytes with a pattern that takes for ever.  Call it in a child."""
    import torch
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    from flexgen.checkpoint.dummy import write_random_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    write_random_checkpoint(config, folder, torch.float32)
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {piece: place for place, piece in enumerate([*special, *sorted(_alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content * (1000000 if m.content.startswith('expand') else 1) }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# -- kinds ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileKind:
    """Its hostile lines, what holds during its runs, their flags, and the exit codes of those that are not killed."""

    line: Callable[[random.Random, int], str]
    conditions: tuple[str, ...]
    flags: tuple[tuple[str, ...], ...] = ((),)
    codes: frozenset[int] = frozenset({1})

    def draw(self, name: str, workshop: Workshop, numbers: random.Random, job: str) -> list[Fault]:
        """Two runs, the first of which is killed on its way, mostly, and the second seldom."""
        return [
            Fault(
                name=name, condition=numbers.choice(self.conditions), seed=numbers.randrange(10**9), codes=self.codes,
                flags=tuple(each.format(job=job) for each in numbers.choice(self.flags)), **_killed(workshop, numbers, share),
            )
            for share in (0.7, 0.2)
        ]  # fmt: skip


def _killed(workshop: Workshop, numbers: random.Random, share: float) -> dict[str, Any]:
    """A kill in so many of a hundred runs, at a random time or failpoint."""
    if numbers.random() > share:
        return {}
    if numbers.random() < 0.5:
        return {"seconds": numbers.uniform(0, workshop.seconds), "signals": (signal.SIGKILL,)}
    return {"point": numbers.choice(FAILPOINTS), "hit": numbers.randint(1, 20), "action": "kill"}


HOSTILE_KINDS = {
    "hostile lines": HostileKind(line=_extreme_line, conditions=("lines", "lines", "code fails")),
    "tokenizer panics": HostileKind(line=_panicking_line, conditions=("lines", "the tokenizer panics", "the tokenizer panics")),
    "closed and full descriptors": HostileKind(
        line=_plain_line, conditions=("descriptors",), flags=tuple(("--progress", name) for name in ("none", "plain", "auto", "json"))
    ),
    "planted temporaries": HostileKind(
        line=_plain_line, conditions=("planted",), flags=((), ("--metrics", "{job}/metrics.json")), codes=frozenset({1, 2, 3})
    ),
    "memory before the plan": HostileKind(line=_huge_line, conditions=("memory",)),
}


def run_hostile_kind(workshop: HostileWorkshop, kind: str, num_jobs: int, seed: int) -> Iterator[JobOutcome]:
    """Some jobs of one kind."""
    numbers, chosen = random.Random(f"{kind} {seed}"), HOSTILE_KINDS[kind]
    for _ in range(num_jobs):
        workshop.hostile = [chosen.line(numbers, place) for place in range(_NUM_PLACES)]
        job = str(workshop.folder / f"job-{workshop.num_jobs + 1}")
        faults = chosen.draw(kind, workshop, numbers, job)
        workshop.may_be_bug = any(fault.condition == "code fails" for fault in faults)
        yield workshop.try_job(faults)
