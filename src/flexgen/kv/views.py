"""Attention of one micro-batch over pages: where its new tokens are stored, which tokens its queries see, and which kernels run.

The plan of a micro-batch is made once per pass and used by every layer.  It works on any memory that torch can access; waiting and
copying is left to the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import KVPages, Steps
from flexgen.kv.pages import KVGroup
from flexgen.passes.calls import AttentionCall, KeyValue, LatentProjection
from flexgen.passes.plan import Slice

Past = KeyValue | None  # (tokens, heads, dim) keys and values as cached; None for the first chunk of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """Index tensors of one prompt slice in one layer group.

    Attributes:
        length: The number of new tokens.
        past: (page table, first position, position after the last) of the visible tokens that were stored before; None if there are none.
        starts: The first token that each token sees, int64 (length,), counted from the first position of `past`, if any.
    """

    length: int
    past: tuple[torch.Tensor, int, int] | None
    starts: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Index tensors of a micro-batch in one layer group, and attention by them.

    Next tokens are attended to in three steps (`step_queries`, `attend_steps`, `step_outputs`), so that the middle one
    can run where the pages are.

    Attributes:
        page_ids: The page of each new token, int64 (tokens,).
        page_offsets: The position of each new token in its page, int64 (tokens,).
        num_steps: The number of slices that are next tokens; they come first.
        steps: The tokens that the next tokens see.
        prompts: The other slices.
    """

    page_ids: torch.Tensor
    page_offsets: torch.Tensor
    num_steps: int
    steps: Steps
    prompts: tuple[PromptPlan, ...]

    def write(self, kernels: AttentionKernels, new: KeyValue, pages: KVPages) -> None:
        """Store the micro-batch's new keys and values (1, heads, tokens, dim)."""
        key, value = new
        pages.write(kernels, key[0].transpose(0, 1), value[0].transpose(0, 1), self.page_ids, self.page_offsets)

    def attend(self, kernels: AttentionKernels, call: AttentionCall, pages: KVPages) -> torch.Tensor:
        """Return the attention, (1, tokens, heads, value_dim), of all slices, whose new tokens are stored already.

        The pages are on the device of the call's tensors.
        """
        out = call.new_output()
        if self.num_steps:
            attended = self.attend_steps(kernels, call, step_queries(call, self.num_steps), pages)
            out[0, : self.num_steps] = step_outputs(call, attended)
        if self.prompts:
            self.attend_prompts(kernels, call, self.gather_past(kernels, pages, call.query.dtype), out)
        return out

    def attend_steps(self, kernels: AttentionKernels, call: AttentionCall, query: torch.Tensor, pages: KVPages) -> torch.Tensor:
        """Return the attention, (steps, heads, value_dim), of the next tokens' `step_queries`; on latents (steps, heads, rank)."""
        dim = call.value.shape[3] if call.latent is None else call.latent.key_up.shape[2]
        out = query.new_empty(*query.shape[:2], dim)
        pages.decode(kernels, call, query, self.steps, out)
        return out

    def gather_past(self, kernels: AttentionKernels, pages: KVPages, dtype: torch.dtype) -> list[Past]:
        """Return, for each prompt slice, the visible keys and values of tokens stored before it."""
        return [each.past and pages.gather(kernels, *each.past, dtype) for each in self.prompts]

    def attend_prompts(self, kernels: AttentionKernels, call: AttentionCall, past: Sequence[Past], out: torch.Tensor) -> None:
        """Write the attention of the prompt slices to their rows of `out`, (1, tokens, heads, value_dim)."""
        row = self.num_steps
        for each, before in zip(self.prompts, past, strict=True):
            rows = slice(row, row + each.length)
            key, value = call.key[0, :, rows], call.value[0, :, rows]  # (heads, length, dim)
            if before is not None:
                earlier = _as_attended(call, before)
                key, value = torch.cat([earlier[0], key], dim=1), torch.cat([earlier[1], value], dim=1)
            kernels.prefill_attention(
                call.query[0, :, rows].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), each.starts,
                scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=out[0, rows],
            )  # fmt: skip
            row += each.length


class KVPlan:
    """The index tensors of a micro-batch.

    Args:
        groups: The layer groups.
        slices: The slices in the order of the micro-batch, next tokens before prompts.
        device: The device of the index tensors.

    Attributes:
        slices: All slices.
        steps: The slices that are next tokens.
        prompts: The other slices.
        groups: The index tensors of each group.
    """

    def __init__(self, groups: Sequence[KVGroup], slices: Sequence[Slice], device: torch.device) -> None:
        num_steps = sum(1 for each in slices if each.is_decode)
        self.slices, self.steps, self.prompts = tuple(slices), tuple(slices[:num_steps]), tuple(slices[num_steps:])
        assert all(each.is_decode for each in self.steps)
        self.groups = [self._plan_group(index, group, device) for index, group in enumerate(groups)]

    def _plan_group(self, index: int, group: KVGroup, device: torch.device) -> GroupPlan:
        def integers(values: Sequence[object]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        size, first_visible = group.page_tokens, group.geometry.first_visible
        page_ids, offsets = [], []
        for each in self.slices:
            positions = range(each.start, each.start + each.length)
            table = each.tables[index]
            page_ids += [table[position // size] for position in positions]
            offsets += [position % size for position in positions]
        widest = max((len(each.tables[index]) for each in self.steps), default=1)
        tables = [list(each.tables[index]) + [-1] * (widest - len(each.tables[index])) for each in self.steps]
        prompts = []
        for each in self.prompts:
            first = min(first_visible(each.start), each.start)
            past = (integers(each.tables[index]), first, each.start) if first < each.start else None
            starts = [first_visible(position) - first for position in range(each.start, each.start + each.length)]
            prompts.append(PromptPlan(length=each.length, past=past, starts=integers(starts)))
        return GroupPlan(
            page_ids=integers(page_ids),
            page_offsets=integers(offsets),
            num_steps=len(self.steps),
            steps=Steps(
                tables=integers(tables).view(len(self.steps), widest),
                starts=integers([first_visible(each.start) for each in self.steps]),
                lengths=integers([each.start + 1 for each in self.steps]),
            ),
            prompts=tuple(prompts),
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


def _as_attended(call: AttentionCall, cached: KeyValue) -> KeyValue:
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
