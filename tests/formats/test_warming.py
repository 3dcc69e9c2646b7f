"""What is decoded before anything is planned: one row of each kind of encoding, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine_of

from flexgen import LLM, SamplingParams
from flexgen.base.parallel import Parallel, serially
from flexgen.formats.base import Encoding, EncodingPart, NumberFormat, StoredTensor
from flexgen.formats.random_numbers import encoded_as
from flexgen.formats.scaled import ScaledMatrices
from flexgen.formats.table import COMMON_CONFIGS, stated_format
from flexgen.formats.warming import smallest_of_each_kind, warm_up
from flexgen.session import prepare
from tests.formats.encoded import fp8, write_model


class Recorded(NumberFormat):
    """Remembers what it decodes."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[tuple[torch.dtype, int]], tuple[int, ...], torch.dtype]] = []

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        self.calls.append(([(part.dtype, len(part)) for part in parts], tuple(out.shape), out.dtype))


def encoding(number_format: NumberFormat, rows: int, scales: torch.dtype = torch.float32, *, by_rows: bool = True) -> Encoding:
    def stored(dtype: torch.dtype, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(name="w", path=Path("f"), offset=0, nbytes=shape[0] * shape[1] * dtype.itemsize, dtype=dtype, shape=shape)

    parts = EncodingPart(stored(torch.uint8, (rows, 8)), 1), EncodingPart(stored(scales, (rows // 2, 3)), 2)
    return Encoding(number_format, (rows, 16), parts, by_rows=by_rows)


def test_the_smallest_of_each_kind() -> None:
    one, other = Recorded(), ScaledMatrices("x", (2, 6), 8)
    small, large, bytes_of_scales = encoding(one, 4), encoding(one, 8), encoding(one, 8, torch.uint8)
    another = encoding(other, 8)
    assert smallest_of_each_kind([large, small, bytes_of_scales, another]) == (small, bytes_of_scales, another)


def test_one_row_or_the_whole() -> None:
    number_format = Recorded()
    warm_up(encoding(number_format, 4), torch.bfloat16)
    warm_up(encoding(number_format, 4, by_rows=False), torch.float32)
    assert number_format.calls == [
        ([(torch.uint8, 8), (torch.float32, 3)], (1, 16), torch.bfloat16),
        ([(torch.uint8, 32), (torch.float32, 6)], (4, 16), torch.float32),
    ]


@pytest.mark.parametrize("name", COMMON_CONFIGS)
def test_every_format_decodes_zeros(name: str) -> None:
    number_format = stated_format({"quantization_config": COMMON_CONFIGS[name]})
    assert number_format is not None
    warm_up(encoded_as(number_format, number_format.example(1 << 16)), torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_before_a_plan_is_chosen(device: str, novels_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host decodes."""
    write_model(novels_qwen3, tmp_path / "encoded", tmp_path / "dense", {"quant_method": "fp8"}, fp8((128, 128)))
    machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    monkeypatch.setattr(prepare, "cached_machine", lambda *_, **__: machine)
    decoded: list[tuple[tuple[int, ...], str]] = []
    original = ScaledMatrices.decode

    def recording(
        self: ScaledMatrices, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially
    ) -> None:
        decoded.append((tuple(out.shape), out.device.type))
        original(self, parts, start, out, parallel)

    monkeypatch.setattr(ScaledMatrices, "decode", recording)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "encoded" / name).write_bytes((novels_qwen3 / name).read_bytes())
    memory = "64MiB" if device == "sim" else None
    pins: dict[str, Any] = {"weights": "disk=1", "kv": "host=1", "max_num_seqs": 2, "micro_batch_tokens": 32, "prefill_tokens": 64}
    with LLM(tmp_path / "encoded", dtype="float32", device=device, device_mem=memory, schedule="diagonal", **pins) as llm:
        llm.generate(["Once"], SamplingParams(temperature=0, max_tokens=2))
    assert (decoded[0] == ((1, 256), "cpu")) == (device == "cpu")
    assert {place for _, place in decoded[1:]} == {device}
