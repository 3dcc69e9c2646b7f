"""Addresses of this machine: what listens is bound to one of them, never to all."""

from __future__ import annotations

import socket

import psutil

from flexgen.errors import OptionError


def address_of(interface: str) -> str:
    """Return the address of a network interface, that of IPv4 if it has one.

    Raises:
        OptionError: There is no such interface, or it has no address.
    """
    interfaces = psutil.net_if_addrs()
    if interface not in interfaces:
        raise OptionError(f"interface={interface!r}: this machine has {', '.join(sorted(interfaces))}")
    for family in (socket.AF_INET, socket.AF_INET6):
        for each in interfaces[interface]:
            if each.family == family and not each.address.lower().startswith("fe80:"):  # those are valid on one link only
                return each.address
    raise OptionError(f"interface={interface!r} has no address")


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine from which packets to a host leave, that of IPv4 if both ways lead there.

    Raises:
        OptionError: The host has no address, or there is no way to it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise OptionError(f"MASTER_ADDR={host} cannot be reached: {error.strerror or error}") from error


def listening_socket(address: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on one address of this machine.

    Args:
        address: The address.
        port: The port; 0 lets the system choose one.

    Raises:
        OptionError: Nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise OptionError(f"nothing can listen on {address}, port {port}: {error.strerror or error}") from error
    return listener
