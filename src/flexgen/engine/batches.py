"""From the live sequences to the micro-batches of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf

from flexgen.engine.pass_load import kv_slice
from flexgen.engine.schedule import Slice, defer_behind, defer_remainder, pack
from flexgen.engine.sequence import Sequence
from flexgen.engine.sweep import MicroBatch
from flexgen.kv.place import Place, View
from flexgen.kv.views import is_decode
from flexgen.plan.policy import Policy


def micro_batches(
    live: Iterable[Sequence], places: Mapping[str, Place], policy: Policy, make: Callable[[SequenceOf[Slice], View], MicroBatch]
) -> list[MicroBatch]:
    """What a pass computes together, each knowing which of those before it must have stored what it goes on from.

    Args:
        make: of slices, and the view of the KV that they read and write.
    """
    batches: list[MicroBatch] = []
    for home, place in places.items():
        members = [each for each in live if each.kv is not None and each.kv.home == home]
        for each in members:
            each.deferred = 0
        if place.mixes and policy.schedule == "diagonal":
            defer_remainder(members, policy.micro_batch_tokens)
        defer_behind(members, within_pass=place.chunks)
        latest: dict[Sequence, MicroBatch] = {}  # who computes a sequence's tokens in this pass; the last one, so far
        for slices in pack(members, policy.micro_batch_tokens, mix=place.mixes, chunk=place.chunks):
            slices = sorted(slices, key=lambda each: not is_decode(kv_slice(each)))
            batch = make(slices, place.view([kv_slice(each) for each in slices]))
            batch.after = {latest[each] for each in _stored_by(slices) if each in latest}
            latest.update({each.sequence: batch for each in slices})
            batches.append(batch)
    return batches


def _stored_by(slices: Iterable[Slice]) -> Iterator[Sequence]:
    """The sequences that compute, in the same pass, what these slices go on from."""
    for each in slices:
        if each.start > each.sequence.num_stored:
            yield each.sequence
        elif (writer := each.sequence.behind) is not None:
            yield writer
