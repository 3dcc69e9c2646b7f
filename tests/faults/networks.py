"""Network namespaces joined by a bridge: machines of their own, as far as their links are concerned.  They need root."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
INTERFACE = "eth0"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A namespace with one interface, INTERFACE.

    Attributes:
        name: Its name, as `ip netns` knows it.
        address: The address of its interface.
        outside: The other end of its link.
    """

    name: str
    address: str
    outside: str

    def enter(self) -> None:
        """Move this process into the namespace; its threads must not have begun."""
        with Path("/var/run/netns", self.name).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"entering {self.name} failed")

    def cut(self) -> None:
        """Cut the link: nothing arrives any more, and nobody is told."""
        run("ip", "link", "set", self.outside, "nomaster")

    def mend(self, bridge: str) -> None:
        """Join the link again."""
        run("ip", "link", "set", self.outside, "master", bridge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Namespaces that reach each other over a bridge."""

    bridge: str
    hosts: tuple[Host, ...]

    def mend(self) -> None:
        """Join all links again."""
        for host in self.hosts:
            host.mend(self.bridge)


def run(*command: str) -> None:
    """Run a command; its output is seen if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def network(count: int, rate: str | None = None) -> Iterator[Network]:
    """Make so many hosts whose interfaces send at `rate` (as tc spells it) at most, and remove them afterwards.

    Raises:
        OSError: This system does not allow it.
    """
    tag = f"{os.getpid() % 1_000_000}x{next(_numbers)}"  # names of interfaces have at most 15 characters
    hosts = [Host(name=f"flexgen-{tag}-{each}", address=f"10.77.0.{each + 1}", outside=f"fo{tag}-{each}") for each in range(count)]
    bridge = f"fb{tag}"
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for number, host in enumerate(hosts):
            inside = f"fi{tag}-{number}"
            run("ip", "netns", "add", host.name)
            run("ip", "link", "add", host.outside, "type", "veth", "peer", "name", inside)
            run("ip", "link", "set", inside, "netns", host.name)
            host.mend(bridge)
            run("ip", "link", "set", host.outside, "up")
            for command in (
                ["ip", "link", "set", inside, "name", INTERFACE],
                ["ip", "addr", "add", f"{host.address}/24", "dev", INTERFACE],
                ["ip", "link", "set", INTERFACE, "up"],
                ["ip", "link", "set", "lo", "up"],
                ["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", str(rate), "burst", "256kb", "latency", "100ms"],
            ):
                if command[0] == "ip" or rate is not None:
                    run("ip", "netns", "exec", host.name, *command)
        yield Network(bridge=bridge, hosts=tuple(hosts))
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)
