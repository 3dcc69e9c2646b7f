"""Builds the plan of the next pass from the live sequences: which tokens it computes, and which of them together.  Uses no tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from flexgen.engine.sequence import LiveSequence
from flexgen.kv.tiers import Traits
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Policy

SMALL_REMAINDER = 0.375  # as a fraction of a micro-batch
FEW_ROWS = 256  # up to this many rows, odd row counts cost nothing


def plan_pass(live: Collection[LiveSequence], traits: Mapping[str, Traits], policy: Policy) -> PassPlan:
    """Return the plan of the next pass.

    Args:
        live: The live sequences, oldest first.
        traits: For each home, what may be computed together of its sequences.
        policy: The policy.
    """
    batches: list[MicroBatch] = []
    for home, of_home in traits.items():
        members = [each for each in live if each.kv is not None and each.kv.home == home]
        for each in members:
            each.deferred = 0
        if of_home.mixes and policy.schedule == "diagonal":
            defer_remainder(members, policy.micro_batch_tokens)
        defer_behind(members, within_pass=of_home.chunks)
        by_id = {each.id: each for each in members}
        latest: dict[int, int] = {}  # sequence -> the last micro-batch so far that computes its tokens
        for slices in pack(members, policy.micro_batch_tokens, mix=of_home.mixes, chunk=of_home.chunks, share=of_home.share_of_batch):
            slices.sort(key=lambda each: not each.is_decode)
            after = {latest[each] for each in _stored_by(slices, by_id) if each in latest}
            latest.update((each.sequence, len(batches)) for each in slices)
            filler = _odd_row(slices) if policy.device == "cpu" else 0
            batches.append(MicroBatch(home=home, slices=tuple(slices), after=tuple(sorted(after)), filler=filler))
    return PassPlan(micro_batches=tuple(batches))


def _stored_by(slices: Iterable[Slice], by_id: Mapping[int, LiveSequence]) -> Iterator[int]:
    """Yield the ids of the sequences that compute, in the same pass, the KV that these slices continue from."""
    for each in slices:
        sequence = by_id[each.sequence]
        if each.start > sequence.num_stored:
            yield each.sequence
        elif (writer := sequence.behind) is not None:
            yield writer.id


def _odd_row(slices: Iterable[Slice]) -> int:
    num_tokens = sum(each.length for each in slices)
    return num_tokens % 2 if num_tokens > FEW_ROWS else 0


def defer_remainder(sequences: Sequence[LiveSequence], rows: int) -> None:
    """Defer a small remainder of prompt tokens, so that the tokens of a pass are a multiple of `rows`.

    A micro-batch of few rows is computed at a fraction of the rate of a full one (docs/log.md).  The youngest
    prompts are deferred first; a pass never gets fewer than `rows` tokens.

    Args:
        sequences: The sequences of one home, oldest first, with nothing deferred yet; their `deferred` is set.
        rows: The tokens of a full micro-batch.
    """
    total = sum(sequence.num_new for sequence in sequences)
    of_prompts = sum(sequence.num_new for sequence in sequences if sequence.num_new > 1)
    excess = total % rows
    if total < rows or excess > min(SMALL_REMAINDER * rows, of_prompts):
        return
    for sequence in reversed(sequences):
        if excess and sequence.num_new > 1:
            sequence.deferred = min(excess, sequence.num_new)
            excess -= sequence.deferred


def defer_behind(sequences: Sequence[LiveSequence], *, within_pass: bool) -> None:
    """Defer prompts that begin with a prefix that will not be stored in time.

    Args:
        sequences: The sequences of one home, oldest first; their `deferred` is set.
        within_pass: Whether a prefix that this pass computes is available to later micro-batches of the pass.
    """
    for sequence in sequences:
        writer, source = sequence.behind, sequence.source
        if writer is not None and source is not None and (not within_pass or len(writer.tokens) - writer.deferred < source.length):
            sequence.deferred = sequence.num_new


def pack(
    sequences: Sequence[LiveSequence], micro_batch_tokens: int, *, mix: bool, chunk: bool = True,
    share: Callable[[int], float] = lambda position: 0.0,
) -> list[list[Slice]]:  # fmt: skip
    """Return the micro-batches of one pass: next tokens first, then prompts, long prompts in consecutive chunks.

    Micro-batches that mix both are filled to the last row, even if that cuts a prompt; others cut only prompts that are longer than a
    micro-batch.  Next tokens of sequences that depend on a prompt of this pass come last.

    Args:
        sequences: The sequences of one home.
        micro_batch_tokens: The tokens of a full micro-batch.
        mix: Whether next tokens and prompts may share a micro-batch.
        chunk: Whether a prompt may be cut; otherwise a long prompt is a micro-batch of its own, however large.
        share: A function from the position of a next token to the share of a micro-batch that it takes by what it sees.
    """
    steps = [s for s in sequences if s.num_new == 1 and s.num_stored > 0]
    prompts = [s for s in sequences if not (s.num_new == 1 and s.num_stored > 0)]
    batches = _next_tokens([s for s in steps if s.behind is None], micro_batch_tokens, share)
    room = micro_batch_tokens - len(batches[-1]) if batches and mix else 0
    for sequence in prompts:
        start, stop = sequence.num_stored, len(sequence.tokens) - sequence.deferred
        if not (mix and chunk) and stop - start > room and room < micro_batch_tokens:
            batches.append([])
            room = micro_batch_tokens
        while start < stop:
            if room == 0:
                batches.append([])
                room = micro_batch_tokens
            length = min(stop - start, room) if chunk else stop - start
            batches[-1].append(_slice(sequence, start, start + length))
            start, room = start + length, max(room - length, 0)
            if length == 1 and batches[-1][-1].start > 0 and not mix:
                room = 0  # a last chunk of one token is computed like a next token
    return batches + _next_tokens([s for s in steps if s.behind is not None and not s.deferred], micro_batch_tokens, share)


def _next_tokens(sequences: Sequence[LiveSequence], micro_batch_tokens: int, share: Callable[[int], float]) -> list[list[Slice]]:
    """Return micro-batches of sequences that compute one token each."""
    batches: list[list[Slice]] = []
    taken = 0.0
    for each in sequences:
        taken += share(each.num_stored)
        if not batches or len(batches[-1]) == micro_batch_tokens or taken > 1:
            batches.append([])
            taken = share(each.num_stored)
        batches[-1].append(_slice(each, each.num_stored, each.num_stored + 1))
    return batches


def _slice(sequence: LiveSequence, start: int, stop: int) -> Slice:
    """Return tokens [start, stop) of a sequence as a slice.

    The logits after the sequence's last token are wanted if its answer goes on, and scores before the tokens of a prompt that is scored.
    """
    total, request = len(sequence.tokens), sequence.request
    scored = list(sequence.scored(start, stop))
    return Slice(
        sequence=sequence.id,
        token_ids=tuple(sequence.tokens[start:stop]),
        start=start,
        prompt_len=sequence.prompt_len,
        total=total,
        wanted=range(total - 1 if stop == total and request.max_tokens else total, total),
        scored=tuple(position for position, _ in scored),
        targets=tuple(target for _, target in scored),
        num_likeliest=request.num_prompt_logprobs or 0,
        tables=tuple(map(tuple, sequence.kv.tables)) if sequence.kv is not None else (),
    )
