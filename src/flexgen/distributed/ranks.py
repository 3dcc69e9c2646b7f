"""The ranks of a run: joins them through a store, opens channels between them, and ends them together."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented as public)
from torch.distributed.distributed_c10d import ProcessGroupGloo

from flexgen.distributed.channel import Receiver, Sender
from flexgen.distributed.frames import Limits
from flexgen.distributed.health import Health, Timings, first_beat
from flexgen.distributed.interfaces import address_of, address_towards, listening_socket
from flexgen.distributed.place import Place, place_of
from flexgen.distributed.shaping import VARIABLE, parse_link
from flexgen.distributed.wire import Wire, WireError
from flexgen.errors import EngineError, StageError

JOIN_SECONDS = 300.0
_MOST_BYTES = 1 << 26  # of a value in the store
_CLOSE_SECONDS = 60.0  # for all ranks to be done after the first
_THREAD_SECONDS = 2.0  # for threads to end; one that gloo holds back is left behind


class Ranks:
    """This process as one rank of a run.  A context, which ends cleanly when all ranks leave it, and otherwise ends the run on all.

    `join` makes it.

    Attributes:
        rank, size: The own rank, and the number of all.
        local_rank, local_size: The same among the ranks of this machine.
        hosts: The names of all ranks' hosts.
        address: The address of this machine that connections are made from and to.
        health: Whether all ranks are well.
    """

    def __init__(
        self, place: Place, address: str, store: Store, hosts: tuple[str, ...], health: Health, *,
        environment: Mapping[str, str], timeout: float, limits: Limits,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.hosts, self.address, self.health = place.rank, place.size, hosts, address, health
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._place, self._timeout, self._limits = place, timeout, limits
        self._store: Store | None = store
        self._link = parse_link(environment[VARIABLE]) if environment.get(VARIABLE) else None
        self._senders: dict[int, Sender] = {}
        self._receivers: dict[int, Receiver] = {}

    @classmethod
    def join(
        cls, environment: Mapping[str, str], interface: str | None = None, timeout: float = JOIN_SECONDS, *,
        patience: float | None = None, timings: Timings | None = None, limits: Limits | None = None, watchdog: bool = True,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Ranks:  # fmt: skip
        """Join the other ranks, and wait until all are there.

        Args:
            environment: The environment as torchrun or `launch.py` writes it.
            interface: The network interface for all connections; None: that towards MASTER_ADDR.
            timeout: Seconds until all ranks must be there, and later the two ends of every channel.
            patience: Seconds until all ranks must be there, where some have much to do before they come; None: as `timeout`.
            timings: When a rank counts as lost.
            limits: The largest frames.
            watchdog: Whether this process may be ended when a rank is lost and its main thread is stuck.
            while_waiting: Called now and then; what it raises ends the wait.

        Raises:
            OptionError: The environment or the interface is wrong.
            StageError: A rank is missing.
        """
        place = place_of(environment)
        address = address_of(interface) if interface is not None else address_towards(place.host, place.port)
        timings = timings or Timings()
        store = _opened(place, address, timeout)
        try:
            hosts = _hosts(place, store, timeout if patience is None else patience, while_waiting)
            health = Health(
                place.rank, hosts, lambda: _connected(place, timeout),
                store_rank=None if place.agent_serves else 0, timings=timings, watchdog=watchdog,
            )  # fmt: skip
            ranks = cls(place, address, store, hosts, health, environment=environment, timeout=timeout, limits=limits or Limits())
        except RuntimeError as error:
            raise _unreachable(place, error) from error
        health.start()
        return ranks

    def publish(self, key: str, value: dict[str, Any]) -> None:
        """Make a JSON object known to all ranks; a key is used once.

        Raises:
            StageError: A rank is lost.
        """
        self.health.check()
        try:
            self._open_store().set(f"value/{key}", json.dumps(value))
        except RuntimeError as error:
            raise self._lost(error) from error

    def lookup(self, key: str, timeout: float = JOIN_SECONDS) -> dict[str, Any]:
        """Wait for what a rank publishes, and return it.

        Raises:
            StageError: A rank is lost, or nobody has published it in time.
        """
        until = time.monotonic() + timeout
        try:
            store, name = self._open_store(), f"value/{key}"
            while not store.check([name]):
                self.health.check()
                if time.monotonic() > until:
                    raise StageError(f"no rank has said {key!r} within {timeout:g} s")
                time.sleep(0.01)
            value = json.loads(store.get(name)[:_MOST_BYTES])
        except ValueError as error:
            raise StageError(f"what a rank has said about {key!r} is not JSON: {error}") from error
        except RuntimeError as error:
            raise self._lost(error) from error
        if not isinstance(value, dict):
            raise StageError(f"what a rank has said about {key!r} is not a JSON object")
        return value

    def sender(self, to: int) -> Sender:
        """Return the channel to a rank, which opens its end by `receiver`; nobody waits for it here."""
        if to not in self._senders:
            self._check_other(to)
            connect = partial(self._wire, self.rank, to)
            self._senders[to] = Sender(to, connect, self.health, link=self._link, limits=self._limits)
            self._senders[to].start()
        return self._senders[to]

    def receiver(self, source: int) -> Receiver:
        """Return the channel from a rank, which opens its end by `sender`; nobody waits for it here."""
        if source not in self._receivers:
            self._check_other(source)
            self._receivers[source] = Receiver(source, partial(self._wire, source, self.rank), self.health, limits=self._limits)
            self._receivers[source].start()
        return self._receivers[source]

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """End together with all other ranks: what was sent has arrived, and nobody takes the end for a loss.

        Args:
            timeout: Seconds until all others must be there.

        Raises:
            StageError: A rank is lost, or another one does not come to its end.
        """
        if self._store is None:
            return
        try:
            if not self.health.has_failed:
                for sender in self._senders.values():
                    sender.finish()
                for receiver in self._receivers.values():
                    receiver.finish(timeout)
                self.health.wait_for_all(timeout)
        finally:
            self._shut()

    def abort(self, message: str) -> None:
        """End the run on all ranks because of an error on this one.

        Args:
            message: What has failed, as others are told.
        """
        if self._store is not None:
            if not self.health.has_failed:
                self.health.fail(f"failed: {message}")
            self._shut()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abort(str(error) or type(error).__name__)

    def _shut(self) -> None:
        """Break what is open."""
        ends, until = (*self._senders.values(), *self._receivers.values()), time.monotonic() + _THREAD_SECONDS
        for end in ends:
            end.shut()
        for end in ends:
            end.join(max(until - time.monotonic(), 0.0))
        self.health.stop()
        store, self._store = self._store, None
        if store is not None and self._place.rank == 0 and not self._place.agent_serves:
            self.health.wait_for_leavers(store)
        self._senders, self._receivers = {}, {}

    def _check_other(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self.size:
            raise EngineError(f"rank {self.rank} of {self.size} has no channel to rank {rank}")

    def _wire(self, source: int, to: int) -> Wire:
        """Connect the two ends of a channel; runs on the channel's own thread, so that no order of opening can block."""
        try:
            store = PrefixStore(f"wire/{source}-{to}", _connected(self._place, self._timeout))
            device = ProcessGroupGloo.create_device(hostname=self.address)
        except (RuntimeError, StageError) as error:
            raise WireError(str(error)) from error
        return Wire(store, device, sends=source == self.rank, timeout=self._timeout)

    def _open_store(self) -> Store:
        if self._store is None:
            raise StageError("this rank has left the others")
        return self._store

    def _lost(self, error: BaseException) -> StageError:
        """Return the error of a store that is lost; health knows more as soon as it has noticed."""
        self.health.settle(is_certain=True)
        return _unreachable(self._place, error)


