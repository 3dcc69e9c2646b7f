"""Low-bit KV at every home: a query sees earlier pages as they are stored and its own page exactly, whatever the chunks and the home.

Everything is computed in float64, in which no rounding is near enough to the border of a code to matter.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexgen.kernels.codes import decode, encode
from flexgen.kv.cache import SequenceKV
from flexgen.kv.low_bit import LowBitKV, kv_format
from flexgen.kv.pages import divide_pool, group_layers, layer_index, of_positions, with_tail
from flexgen.options import KV_FORMATS
from flexgen.passes.geometry import KVGeometry, LayerKV
from tests.kv.test_places import KV, LAYERS, PAGE_TOKENS, PLACES, SCALING, Conversation, converse

LOW_BIT = [name for name in KV_FORMATS if name != "auto"]


def low_bit(name: str, dtype: torch.dtype = torch.float64) -> LowBitKV:
    found = kv_format(name, dtype)
    assert isinstance(found, LowBitKV)
    return found


def conversation_in(kv: LowBitKV) -> type[Conversation]:
    """Sequences that know what comes back from pages in a format."""

    class StoredConversation(Conversation):
        def __init__(self, length: int, sequence: SequenceKV) -> None:
            super().__init__(length, sequence)
            self.stored_key, self.stored_value = [], []
            for layer, cached in zip(LAYERS, self.cached, strict=True):
                codes = kv.key_codes(layer.geometry), kv.value_codes(layer.geometry)
                key, value = (
                    decode(*encode(numbers.transpose(0, 1), each), each, torch.float64).transpose(0, 1)
                    for numbers, each in zip(cached, codes, strict=True)
                )  # (heads, tokens, dim)
                if layer.latent is not None:
                    nope = torch.einsum("tr,hnr->htn", key[0], layer.latent.key_up)
                    key, value = (
                        torch.cat([nope, value.expand(len(nope), -1, -1)], dim=-1),
                        torch.einsum("tr,hvr->htv", key[0], layer.latent.value_up),
                    )
                self.stored_key.append(key)
                self.stored_value.append(value)

        def dense(self, index: int, start: int, length: int) -> torch.Tensor:
            layer, rows = LAYERS[index], []
            repeat = self.query[index].shape[0] // self.key[index].shape[0]
            for position in range(start, start + length):
                first, border = layer.geometry.first_visible(position), position // PAGE_TOKENS * PAGE_TOKENS
                own = slice(max(first, border), position + 1)
                key = torch.cat([self.stored_key[index][:, first:border], self.key[index][:, own]], dim=1).repeat_interleave(repeat, 0)
                value = torch.cat([self.stored_value[index][:, first:border], self.value[index][:, own]], dim=1)
                scores = torch.einsum("hd,htd->ht", self.query[index][:, position], key) * SCALING
                if layer.softcap:
                    scores = layer.softcap * torch.tanh(scores / layer.softcap)
                if layer.sinks is not None:
                    scores = torch.cat([scores, layer.sinks[:, None]], dim=1)
                weights = torch.softmax(scores, dim=1)[:, : key.shape[1]]
                rows.append(torch.einsum("ht,htd->hd", weights, value.repeat_interleave(repeat, 0)))
            return torch.stack(rows)

    return StoredConversation


@pytest.mark.matrix(9)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LOW_BIT)
def test_what_a_query_sees_depends_on_its_position_alone(name: str, place: str, seed: int, tmp_path: Path) -> None:
    kv = low_bit(name)
    bench = PLACES[place](tmp_path, group_layers(KV, PAGE_TOKENS, kv))
    try:
        converse(bench, random.Random(seed), conversation_in(kv))
    finally:
        bench.place.close()
        for close in bench.close:
            close()


@pytest.mark.parametrize(("name", "numbers"), [("int8", 128 + 128 + 16), ("k8v4", 128 + 8 + 64 + 16), ("int4", 2 * (64 + 16))])
def test_bytes_of_a_token(name: str, numbers: int) -> None:
    """A scale, and with 4 bits a least number, for 32 numbers."""
    geometry = KVGeometry(key_heads=2, key_dim=128, value_heads=2, value_dim=128)
    kv = low_bit(name)
    assert kv.key_bytes(geometry) + kv.value_bytes(geometry) == 2 * numbers


def test_latents_have_8_bits() -> None:
    latents = KVGeometry(key_heads=1, key_dim=512, value_heads=1, value_dim=64, latent=True)
    for name in LOW_BIT:
        kv = low_bit(name)
        assert (kv.key_codes(latents).bits, kv.value_codes(latents).bits, kv.key_codes(latents).rotated) == (8, 8, False)


def test_groups_of_tails_stand_behind_the_others() -> None:
    groups = group_layers(KV, PAGE_TOKENS, low_bit("int4"))
    plain = group_layers(KV, PAGE_TOKENS, kv_format("auto", torch.float64))
    assert [each.geometry for each in of_positions(groups)] == [each.geometry for each in plain]
    assert layer_index(groups) == layer_index(plain)
    for index in range(len(plain)):
        _, tail = with_tail(groups, index)
        assert groups[tail].layers == groups[index].layers
        assert [groups[tail].num_pages(tokens) for tokens in (0, 1, 500)] == [0, 1, 1]
        assert (groups[tail].first_page(400), groups[tail].num_shared(400)) == (0, 0)
        assert with_tail(plain, index) == (index,)


@pytest.mark.parametrize("num_seqs", [1, 5, 1000])
def test_pools_have_a_tail_for_each_sequence_that_fits(num_seqs: int) -> None:
    geometry = KVGeometry(key_heads=2, key_dim=64, value_heads=2, value_dim=64)
    groups = group_layers([LayerKV(layer=0, geometry=geometry, flops_per_pair=1.0)], 16, low_bit("int8", torch.bfloat16))
    pool_bytes = 300_000
    pages, tails = divide_pool(groups, pool_bytes, 100, num_seqs)
    used = pages * groups[0].page_bytes + tails * groups[1].page_bytes
    assert pool_bytes - groups[0].page_bytes < used <= pool_bytes
    assert pages >= 7, "the longest sequence fits"
    assert tails == min(num_seqs, (pool_bytes - 7 * groups[0].page_bytes) // groups[1].page_bytes)
    assert divide_pool(groups, 1000, 100, num_seqs) == [0, 0]
