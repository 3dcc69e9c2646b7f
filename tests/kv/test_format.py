"""KV formats besides plain pages of the dtype of computing: at every home, and in whole runs.

One keeps plain numbers of fewer bits, the other codes with a scale for each token and head; both only write and gather.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import KVFormat, KVPages, PlainKV, Steps
from flexgen.kv.pages import group_layers
from flexgen.models.assemble import assemble_model
from flexgen.passes.calls import AttentionCall, FixedProjection
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.policy import Fractions
from tests.kv.test_places import KV, PAGE_TOKENS, PLACES, converse
from tests.models.parity import answered, build, policy, requests_for, save
from tests.models.tiny_configs import tiny_config

SCALE_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Int8KV:
    """A byte per number, and behind those of a token and head their scale."""

    name: str = "bytes"
    tail: None = None

    def key_bytes(self, geometry: KVGeometry) -> int:
        return geometry.key_heads * (geometry.key_dim + SCALE_BYTES)

    def value_bytes(self, geometry: KVGeometry) -> int:
        return geometry.value_heads * (geometry.value_dim + SCALE_BYTES)

    def disk_slot(self, geometry: KVGeometry, page_tokens: int) -> None:
        return None

    def pages(self, keys: Tensor, values: Tensor, geometry: KVGeometry, page_tokens: int) -> Int8Pages:
        shapes = (page_tokens, geometry.key_heads, -1), (page_tokens, geometry.value_heads, -1)
        return Int8Pages(*(memory.view(len(memory), *shape) for memory, shape in zip((keys, values), shapes, strict=True)))


class Int8Pages(KVPages):
    """Both (pages, page_tokens, heads, dim + bytes of a scale)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        for memory, new in ((self.keys, key), (self.values, value)):
            scale = (new.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-9).float()
            codes = (new / scale).round().to(torch.int8)
            memory[page_ids, page_offsets] = torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)

    def gather(self, kernels: AttentionKernels, table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = (_decoded(memory, table, start, length).to(dtype) for memory in (self.keys, self.values))
        return key, value


def _decoded(memory: Tensor, table: Tensor, start: int, length: int) -> Tensor:
    positions = torch.arange(start, length)
    rows = memory[table[positions // memory.shape[1]], positions % memory.shape[1]]
    return rows[..., :-SCALE_BYTES].view(torch.int8) * rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)


FORMATS: dict[str, tuple[KVFormat, float]] = {"float32": (PlainKV(torch.float32), 1e-5), "int8": (Int8KV(), 0.2)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_near_dense_attention(name: str, place: str, tmp_path: Path) -> None:
    kv_format, tolerance = FORMATS[name]
    bench = PLACES[place](tmp_path, group_layers(KV, PAGE_TOKENS, kv_format))
    bench.tolerance = tolerance
    try:
        converse(bench, random.Random(0))
    finally:
        bench.place.close()
        for close in bench.close:
            close()


@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latents"])
def test_pages_without_a_kernel_decode_as_those_with_one(latent: bool) -> None:
    """Next tokens through `gather` and through the kernels, in the same dtype."""
    torch.manual_seed(0)
    heads, dim, value_dim, tokens = (1, 6, 3, 11) if latent else (2, 8, 5, 11)
    geometry = KVGeometry(key_heads=heads, key_dim=dim, value_heads=heads, value_dim=value_dim)
    kv_format = PlainKV(torch.float32)
    memory = (torch.zeros(3, 4 * size, dtype=torch.uint8) for size in (kv_format.key_bytes(geometry), kv_format.value_bytes(geometry)))
    pages = kv_format.pages(*memory, geometry, 4)
    projection = FixedProjection(key_up=torch.empty(4, 2, dim), value_up=torch.empty(4, value_dim, dim)) if latent else None
    query = torch.randn(2, 4, dim + value_dim if latent else dim)
    empty = torch.empty(0)
    call = AttentionCall(layer=0, query=empty, key=empty, value=empty, scaling=0.3, latent=projection)
    call = call if latent else replace(call, softcap=2.0, sinks=torch.randn(4))
    steps = Steps(tables=torch.tensor([[2, 0, 1], [0, 2, 1]]), starts=torch.tensor([0, 3]), lengths=torch.tensor([11, 6]))
    with CpuKernels(1) as kernels:
        where = torch.tensor([2, 0, 1]).repeat_interleave(4)[:tokens], torch.arange(tokens) % 4
        pages.write(kernels, torch.randn(tokens, heads, dim), torch.randn(tokens, heads, value_dim), *where)
        own, general = torch.empty(2, 4, dim if latent else value_dim), torch.empty(2, 4, dim if latent else value_dim)
        pages.decode(kernels, call, query, steps, own)
        KVPages.decode(pages, kernels, call, query, steps, general)
    torch.testing.assert_close(own, general)


@pytest.mark.parametrize(("kv_format", "tolerance"), [(PlainKV(torch.float16), 0.1), (Int8KV(), 1.0)], ids=["float16", "int8"])
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_run_with_another_format(
    model_type: str, kv_format: KVFormat, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host and on disk: the plan counts the format's bytes, and the first token that reads them has near logits.

    Logits of tokens that see something else are off by seven and more.
    """
    config = tiny_config(model_type)
    save(build(config), tmp_path)
    plain = assemble_model(tmp_path, config, torch.float32)
    model = assemble_model(tmp_path, config, torch.float32, kv_format=kv_format)
    geometries = [layer.geometry for layer in model.layers]
    assert model.spec.kv_bytes_per_token == sum(kv_format.key_bytes(each) + kv_format.value_bytes(each) for each in geometries)
    assert model.spec.kv_bytes_per_token < plain.spec.kv_bytes_per_token
    requests = requests_for(model.spec.vocab_size)
    chosen = policy(weights=Fractions(host=1), kv=Fractions(host=0.5, disk=0.5), ring_bytes=1 << 20)
    wanted = answered(plain, chosen, requests, monkeypatch, tmp_path)
    monkeypatch.undo()
    got = answered(model, chosen, requests, monkeypatch, tmp_path)
    for index, logits in wanted.logits.items():
        assert got.tokens[index][0] == wanted.tokens[index][0]
        torch.testing.assert_close(got.logits[index][:2], logits[:2], rtol=0, atol=tolerance)
        assert not torch.equal(got.logits[index][1], logits[1]), "read from plain pages"