def _opened(place: Place, address: str, timeout: float) -> Store:
    """Return the store of all ranks; rank 0 serves it if nobody else does.

    Raises:
        OptionError: Nothing can listen there.
        StageError: It cannot be reached.
    """
    if place.rank > 0 or place.agent_serves:
        return _connected(place, timeout)
    listener = place.listener if place.listener is not None else listening_socket(address, place.port).detach()
    try:
        wait = timedelta(seconds=timeout)
        store = TCPStore(address, place.port, None, True, wait, wait_for_workers=False, master_listen_fd=listener)
    except RuntimeError as error:
        raise _unreachable(place, error) from error
    return PrefixStore(place.run, store)


def _connected(place: Place, timeout: float) -> Store:
    """Return a connection to the store for one thread: a wait of one thread would hold up all others.

    Raises:
        StageError: It cannot be reached.
    """
    try:
        store = TCPStore(place.host, place.port, None, False, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        raise _unreachable(place, error) from error
    return PrefixStore(place.run, store)


def _unreachable(place: Place, error: BaseException) -> StageError:
    said = str(error).partition("\n")[0]
    return StageError(f"the store of the ranks at {place.host}, port {place.port}, cannot be reached: {said}")


def _hosts(place: Place, store: Store, timeout: float, while_waiting: Callable[[], None]) -> tuple[str, ...]:
    """Say that this rank is here, wait for all others, and return their hosts.

    Raises:
        StageError: Some are missing.
    """
    first_beat(store, place.rank)
    store.set(f"host/{place.rank}", socket.gethostname())
    missing = set(range(place.size))
    until = time.monotonic() + timeout
    while missing := {rank for rank in missing if not store.check([f"host/{rank}"])}:
        if time.monotonic() > until:
            said = ", ".join(str(rank) for rank in sorted(missing))
            raise StageError(f"of {place.size} ranks {said} did not come within {timeout:g} s: are all started?")
        while_waiting()
        time.sleep(0.02)
    return tuple(store.get(f"host/{rank}").decode(errors="replace")[:255] for rank in range(place.size))
