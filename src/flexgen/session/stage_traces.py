"""The traces of all stages of a pipeline in one file: followers send theirs at the end, and the first stage puts them beside its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flexgen.base.files import write_file
from flexgen.base.quantities import MIB
from flexgen.distributed.channel import Receiver, Sender

TRACE = "trace"


def trace_of_stage(path: str, rank: int) -> str:
    """Return the file of a stage's own trace, beside the one that the options name."""
    return path if rank == 0 else f"{path}.stage{rank}"


def send_trace(path: Path, rank: int, ping_at: int, to: Sender) -> None:
    """Send the trace of this stage towards the first one, and remove its file.

    Args:
        path: The file, which is complete.
        rank: The stage.
        ping_at: When the ping that all stages saw passed here, in microseconds of the trace.
        to: What sends to the next stage, or from the last one to the first.
    """
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for start in range(0, len(data), MIB):
        to.send(TRACE, {"stage": rank, "ping_at": ping_at}, [data[start : start + MIB]])
    with contextlib.suppress(OSError):
        path.unlink()


def gather_traces(path: Path, ping_at: int, hop: int, source: Receiver, hosts: Sequence[str]) -> None:
    """Put the traces of the other stages into that of the first, each as a process of its own, with its times shifted to the first one's.

    Args:
        path: The file of the first stage's trace, which is complete.
        ping_at: When the ping left, in microseconds of that trace.
        hop: The latency of a link, in microseconds.
        source: What receives from the last stage, until it says that this was the end.
        hosts: The host of each stage.

    Raises:
        StageError: A stage does not work any more.
        StorageError: The file cannot be written.
    """
    parts: dict[int, list[bytes]] = {}
    pings: dict[int, int] = {}
    while (frame := source.receive()).kind != "end":
        if frame.kind == TRACE:
            stage = int(frame.header["stage"])
            pings[stage] = int(frame.header["ping_at"])
            parts.setdefault(stage, []).append(frame.tensors[0].numpy().tobytes())
    whole = json.loads(path.read_bytes())
    whole["traceEvents"] = list(_as_process(whole["traceEvents"], 0, hosts[0], 0))
    for stage, data in sorted(parts.items()):
        shift = ping_at + stage * hop - pings[stage]
        whole["traceEvents"] += _as_process(json.loads(b"".join(data))["traceEvents"], stage, hosts[stage], shift)
    write_file(path, json.dumps(whole))


def _as_process(events: list[dict[str, Any]], stage: int, host: str, shift: int) -> Iterator[dict[str, Any]]:
    """Yield the events of one stage as those of a process of its own."""
    for event in events:
        moved = event | {"pid": stage + 1}
        if "ts" in event:
            moved["ts"] = event["ts"] + shift
        if event["name"] == "process_name":
            moved["args"] = {"name": f"stage {stage} on {host}"}
        yield moved
