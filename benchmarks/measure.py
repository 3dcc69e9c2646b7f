"""One measurement: a command in a memory cgroup, its output, a line in the results.  Knows no system."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capped import Outcome, run_capped
from record import Results, commit
from shapes import OUTPUT_TOKENS, PROMPT_TOKENS, Shape

from flexgen.base.quantities import format_size


class Deadline:
    """A point in time that a part of the comparison must not pass."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def share(self, fraction: float) -> Deadline:
        """A deadline after `fraction` of what is left."""
        return Deadline(self.seconds_left * fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all measurements of one shape share.

    Attributes:
        scratch: checkpoints, request files, logs; on the disk that is to be measured.
        tokens: of each prompt, and of each answer.
        again: measure even what the results hold already; the table takes the median.
    """

    shape: Shape
    memory_bytes: int
    num_requests: int
    threads: int
    scratch: Path
    results: Results
    again: bool
    tokens: tuple[int, int] = (PROMPT_TOKENS, OUTPUT_TOKENS)

    @property
    def prompt_tokens(self) -> int:
        return self.tokens[0]

    @property
    def output_tokens(self) -> int:
        return self.tokens[1]

    @property
    def model(self) -> Path:
        return self.scratch / self.shape.name

    @property
    def gguf(self) -> Path:
        return self.scratch / f"{self.shape.name}.gguf"

    def requests(self) -> Path:
        """The request file: random ids, all prompts and all answers of one length; the same for every system."""
        path = self.scratch / f"{self.shape.name}-{self.num_requests}x{self.prompt_tokens}+{self.output_tokens}.jsonl"
        if not path.exists():
            ids = random.Random(0)
            lines = (
                {
                    "id": f"request-{index}",
                    "prompt": [ids.randrange(10, self.shape.config["vocab_size"]) for _ in range(self.prompt_tokens)],
                    "max_tokens": self.output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                for index in range(self.num_requests)
            )
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


def measure(
    setup: Setup,
    deadline: Deadline,
    *,
    system: str,
    role: str,
    setting: dict[str, Any],
    argv: Sequence[str],
    read: Callable[[str], dict[str, Any]],
    is_ours: bool = False,
) -> dict[str, Any] | None:
    """Run `argv` cold under the cap and record what `read` makes of its stdout.

    A command that dies of the cap is recorded with "survived" false; one that the deadline ended also with "timed_out" true, and is
    tried again when there is more time than it had.

    Args:
        role: "sweep" (a short run that chooses a setting) or "result".
        is_ours: measured with this checkout, so a result of another commit, or of changed files, is an old one.

    Returns:
        The line of the results, old or new; None when no time is left.

    Raises:
        SystemExit: when the command fails for another reason than memory or time; nothing is recorded.
        NoCgroup: when no cgroup can be made here.
    """
    key = {
        "system": system,
        "shape": setup.shape.name,
        "memory_bytes": setup.memory_bytes,
        "num_requests": setup.num_requests,
        "tokens": list(setup.tokens),
        "role": role,
        "setting": setting,
    }
    seconds = deadline.seconds_left
    found = setup.results.find(key)
    if found and not _is_stale(found, setup, seconds, is_ours):
        return _say(found, "found")
    if seconds < 1:
        return None
    log = setup.scratch / "logs" / "-".join(str(part) for part in (setup.shape.name, system, role, *setting.values()))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.with_suffix(".out").open("w") as stdout, log.with_suffix(".err").open("w") as stderr:
        outcome = run_capped(setup.memory_bytes, argv, timeout_seconds=seconds, stdout=stdout, stderr=stderr)
    killed_for_memory = outcome.oom_kills > 0
    if outcome.returncode and not outcome.timed_out and not killed_for_memory:
        raise SystemExit(f"{system} failed with status {outcome.returncode}:\n{_tail(log.with_suffix('.err'))}")
    figures = read(log.with_suffix(".out").read_text()) if outcome.survived else {}
    return _say(setup.results.append({**key, **_ending(outcome, seconds), **_without_paths(figures, setup.scratch)}), "measured")


def _is_stale(found: dict[str, Any], setup: Setup, seconds: float, is_ours: bool) -> bool:
    if found["timed_out"]:
        return seconds > 1.1 * found["seconds_granted"]
    if is_ours and (found["dirty"] or found["commit"] != commit()["commit"]):
        return True
    return setup.again and found["role"] == "result"


def _ending(outcome: Outcome, seconds_granted: float) -> dict[str, Any]:
    ending = dataclasses.asdict(outcome)
    return {
        "survived": outcome.survived,
        "timed_out": ending.pop("timed_out"),
        "seconds_granted": round(seconds_granted, 1),
        "process_seconds": ending.pop("elapsed_seconds"),
        "cgroup": ending,
    }


def _without_paths(figures: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Results are published: they name no folder of the machine they come from."""
    return json.loads(json.dumps(figures).replace(str(scratch), "SCRATCH"))


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _say(row: dict[str, Any], how: str) -> dict[str, Any]:
    peak = row["cgroup"]["peak_bytes"]
    if row["survived"]:
        figure = f"{row['output_tokens_per_s']:.2f} tokens/s"
    else:
        figure = "out of time" if row["timed_out"] else "killed for memory"
    setting = " ".join(f"{name}={value}" for name, value in row["setting"].items())
    memory = format_size(row["memory_bytes"]) + (f", peak {format_size(peak)}" if peak else "")
    print(f"{row['shape']} {row['system']} {row['role']} {setting}: {figure} ({memory}, {row['process_seconds']:.0f} s, {how})", flush=True)
    return row
