"""Attention of one micro-batch over the pages of a group: where new tokens are stored, what queries see, and which kernels run.

The plan of a micro-batch is made once per pass and used by every layer.  It works on any memory that torch can access; waiting and
copying is left to the places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.kernels.prompts import PagedPrompts
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.sparse import attend_chosen, row_blocks
from flexgen.kv.format import KVPages, Steps
from flexgen.kv.sparse import SparseAttention
from flexgen.passes.calls import AttentionCall, KeyValue, LatentProjection

# (tokens, heads, dim) keys and values as cached; None for the first chunk of a prompt.  Where pages are sealed, two such pairs: those of
# sealed pages, and those of the page that the chunk goes on with.
Past = tuple[torch.Tensor, ...] | None
Heads = list[KeyValue | None]  # per prompt: what the page that it goes on with held before, (tokens, heads, dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """Index tensors of one prompt slice in one layer group.

    Attributes:
        length: The number of new tokens.
        past: (page table, first position, position after the last) of the visible tokens that were stored before; None if there are none.
        starts: The first token that each token sees, int64 (length,), counted from the first position of `past`, if any.
        sparse: What the generated tokens at its end keep, if they leave something out.
    """

    length: int
    past: tuple[torch.Tensor, int, int] | None
    starts: torch.Tensor
    sparse: SparseRows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """What generated tokens keep that are computed together with others, after a preemption or by a later run.

    Attributes:
        num_dense: The number of the slice's tokens before them.
        borders: The first position of each token's own page, int64 (tokens,), counted as the slice counts its positions.
        kept: How many positions each keeps for their scores, int64 (tokens,).
    """

    num_dense: int
    borders: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """Next tokens that are attended to alike: all that they see, or what they keep of it.

    Attributes:
        rows: Their places among the micro-batch's next tokens, int64 (rows,); None if they are all of them.
        steps: The tokens that they see.
        seen_bytes: The bytes of the values that they see in one layer.
        value_bytes: The bytes of one value of a head.
        sparse: What counts the values that are not read; None where nothing is counted.
    """

    rows: torch.Tensor | None
    steps: Steps
    seen_bytes: int = 0
    value_bytes: int = 0
    sparse: SparseAttention | None = None

    def attend(self, kernels: AttentionKernels, call: AttentionCall, query: torch.Tensor, pages: KVPages, out: torch.Tensor) -> None:
        """Write their rows of `out`, (steps, heads, dim), for the queries of all next tokens."""
        if self.rows is None:
            unread = pages.decode(kernels, call, query, self.steps, out)
        else:
            some = out.new_empty(len(self.rows), *out.shape[1:])
            unread = pages.decode(kernels, call, query[self.rows], self.steps, some)
            out[self.rows] = some
        if self.sparse is not None:
            self.sparse.count(self.seen_bytes, unread * self.value_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsAndPrompts:
    """Attention of a micro-batch in one layer group: the part that does not depend on how pages are stored.

    Next tokens are attended to in three steps (`step_queries`, `attend_steps`, `step_outputs`), so that the middle one
    can run where the pages are.

    Attributes:
        num_steps: The number of slices that are next tokens; they come first.
        steps: The next tokens, in parts that are attended to alike.
        prompts: The other slices.
    """

    num_steps: int
    steps: tuple[StepPart, ...]
    prompts: Sequence[object]

    def attend(self, kernels: AttentionKernels, call: AttentionCall, pages: KVPages, heads: Heads) -> torch.Tensor:
        """Return the attention, (1, tokens, heads, value_dim), of all slices, whose new tokens are stored already.

        The pages are on the device of the call's tensors; `heads` is what `write` returned.
        """
        out = call.new_output()
        if self.num_steps:
            attended = self.attend_steps(kernels, call, step_queries(call, self.num_steps), pages)
            out[0, : self.num_steps] = step_outputs(call, attended)
        if self.prompts and not self.attend_in_pages(kernels, call, pages, out):
            self.attend_prompts(kernels, call, self.each_past(kernels, pages, call.query.dtype, heads), out)
        return out

    def attend_in_pages(self, kernels: AttentionKernels, call: AttentionCall, pages: KVPages, out: torch.Tensor) -> bool:
        """Write the attention of the prompt slices to their rows of `out`, read from pages alone; False if that cannot be."""
        return False

    def attend_steps(self, kernels: AttentionKernels, call: AttentionCall, query: torch.Tensor, pages: KVPages) -> torch.Tensor:
        """Return the attention, (steps, heads, value_dim), of the next tokens' `step_queries`; on latents (steps, heads, rank)."""
        dim = call.value.shape[3] if call.latent is None else call.latent.key_up.shape[2]
        out = query.new_empty(*query.shape[:2], dim)
        for part in self.steps:
            part.attend(kernels, call, query, pages, out)
        return out

    def gather_past(self, kernels: AttentionKernels, pages: KVPages, dtype: torch.dtype, heads: Heads) -> list[Past]:
        """Return what `each_past` yields."""
        return list(self.each_past(kernels, pages, dtype, heads))

    def each_past(self, kernels: AttentionKernels, pages: KVPages, dtype: torch.dtype, heads: Heads) -> Iterator[Past]:
        """Yield, for each prompt slice, the visible keys and values of tokens stored before it; `heads` is what `write` returned."""
        raise NotImplementedError

    def attend_prompts(self, kernels: AttentionKernels, call: AttentionCall, past: Iterable[Past], out: torch.Tensor) -> None:
        """Write the attention of the prompt slices to their rows of `out`, (1, tokens, heads, value_dim); one past is held at a time."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan(StepsAndPrompts):
    """Index tensors of a micro-batch in one layer group, and attention by them.

    Attributes:
        page_ids: The page of each new token, int64 (tokens,).
        page_offsets: The position of each new token in its page, int64 (tokens,).
        paged: The prompt slices, for kernels that attend to all of them in their pages; None for other kernels, and with sparse attention.
    """

    page_ids: torch.Tensor
    page_offsets: torch.Tensor
    prompts: tuple[PromptPlan, ...]
    paged: PagedPrompts | None = None

    def write(self, kernels: AttentionKernels, new: KeyValue, pages: KVPages) -> Heads:
        """Store the micro-batch's new keys and values (1, heads, tokens, dim).

        Returns:
            What `gather_past` needs of the pages as they were before; nothing, unless pages are sealed.
        """
        key, value = new
        pages.write(kernels, key[0].transpose(0, 1), value[0].transpose(0, 1), self.page_ids, self.page_offsets)
        return []

    def attend_in_pages(self, kernels: AttentionKernels, call: AttentionCall, pages: KVPages, out: torch.Tensor) -> bool:
        return self.paged is not None and pages.prefill(kernels, call, self.paged, out[0, self.num_steps :])

    def each_past(self, kernels: AttentionKernels, pages: KVPages, dtype: torch.dtype, heads: Heads) -> Iterator[Past]:
        """Yield, for each prompt slice, the visible keys and values of tokens stored before it; `heads` is what `write` returned."""
        for each in self.prompts:
            yield each.past and pages.gather(kernels, *each.past, dtype)

    def attend_prompts(self, kernels: AttentionKernels, call: AttentionCall, past: Iterable[Past], out: torch.Tensor) -> None:
        """Write the attention of the prompt slices to their rows of `out`, (1, tokens, heads, value_dim); one past is held at a time."""
        row, past = self.num_steps, iter(past)
        for each in self.prompts:
            _attend_prompt(kernels, call, each, next(past), slice(row, row + each.length), out)
            row += each.length


def _attend_prompt(
    kernels: AttentionKernels, call: AttentionCall, prompt: PromptPlan, before: Past, rows: slice, out: torch.Tensor
) -> None:
    """Write the attention of one prompt slice to its rows of `out`."""
    key, value = call.key[0, :, rows], call.value[0, :, rows]  # (heads, length, dim)
    if before is not None:
        earlier = as_attended(call, (before[0], before[1]))
        key, value = torch.cat([earlier[0], key], dim=1), torch.cat([earlier[1], value], dim=1)
    query, key, value = call.query[0, :, rows].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    found, sparse = out[0, rows], prompt.sparse
    num_dense = prompt.length if sparse is None else sparse.num_dense
    if sparse is not None:
        _attend_sparse(call, query[num_dense:], key, value, prompt.starts[num_dense:], sparse, found[num_dense:])
    if num_dense:
        end = key.shape[0] - (prompt.length - num_dense)
        kernels.prefill_attention(
            query[:num_dense], key[:end], value[:end], prompt.starts[:num_dense],
            scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=found[:num_dense],
        )  # fmt: skip


def _attend_sparse(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, sparse: SparseRows,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Write the attention of the last tokens of a prompt slice, which keep a part of what they see."""
    num_queries, num_heads, num_positions = query.shape[0], query.shape[1], key.shape[0]
    positions = torch.arange(num_positions, device=key.device)
    for some in row_blocks(num_queries, num_heads, num_positions):
        places = positions[num_positions - num_queries :][some, None]
        visible = (starts[some, None] <= positions) & (positions <= places)
        own = visible & (sparse.borders[some, None] <= positions)
        out[some] = attend_chosen(
            query[some], key, value, visible, own, sparse.kept[some], scaling=call.scaling, softcap=call.softcap, sinks=call.sinks
        )


