"""Stages of a pipeline as threads of one process, whose channels are queues: everything but the transport is real."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from flexgen.distributed.channel import Frame
from flexgen.errors import StageError
from flexgen.options import EngineOptions
from flexgen.session import stage_group
from flexgen.session.follower import Stage
from flexgen.session.lookup import files_of
from flexgen.session.model import ResolvedModel
from flexgen.session.stage_group import StageGroup
from flexgen.session.stage_traces import trace_of_stage
from flexgen.session.weights import in_weight_format

TIMEOUT_SECONDS = 60.0


class Hub:
    """What all ranks share: queues between them, published values, and the first failure."""

    def __init__(self) -> None:
        self.channels: dict[tuple[int, int], ThreadChannel] = defaultdict(lambda: ThreadChannel(self))
        self.published: dict[str, dict[str, Any]] = {}
        self.changed = threading.Condition()
        self.failure: str | None = None

    def check(self) -> None:
        if self.failure is not None:
            raise StageError(self.failure)


class ThreadChannel:
    """Both ends of a channel."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._frames = hub, queue.SimpleQueue[Frame]()
        self.on_arrival: Callable[[], None] = lambda: None
        self.num_frames = 0

    def send(self, kind: str, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        self._hub.check()
        self.num_frames += 1
        self._frames.put(Frame(kind, json.loads(json.dumps(header)), [each.clone() for each in tensors]))
        self.on_arrival()

    def holds(self, kind: str) -> bool:
        return False

    def flush(self) -> None:
        self._hub.check()

    def poll(self) -> Frame | None:
        self._hub.check()
        with contextlib.suppress(queue.Empty):
            return self._frames.get_nowait()
        return None

    def receive(self) -> Frame:
        for _ in range(int(TIMEOUT_SECONDS / 0.05)):
            self._hub.check()
            with contextlib.suppress(queue.Empty):
                return self._frames.get(timeout=0.05)
        raise StageError("nothing arrived")


class ThreadRanks:
    """One rank of several that are threads of this process."""

    def __init__(self, hub: Hub, rank: int, size: int) -> None:
        self._hub, self.rank, self.size = hub, rank, size
        self.local_size, self.hosts = size, [f"host{each}" for each in range(size)]

    def publish(self, key: str, value: dict[str, Any]) -> None:
        with self._hub.changed:
            self._hub.published[key] = json.loads(json.dumps(value))
            self._hub.changed.notify_all()

    def lookup(self, key: str, timeout: float = TIMEOUT_SECONDS) -> dict[str, Any]:
        def there() -> bool:
            self._hub.check()
            return key in self._hub.published

        with self._hub.changed:
            assert self._hub.changed.wait_for(there, timeout), key
            return self._hub.published[key]

    def sender(self, to: int) -> ThreadChannel:
        return self._hub.channels[self.rank, to]

    def receiver(self, source: int) -> ThreadChannel:
        return self._hub.channels[source, self.rank]

    def abort(self, message: str) -> None:
        with self._hub.changed:
            self._hub.failure = self._hub.failure or f"stage {self.rank}: {message}"
            self._hub.changed.notify_all()

    def close(self) -> None:
        pass


def follow(hub: Hub, rank: int, size: int, model: str, options: EngineOptions) -> None:
    """Serve as a stage, as a process of its own would."""
    ranks: Any = ThreadRanks(hub, rank, size)
    try:
        if options.trace is not None:
            options = dataclasses.replace(options, trace=trace_of_stage(options.trace, rank))
        found = ResolvedModel(in_weight_format(files_of(model, options), options), options)
        found.check()
        Stage(found, ranks).run()
    except StageError:
        pass
    except Exception as error:  # noqa: BLE001  (as a process of its own, which the others hear of)
        ranks.abort(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def stages_as_threads(patch: pytest.MonkeyPatch) -> Iterator[list[Hub]]:
    """Have models with stages run them as threads of this process; yield the hubs that were made, one for each model."""
    hubs: list[Hub] = []
    threads: list[threading.Thread] = []

    def join(found: ResolvedModel, num_stages: int) -> StageGroup:
        hub = Hub()
        hubs.append(hub)
        for rank in range(1, num_stages):
            thread = threading.Thread(target=follow, args=(hub, rank, num_stages, str(found.files.name), found.options), daemon=True)
            threads.append(thread)
            thread.start()
        ranks: Any = ThreadRanks(hub, 0, num_stages)
        return StageGroup(found, ranks, contextlib.ExitStack())

    patch.setattr(stage_group, "join_stages", join)
    yield hubs
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()
