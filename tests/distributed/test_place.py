"""Places in environments, and addresses of interfaces."""

from __future__ import annotations

import socket

import pytest

from flexgen.distributed.interfaces import address_of, address_towards, listening_socket
from flexgen.distributed.place import Place, is_placed, place_of
from flexgen.errors import OptionError

ENVIRONMENT = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "alpha", "MASTER_PORT": "29500"}


def test_a_place_of_torchrun() -> None:
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert place_of({**ENVIRONMENT, **torchrun}) == Place(
        rank=3, size=4, local_rank=1, local_size=2, host="alpha", port=29500, agent_serves=True, listener=None, run="flexgen/job/2"
    )
    assert is_placed(ENVIRONMENT)
    assert not is_placed({"PATH": "/bin"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "4"}, "RANK='4'"), ({"RANK": "-1"}, "RANK='-1'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is missing"), ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)  # fmt: skip
def test_impossible_places(changes: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        place_of({**ENVIRONMENT, **changes})


def test_addresses_of_the_loopback_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    assert address_towards("localhost", 29500) == "127.0.0.1"


def test_an_unknown_interface_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"interface='eth77': this machine has .*lo"):
        address_of("eth77")


def test_a_host_that_cannot_be_reached() -> None:
    with pytest.raises(OptionError, match=r"MASTER_ADDR=nowhere\.invalid cannot be reached"):
        address_towards("nowhere.invalid", 1)


def test_a_socket_listens_on_its_address_only() -> None:
    with listening_socket("127.0.0.1") as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(OptionError, match=f"nothing can listen on 127.0.0.1, port {port}"):
            listening_socket("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)):
            pass