def step_queries(call: AttentionCall, steps: int) -> torch.Tensor:
    """Return the queries, (steps, heads, dim), of the next tokens; on latents the key up-projection is applied to them."""
    query = call.query[0, :, :steps].transpose(0, 1)  # (steps, heads, key_dim)
    if call.latent is None:
        return query
    nope = call.latent.key_up.shape[1]
    return torch.cat([torch.einsum("shn,hnr->shr", query[..., :nope], call.latent.key_up), query[..., nope:]], dim=-1)


def step_outputs(call: AttentionCall, attended: torch.Tensor) -> torch.Tensor:
    """Return the results, (steps, heads, value_dim); on latents the value up-projection is applied here."""
    return attended if call.latent is None else torch.einsum("shr,hvr->shv", attended, call.latent.value_up)


def as_attended(call: AttentionCall, cached: KeyValue) -> KeyValue:
    """Return cached (tokens, heads, dim) tensors as keys and values, (heads, tokens, dim)."""
    key, value = cached
    if call.latent is not None:
        return _expand(call.latent, key[:, 0], value[:, 0])
    return key.transpose(0, 1), value.transpose(0, 1)


def _expand(latent: LatentProjection, compressed: torch.Tensor, rope: torch.Tensor) -> KeyValue:
    """Expand latents (tokens, rank) and rotary keys (tokens, rope) to keys and values per head."""
    nope = torch.einsum("tr,hnr->htn", compressed, latent.key_up)
    key = torch.cat([nope, rope[None].expand(nope.shape[0], -1, -1)], dim=-1)
    return key, torch.einsum("tr,hvr->htv", compressed, latent.value_up)
