"""KV at each home against dense attention: ragged slices of several sequences, pass after pass, layer by layer.

Layers differ in what they see (everything, a window, a chunk), in heads (grouped), caps, sinks, and one caches latents.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.devices.packed import PackedCopies
from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.staging import Staging
from flexgen.errors import StorageError
from flexgen.io.pool import IOPool
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.cache import KVCache, SequenceKV
from flexgen.kv.disk import DiskPlace
from flexgen.kv.flow import KVFlow
from flexgen.kv.format import PlainKV
from flexgen.kv.host import HostAttention, HostPlace
from flexgen.kv.link import KVLink
from flexgen.kv.linked import LinkedPlace
from flexgen.kv.local import LocalPlace
from flexgen.kv.pages import KVGroup, PagePool, group_layers, layer_index
from flexgen.kv.place import Answer, DeferredAttention, Pending, View
from flexgen.kv.plan import KVPlan
from flexgen.kv.spill import DiskPool
from flexgen.kv.tiers import Traits, traits_of
from flexgen.passes.calls import AttentionCall, FixedProjection, LatentProjection
from flexgen.passes.geometry import KVGeometry, LayerKV
from flexgen.passes.plan import Slice
from flexgen.plan.policy import Fractions
from tests.models.parity import policy

HEADS, DIM, RANK, NOPE, ROPE = 4, 8, 6, 5, 3
PAGE_TOKENS, NUM_PAGES = 4, 40
SCALING = 0.4


@dataclass(frozen=True)
class Layer:
    """One attention layer; `latent` layers cache (rank) and (rope) instead of keys and values."""

    kv_heads: int = 2
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    latent: LatentProjection | None = None

    @property
    def geometry(self) -> KVGeometry:
        heads, dims = (1, (RANK, ROPE)) if self.latent is not None else (self.kv_heads, (DIM, DIM))
        return KVGeometry(
            key_heads=heads, key_dim=dims[0], value_heads=heads, value_dim=dims[1], window=self.window, chunk=self.chunk,
            latent=self.latent is not None,
        )  # fmt: skip


GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


LAYERS = [
    Layer(),
    Layer(window=7, softcap=2.0),
    Layer(chunk=6),
    Layer(kv_heads=1, sinks=noise(HEADS)),
    Layer(latent=FixedProjection(key_up=noise(HEADS, NOPE, RANK), value_up=noise(HEADS, DIM, RANK))),
    Layer(window=1),
    Layer(),
]
KV = [LayerKV(layer=index, geometry=layer.geometry, flops_per_pair=1.0) for index, layer in enumerate(LAYERS)]
GROUPS = group_layers(KV, PAGE_TOKENS, PlainKV(torch.float64))
Groups = Sequence[KVGroup]


class Conversation:
    """A sequence: everything that its layers will ever compute, drawn in advance."""

    def __init__(self, length: int, kv: SequenceKV) -> None:
        self.kv, self.stored = kv, 0
        self.query, self.key, self.value, self.cached = [], [], [], []
        for layer in LAYERS:
            if layer.latent is None:
                key, value = noise(layer.kv_heads, length, DIM), noise(layer.kv_heads, length, DIM)
                cached = (key, value)
                query_dim = DIM
            else:
                compressed, rope = noise(1, length, RANK), noise(1, length, ROPE)
                cached = (compressed, rope)
                nope = torch.einsum("tr,hnr->htn", compressed[0], layer.latent.key_up)
                key = torch.cat([nope, rope.expand(HEADS, -1, -1)], dim=-1)
                value = torch.einsum("tr,hvr->htv", compressed[0], layer.latent.value_up)
                query_dim = NOPE + ROPE
            self.query.append(noise(HEADS, length, query_dim))
            self.key.append(key)
            self.value.append(value)
            self.cached.append(cached)

    def dense(self, index: int, start: int, length: int) -> torch.Tensor:
        """Attention of tokens [start, start + length) with everything in view: (length, heads, dim)."""
        layer, out = LAYERS[index], torch.empty(length, HEADS, DIM, dtype=torch.float64)
        repeat = HEADS // self.key[index].shape[0]
        key, value = self.key[index].repeat_interleave(repeat, 0), self.value[index].repeat_interleave(repeat, 0)
        for row, position in enumerate(range(start, start + length)):
            first = 0
            if layer.window:
                first = max(0, position - layer.window + 1)
            if layer.chunk:
                first = position // layer.chunk * layer.chunk
            scores = torch.einsum("hd,htd->ht", self.query[index][:, position], key[:, first : position + 1]) * SCALING
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            if layer.sinks is not None:
                scores = torch.cat([scores, layer.sinks[:, None]], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : position + 1 - first]
            out[row] = torch.einsum("ht,htd->hd", weights, value[:, first : position + 1])
        return out


CPU = torch.device("cpu")
Piece = tuple[Conversation, int, int]  # (sequence, start, length)


@dataclass
class Bench:
    """A place with its cache; runs passes and compares."""

    place: LocalPlace | HostPlace
    cache: KVCache
    tier: str
    close: list[Callable[[], None]] = field(default_factory=list)
    tolerance: float = 1e-9
    copies: PackedCopies = field(default_factory=lambda: PackedCopies(Staging(None)))

    @property
    def device(self) -> torch.device:
        return self.copies.device

    @property
    def traits(self) -> Traits:
        chosen = policy("cpu" if self.device == CPU else "sim", weights=Fractions(host=1), kv=Fractions(host=1), ring_bytes=0)
        return traits_of(self.tier, self.cache.groups, chosen)

    def batches(self, pieces: list[Piece], choose: random.Random) -> list[list[Piece]]:
        """Micro-batches as the place allows them: chunks one after the other, kinds apart where they must be."""
        steps = [piece for piece in pieces if as_slice(piece).is_decode]
        prompts = [piece for piece in pieces if not as_slice(piece).is_decode]
        batches: list[list[Piece]] = [[*steps, *prompts]] if self.traits.mixes else [steps, prompts]
        if self.traits.chunks and prompts and prompts[0][2] > 3:
            conversation, start, length = prompts[0]
            cut = choose.randint(1, length - 2)
            batches = [[piece for piece in batch if piece is not prompts[0]] for batch in batches]
            batches += [[(conversation, start, cut)], [(conversation, start + cut, length - cut)]]
        return [batch for batch in batches if batch]

    def run_pass(self, pieces: list[Piece], choose: random.Random) -> None:
        for conversation, start, length in pieces:
            assert self.cache.reserve(conversation.kv, start + length)
        batches = self.batches(pieces, choose)
        views = [self.place.view([as_slice(piece) for piece in batch]) for batch in batches]
        self.place.begin_pass(views)  # type: ignore[arg-type]
        for view in views:
            view.device_groups = self.copies.to_device(view.device_groups)
        for index in range(len(LAYERS)):
            answers: list[Answer] = []
            for view, batch in zip(views, batches, strict=True):
                answer = attend(view, index, batch, self.device)
                if isinstance(answer, DeferredAttention):  # later micro-batches may go on with its prompts: the sweep lets it go first
                    answers = [finished(each) for each in answers]
                    answer = ended(answer)
                answers.append(answer)
            for answer, batch in zip(answers, batches, strict=True):
                expected = torch.cat([conversation.dense(index, start, length) for conversation, start, length in batch])
                torch.testing.assert_close(finished(answer)[0].cpu(), expected, rtol=self.tolerance, atol=self.tolerance)
        self.place.finish_pass()
        for conversation, start, length in pieces:
            conversation.stored = start + length
            self.cache.trim(conversation.kv, conversation.stored)


def as_slice(piece: Piece) -> Slice:
    conversation, start, length = piece
    tables = tuple(map(tuple, conversation.kv.tables))
    return Slice(sequence=0, token_ids=(0,) * length, start=start, prompt_len=start + length, total=start + length, tables=tables)


def attend(view: View, index: int, batch: list[Piece], device: torch.device) -> Answer:
    def packed(tensors: Callable[[Conversation], torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors(each)[:, start : start + length] for each, start, length in batch], dim=1)[None].to(device)

    new = packed(lambda each: each.cached[index][0]), packed(lambda each: each.cached[index][1])
    layer = LAYERS[index]
    sinks = sinks_of(index, device)
    latent = layer.latent and FixedProjection(key_up=layer.latent.key_up.to(device), value_up=layer.latent.value_up.to(device))
    call = AttentionCall(
        layer=index, query=packed(lambda each: each.query[index]), key=packed(lambda each: each.key[index]),
        value=packed(lambda each: each.value[index]), new=new, scaling=SCALING, softcap=layer.softcap, sinks=sinks,
        window=layer.window, chunk=layer.chunk, latent=latent,
    )  # fmt: skip
    return view.attend(call)


@functools.cache
def sinks_of(index: int, device: torch.device) -> torch.Tensor | None:
    """The same tensor in every call, as in a model."""
    sinks = LAYERS[index].sinks
    return sinks.to(device) if sinks is not None else None


def ended(answer: Pending) -> Answer:
    deadline = time.monotonic() + 120
    while not answer.done():
        assert time.monotonic() < deadline, "attention never ended"
        time.sleep(0.0001)
    return answer.result()


def finished(answer: Answer) -> torch.Tensor:
    while not isinstance(answer, torch.Tensor):
        answer = ended(answer)
    return answer


def nothing() -> None:
    pass


def poisoned(size_bytes: int) -> torch.Tensor:
    return torch.full((size_bytes,), 0xFF, dtype=torch.uint8)


def open_local(folder: Path, groups: Groups = GROUPS) -> Bench:
    pool = PagePool(groups, [NUM_PAGES] * len(groups), poisoned)
    place = LocalPlace(pool, AttentionKernels())
    return Bench(place, KVCache(groups, {"host": pool}), "host")


class InPages(AttentionKernels):
    """The reference, which attends to prompts in their pages as kernels of a device do, and counts how often it does."""

    attends_in_pages = True

    def __init__(self) -> None:
        self.calls: list[int] = []  # the tokens of each

    def prefill_paged_attention(self, query: torch.Tensor, *pages: Any, **how: Any) -> None:  # type: ignore[override]
        self.calls.append(len(query))
        AttentionKernels.prefill_paged_attention(query, *pages, **how)


class OfOtherHeads(InPages):
    """The same, but not for the heads of these layers."""

    def covers_in_pages(self, query: torch.Tensor, value_dim: int) -> bool:
        assert query.ndim == 3
        assert value_dim == DIM
        return False

    def prefill_paged_attention(self, *args: Any, **how: Any) -> None:  # type: ignore[override]
        raise AssertionError("the reference would wait for a device")


def open_local_of_other_heads(folder: Path, groups: Groups = GROUPS) -> Bench:
    pool = PagePool(groups, [NUM_PAGES] * len(groups), poisoned)
    return Bench(LocalPlace(pool, OfOtherHeads()), KVCache(groups, {"host": pool}), "host")


def open_local_in_pages(folder: Path, groups: Groups = GROUPS) -> Bench:
    pool = PagePool(groups, [NUM_PAGES] * len(groups), poisoned)
    return Bench(LocalPlace(pool, InPages()), KVCache(groups, {"host": pool}), "host")


def open_gathered(folder: Path, groups: Groups = GROUPS) -> Bench:
    device = SimulatedDevice(1 << 22, max_delay_seconds=0.0001)
    pool = PagePool(groups, [NUM_PAGES] * len(groups), device.allocate)
    copies = PackedCopies(Staging(device))
    return Bench(LocalPlace(pool, GatheredKernels()), KVCache(groups, {"device": pool}), "device", [device.close], copies=copies)


def host_attention(groups: Groups, device: SimulatedDevice | None, *, overlap: bool = True, has_two: bool = False) -> HostAttention:
    flow = KVFlow.of(has_device=device is not None)
    kernels = AttentionKernels(), AttentionKernels()
    apart = AttentionKernels() if has_two else None
    return HostAttention(groups, *kernels, Staging(device), flow, nothing, "flexgen-test-attention", overlap=overlap, apart=apart)


def open_host(folder: Path, groups: Groups = GROUPS, *, overlap: bool = True) -> Bench:
    device = SimulatedDevice(1 << 20, max_delay_seconds=0.0001)
    pool = PagePool(groups, [NUM_PAGES] * len(groups), poisoned)
    place = HostPlace(pool, host_attention(groups, device, overlap=overlap, has_two=True))
    return Bench(place, KVCache(groups, {"host": pool}), "host", [device.close], copies=PackedCopies(Staging(device)))


def open_linked(folder: Path, groups: Groups = GROUPS, *, ring_bytes: int = 1 << 16) -> Bench:
    device = SimulatedDevice(1 << 21, max_delay_seconds=0.0001)
    pool = PagePool(groups, [NUM_PAGES] * len(groups), poisoned)
    link, flow = KVLink(pool, device, ring_bytes, nothing), KVFlow.of(has_device=True)
    attention = HostAttention(
        groups, AttentionKernels(), GatheredKernels(), Staging(device), flow, nothing, "flexgen-test-attention", apart=AttentionKernels()
    )
    place = LinkedPlace(pool, attention, link)
    return Bench(place, KVCache(groups, {"host": pool}), "host", [device.close], copies=PackedCopies(Staging(device)))


def open_disk(
    folder: Path, groups: Groups = GROUPS, *, device: SimulatedDevice | None = None, num_tails: int = 0, overlap: bool = True
) -> Bench:
    tail_bytes = num_tails * sum(group.page_bytes for group in groups)
    pool, io = DiskPool(groups, [NUM_PAGES] * len(groups), folder, tail_bytes=tail_bytes), IOPool(2)
    place = DiskPlace(pool, host_attention(groups, device, overlap=overlap), io, staging_bytes=4096, overlap=overlap)
    return Bench(place, KVCache(groups, {"disk": pool}), "disk", [io.close], copies=PackedCopies(Staging(device)))


def open_disk_beside_device(folder: Path, groups: Groups = GROUPS) -> Bench:
    device = SimulatedDevice(1 << 20, max_delay_seconds=0.0001)
    bench = open_disk(folder, groups, device=device)
    bench.close.append(device.close)
    return bench


def open_disk_with_tails(folder: Path, groups: Groups = GROUPS) -> Bench:
    return open_disk(folder, groups, num_tails=4)


def open_disk_with_few_tails(folder: Path, groups: Groups = GROUPS) -> Bench:
    return open_disk(folder, groups, num_tails=1)


PLACES = {
    "local": open_local,
    "local in pages": open_local_in_pages,
    "local in pages of other heads": open_local_of_other_heads,
    "gathered on a device": open_gathered,
    "host": open_host,
    "host, attended to on the device": open_linked,
    "disk": open_disk,
    "disk with tails": open_disk_with_tails,
    "disk with few tails": open_disk_with_few_tails,
    "disk beside device": open_disk_beside_device,
    "host without overlap": functools.partial(open_host, overlap=False),
    "disk without overlap": functools.partial(open_disk, overlap=False),
}


@pytest.fixture(params=list(PLACES))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = PLACES[request.param](tmp_path)
    yield bench
    bench.place.close()
    for close in bench.close:
        close()


@pytest.mark.parametrize("seed", range(3))
def test_attention_equals_dense_attention(bench: Bench, seed: int) -> None:
    converse(bench, random.Random(seed))


def converse(bench: Bench, choose: random.Random, make: type[Conversation] = Conversation) -> None:
    """Sequences join with prompts, go on by single tokens (or several at once), end, and others take their pages."""
    live: list[Conversation] = []
    for _ in range(8):
        while len(live) < 4 and choose.random() < 0.7:
            live.append(make(30, bench.cache.admit(bench.tier)))
        pieces: list[Piece] = []
        for each in live:
            wanted = choose.choice([1, 2, 5, 13]) if each.stored == 0 else choose.choice([1, 1, 1, 1, 4])
            pieces.append((each, each.stored, min(wanted, 30 - each.stored)))
        if pieces:
            bench.run_pass(pieces, choose)
        for each in [each for each in live if each.stored >= 29 or choose.random() < 0.1]:
            bench.cache.release(each.kv)
            live.remove(each)
    for each in live:
        bench.cache.release(each.kv)
    assert bench.cache.used_bytes[bench.tier] == 0


def test_pages_with_tails_are_written_once(tmp_path: Path) -> None:
    bench = open_disk(tmp_path, num_tails=2)
    conversations = [Conversation(30, bench.cache.admit("disk")) for _ in range(2)]
    io = bench.place._io  # type: ignore[attr-defined]
    for start, length in ((0, 6), *((position, 1) for position in range(6, 16))):
        bench.run_pass([(each, start, length) for each in conversations], random.Random(0))
    stored = sum(group.page_bytes // PAGE_TOKENS for group in GROUPS) * 16
    assert io.bytes_written == 2 * stored
    for each in conversations:
        bench.cache.release(each.kv)
    again = [Conversation(30, bench.cache.admit("disk")) for _ in range(3)]
    bench.run_pass([(each, 0, 5) for each in again], random.Random(0))
    tails = bench.place.pool.tails  # type: ignore[attr-defined]
    assert sum(tails.slot(0, each.kv.tables[0][1]) is not None for each in again) == 2, "slots of those that ended are free again"
    bench.place.close()
    for close in bench.close:
        close()


def test_prompts_are_attended_to_in_their_pages(tmp_path: Path) -> None:
    """All of a micro-batch at once, behind its next tokens; but in layers with latents, whose pages hold no keys."""
    bench = open_local_in_pages(tmp_path)
    conversations = [Conversation(30, bench.cache.admit("host")) for _ in range(3)]
    bench.run_pass([(conversations[0], 0, 2)], random.Random(0))
    calls = bench.place.kernels.calls  # type: ignore[union-attr]
    with_keys = sum(1 for layer in LAYERS if layer.latent is None)
    assert calls == [2] * with_keys
    bench.run_pass([(conversations[0], 2, 1), (conversations[1], 0, 2), (conversations[2], 0, 3)], random.Random(0))
    assert calls[with_keys:] == [5] * with_keys
    bench.run_pass([(each, each.stored, 1) for each in conversations], random.Random(0))
    assert len(calls) == 2 * with_keys, "next tokens alone"


def test_next_tokens_count_from_the_first_page_that_they_see() -> None:
    """So tables are as short as windows are, and pages reserved ahead are not among them."""
    plan = KVPlan(GROUPS, [Slice(sequence=0, token_ids=(1,), start=21, prompt_len=9, total=22, tables=(tuple(range(9)),) * 6)])
    place = {(group.geometry.window, group.geometry.chunk): index for index, group in enumerate(GROUPS)}
    for (window, chunk), known in {
        (None, None): (list(range(6)), 0, 22),
        (7, None): ([3, 4, 5], 3, 10),
        (None, 6): ([4, 5], 2, 6),
        (1, None): ([5], 1, 2),
    }.items():
        steps = plan.groups[place[window, chunk]].steps[0].steps
        assert (steps.tables[0].tolist(), int(steps.starts), int(steps.lengths)) == known


def test_one_past_is_held_at_a_time(tmp_path: Path) -> None:
    """Of prompts that go on, where KV is beside the computing."""
    held: list[int] = []

    class Watched(AttentionKernels):
        def gather_kv(self, *where: Any) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            found = AttentionKernels.gather_kv(*where)
            alive.append(weakref.ref(found[0]))
            held.append(sum(each() is not None for each in alive))
            return found

    alive: list[weakref.ref[torch.Tensor]] = []
    pool = PagePool(GROUPS, [NUM_PAGES] * len(GROUPS), poisoned)
    bench = Bench(LocalPlace(pool, Watched()), KVCache(GROUPS, {"host": pool}), "host")
    conversations = [Conversation(30, bench.cache.admit("host")) for _ in range(3)]
    for start, length in ((0, 8), (8, 3)):
        pieces = [(each, start, length) for each in conversations]
        for conversation, *_ in pieces:
            assert bench.cache.reserve(conversation.kv, start + length)
        view = bench.place.view([as_slice(piece) for piece in pieces])
        for index in range(len(LAYERS)):
            attend(view, index, pieces, CPU)
    assert len(held) >= 3 * len(LAYERS) - 3
    assert set(held) == {1}


def test_layers_find_their_group() -> None:
    assert layer_index(GROUPS)[6] == (0, 1)
    assert len(GROUPS) == 6


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_failing_disk_reaches_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Where it waits for attention, or at the end of the pass; and closing still works."""
    bench = open_disk(tmp_path)
    conversation = Conversation(20, bench.cache.admit("disk"))
    bench.run_pass([(conversation, 0, 9)], random.Random(0))

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StorageError, match="Input/output error"):
        bench.run_pass([(conversation, 9, 1)], random.Random(0))
    monkeypatch.undo()
    bench.place.close()
    for close in bench.close:
        close()


