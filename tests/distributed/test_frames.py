"""Headers are checked before anything is believed; messages are as long as they may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexgen.distributed.frames import CHUNK_BYTES, END, KEEPALIVE, FrameError, Limits, announced, mark, messages_of
from flexgen.distributed.incoming import read_frame

LIMITS = Limits(header_bytes=4 << 20, tensor_bytes=8 << 20)


class Flow:
    """Messages of a list, in memory that is used again."""

    def __init__(self, messages: list[torch.Tensor]) -> None:
        self._left: Iterator[torch.Tensor] = iter(messages)
        self._memory = torch.full((CHUNK_BYTES,), 255, dtype=torch.uint8)

    def message(self) -> torch.Tensor:
        message = next(self._left)
        assert message.numel() <= CHUNK_BYTES
        self._memory[: message.numel()].copy_(message)
        return self._memory


def test_a_frame_is_put_together_again() -> None:
    tensors = [torch.arange(1_000_000), torch.zeros(0), torch.tensor(True), torch.rand(3, 5)]
    header = {"long": "é" * 500_000, "numbers": [1, -2.5, None]}
    admitted = list[int]()
    messages = [mark(KEEPALIVE), *messages_of("plan", header, tensors, LIMITS), mark(KEEPALIVE), mark(END)]
    flow = Flow(messages)
    arrived = read_frame(flow, LIMITS, admitted.append)
    assert arrived is not None
    assert (arrived.frame.kind, arrived.frame.header) == ("plan", header)
    assert all(torch.equal(one, other) for one, other in zip(arrived.frame.tensors, tensors, strict=True))
    assert admitted == [arrived.num_bytes] == [sum(message.numel() for message in messages) - 3 * mark(END).numel()]
    assert read_frame(flow, LIMITS, admitted.append) is None


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "without just header, kind, tensors"),
        ({"kind": "x", "header": {}}, "without just"),
        ({"kind": "x", "header": {}, "tensors": [], "more": 1}, "without just"),
        ({"kind": 1, "header": {}, "tensors": []}, "wrong types"),
        ({"kind": "x", "header": [], "tensors": []}, "wrong types"),
        ({"kind": "x", "header": {}, "tensors": {}}, "wrong types"),
        ({"kind": "x", "header": {}, "tensors": [["float32"]]}, "without dtype and shape"),
        ({"kind": "x", "header": {}, "tensors": [[1, [1]]]}, "without dtype and shape"),
        ({"kind": "x", "header": {}, "tensors": [["object", [1]]]}, "an unknown dtype, 'object'"),
        ({"kind": "x", "header": {}, "tensors": [["complex64", [1]]]}, "an unknown dtype"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [-1]]]}, "impossible shape"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [1.0]]]}, "impossible shape"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [True]]]}, "impossible shape"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [1] * 17]]}, "impossible shape"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [1 << 60, 0]]]}, "impossible shape"),
        ({"kind": "x", "header": {}, "tensors": [["int8", [8 << 20]], ["int8", [1]]]}, "tensors of 8.0 MiB, and at most 8.0 MiB"),
    ],
)
def test_bad_headers_are_refused(header: Any, said: str) -> None:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(FrameError, match=said):
        announced(data, LIMITS)
