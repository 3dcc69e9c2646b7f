"""Attention of one micro-batch over paged KV: where its new tokens go, what its queries see, which kernel runs.

The plan of a micro-batch is made once per pass and used by every layer.  Works on any memory that torch reaches;
waiting and copying are the business of kv_place.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flexgen.kv.cache import KVGroup
from flexgen.passes.plan import Slice

if TYPE_CHECKING:
    from flexgen.kernels.attention import AttentionKernels as Kernels
    from flexgen.models.attention import AttentionCall, LatentProjection


@dataclass(frozen=True, slots=True)
class _GroupPlan:
    """Index tensors of one layer group."""

    page_ids: torch.Tensor  # (tokens,)
    page_offsets: torch.Tensor  # (tokens,)
    tables: torch.Tensor  # (decodes, pages)
    starts: torch.Tensor  # (decodes,)
    lengths: torch.Tensor  # (decodes,)
    prefill_starts: tuple[torch.Tensor, ...]  # per prefill slice: (tokens of the slice,)


class KVPlan:
    """The index tensors of a micro-batch: its first `num_decodes` slices carry one token each, prompts follow.

    Args:
        slices: in the micro-batch's order; single tokens that have a past first.
    """

    def __init__(self, groups: Sequence[KVGroup], slices: Sequence[Slice], device: torch.device) -> None:
        self.slices = tuple(slices)
        self.num_decodes = sum(1 for each in slices if each.is_decode)
        self.num_tokens = sum(each.length for each in slices)
        assert all(each.is_decode for each in self.slices[: self.num_decodes])
        self.groups = [self._plan_group(index, group, device) for index, group in enumerate(groups)]
        self._layouts = groups

    @property
    def prefills(self) -> tuple[Slice, ...]:
        return self.slices[self.num_decodes :]

    def _plan_group(self, index: int, group: KVGroup, device: torch.device) -> _GroupPlan:
        size = group.page_tokens
        page_ids, offsets = [], []
        for each in self.slices:
            positions = range(each.start, each.start + each.length)
            table = each.tables[index]
            page_ids += [table[position // size] for position in positions]
            offsets += [position % size for position in positions]
        decodes = self.slices[: self.num_decodes]
        widest = max((len(each.tables[index]) for each in decodes), default=1)
        tables = [list(each.tables[index]) + [-1] * (widest - len(each.tables[index])) for each in decodes]
        return _GroupPlan(
            torch.tensor(page_ids, dtype=torch.int64, device=device),
            torch.tensor(offsets, dtype=torch.int64, device=device),
            torch.tensor(tables, dtype=torch.int64, device=device).view(len(decodes), widest),
            torch.tensor([group.first_visible(each.start) for each in decodes], dtype=torch.int64, device=device),
            torch.tensor([each.start + 1 for each in decodes], dtype=torch.int64, device=device),
            tuple(
                torch.tensor([group.first_visible(p) for p in range(each.start, each.start + each.length)], device=device)
                for each in self.prefills
            ),
        )

    def first_visible(self, group: int, position: int) -> int:
        return self._layouts[group].first_visible(position)


def write_new(
    kernels: Kernels, plan: KVPlan, group: int, key: torch.Tensor, value: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Scatter a micro-batch's new keys and values (1, heads, tokens, dim) to their pages."""
    where = plan.groups[group]
    kernels.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), *pages, where.page_ids, where.page_offsets)