def test_micro_batches_may_overtake_each_other(tmp_path: Path) -> None:
    """Pages are read ahead in one order and may be wanted in another: too little staging for both must not block."""
    bench = open_disk(tmp_path)
    first, second = (Conversation(20, bench.cache.admit("disk")) for _ in range(2))
    bench.run_pass([(first, 0, 18), (second, 0, 17)], random.Random(0))
    assert isinstance(bench.place, DiskPlace)
    bench.place.read_ahead._limit_bytes = 1  # one layer of one micro-batch
    batches: list[list[Piece]] = [[(first, 18, 1)], [(second, 17, 1)]]
    for batch in batches:
        assert bench.cache.reserve(batch[0][0].kv, batch[0][1] + 1)
    views = [bench.place.view([as_slice(piece) for piece in batch]) for batch in batches]
    bench.place.begin_pass(views)  # type: ignore[arg-type]
    for index in range(len(LAYERS)):
        answers = [attend(view, index, batch, bench.device) for view, batch in zip(views[::-1], batches[::-1], strict=True)]
        for answer, batch in zip(answers, batches[::-1], strict=True):
            torch.testing.assert_close(finished(answer)[0], batch[0][0].dense(index, batch[0][1], 1), rtol=1e-9, atol=1e-9)
    bench.place.finish_pass()
    bench.place.close()
    for close in bench.close:
        close()