def attend(kernels: Kernels, plan: KVPlan, group: int, call: AttentionCall, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention of all slices; their new tokens are on the pages already.

    Args:
        pages: this layer's (key_pages, value_pages), on the device of the call's tensors.

    Returns:
        (1, tokens, heads, value_dim).
    """
    out = call.query.new_empty(1, call.query.shape[2], call.query.shape[1], call.value.shape[3])
    steps = plan.num_decodes
    if steps:
        attended = attend_steps(kernels, plan, group, call, step_queries(call, steps), pages)
        out[0, :steps] = step_outputs(call, attended)
    if plan.prefills:
        past = [gather_past(kernels, plan, group, index, pages) for index in range(len(plan.prefills))]
        attend_prompts(kernels, plan, group, call, past, out)
    return out


# Next tokens in three steps, so that the middle one can run where the pages are.


def step_queries(call: AttentionCall, steps: int) -> torch.Tensor:
    """Queries (steps, heads, dim) of the next tokens; on latents the key up-projection has moved into them."""
    query = call.query[0, :, :steps].transpose(0, 1)  # (steps, heads, key_dim)
    if call.latent is None:
        return query
    nope = call.latent.key_up.shape[1]
    return torch.cat([torch.einsum("shn,hnr->shr", query[..., :nope], call.latent.key_up), query[..., nope:]], dim=-1)


def attend_steps(
    kernels: Kernels, plan: KVPlan, group: int, call: AttentionCall, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """What the next tokens see: (steps, heads, value_dim), or (steps, heads, rank) on latents."""
    where = plan.groups[group]
    if call.latent is None:
        out = query.new_empty(*query.shape[:2], call.value.shape[3])
        kernels.decode_attention(
            query, *pages, where.tables, where.starts, where.lengths,
            scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=out,
        )  # fmt: skip
        return out
    rank = call.latent.key_up.shape[2]
    out = query.new_empty(*query.shape[:2], rank)
    kernels.decode_latent_attention(
        query[..., :rank].contiguous(), query[..., rank:].contiguous(), *pages, where.tables, where.starts, where.lengths,
        scaling=call.scaling, out=out,
    )  # fmt: skip
    return out


def step_outputs(call: AttentionCall, attended: torch.Tensor) -> torch.Tensor:
    """(steps, heads, value_dim): on latents the value up-projection comes last."""
    return attended if call.latent is None else torch.einsum("shr,hvr->shv", attended, call.latent.value_up)


Past = tuple[torch.Tensor, torch.Tensor] | None  # (tokens, heads, dim) keys and values as cached


def gather_past(kernels: Kernels, plan: KVPlan, group: int, index: int, pages: tuple[torch.Tensor, torch.Tensor]) -> Past:
    """What the prompt slice `index` sees of the tokens stored before it, as cached; None for a first chunk."""
    each = plan.prefills[index]
    first = plan.first_visible(group, each.start)
    if first >= each.start:
        return None
    table = torch.tensor(each.tables[group], dtype=torch.int64, device=pages[0].device)
    return kernels.gather_kv(*pages, table, first, each.start)


def attend_prompts(kernels: Kernels, plan: KVPlan, group: int, call: AttentionCall, past: Sequence[Past], out: torch.Tensor) -> None:
    """Attention of the prompt slices into their rows of `out` (1, tokens, heads, value_dim)."""
    row = plan.num_decodes
    for index, (each, before) in enumerate(zip(plan.prefills, past, strict=True)):
        rows = slice(row, row + each.length)
        key, value = call.key[0, :, rows], call.value[0, :, rows]  # (heads, length, dim)
        starts = plan.groups[group].prefill_starts[index]
        if before is not None:
            earlier = _as_attended(call, before)
            key, value = torch.cat([earlier[0], key], dim=1), torch.cat([earlier[1], value], dim=1)
        starts = starts - min(plan.first_visible(group, each.start), each.start)
        kernels.prefill_attention(
            call.query[0, :, rows].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), starts,
            scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=out[0, rows],
        )  # fmt: skip
        row += each.length


def _as_attended(call: AttentionCall, cached: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached (tokens, heads, dim) tensors as keys and values (heads, tokens, dim)."""
    key, value = cached
    if call.latent is not None:
        return _expand(call.latent, key[:, 0], value[:, 0])
    return key.transpose(0, 1), value.transpose(0, 1)


def _expand(latent: LatentProjection, compressed: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (tokens, rank) and rotary keys (tokens, rope) as keys and values per head."""
    nope = torch.einsum("tr,hnr->htn", compressed, latent.key_up)
    key = torch.cat([nope, rope[None].expand(nope.shape[0], -1, -1)], dim=-1)
    return key, torch.einsum("tr,hvr->htv", compressed, latent.value_up)
