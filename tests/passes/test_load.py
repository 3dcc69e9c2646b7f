"""What a pass carries, counted by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen.passes.geometry import KVGeometry
from flexgen.passes.load import pass_load
from flexgen.passes.plan import MicroBatch, PassPlan, Slice

PAGE_TOKENS = 4


@dataclass(frozen=True)
class Group:
    """Layers with a window, or with chunks, or with neither."""

    geometry: KVGeometry
    page_tokens: int = PAGE_TOKENS


def geometry(**reach: int) -> KVGeometry:
    return KVGeometry(key_heads=1, key_dim=4, value_heads=1, value_dim=4, **reach)


GROUPS = tuple(Group(each) for each in (geometry(), geometry(window=7), geometry(chunk=6), geometry(window=1)))


def next_token(position: int, table: tuple[int, ...] = (0, 1, 2)) -> Slice:
    return Slice(sequence=position, token_ids=(5,), start=position, prompt_len=1, total=position + 1, tables=(table,) * len(GROUPS))


def prompt(start: int, stop: int, total: int) -> Slice:
    return Slice(
        sequence=start, token_ids=(5,) * (stop - start), start=start, prompt_len=total, total=total, tables=((0, 1, 2),) * len(GROUPS)
    )


def test_what_is_attended_to() -> None:
    plan = PassPlan(micro_batches=(MicroBatch(home="host", slices=(next_token(9), prompt(0, 8, 8))),))
    load = pass_load(plan, ("host",), GROUPS)
    assert load.attended_tokens == {"host": [10, 7, 4, 1]}
    assert load.prompt_pairs == [36, 35, 24, 8]
    assert load.repeated_tokens == {}


def test_what_several_next_tokens_read() -> None:
    """At 9, 9 and 6 (pages of 4): two of the pages that they see are two sequences', one is all three's."""
    slices = tuple(next_token(start, table) for start, table in ((9, (0, 1, 2)), (9, (0, 1, 3)), (6, (0, 4))))
    plan = PassPlan(micro_batches=(MicroBatch(home="disk", slices=slices), MicroBatch(home="disk", slices=slices[:1])))
    load = pass_load(plan, ("host", "disk"), GROUPS)
    assert load.repeated_tokens["disk"][0] == 3 * PAGE_TOKENS, "within a micro-batch; the next one reads all of its own"
    assert load.repeated_tokens["disk"][3] == 0
    assert load.attended_tokens["disk"][0] == 10 + 10 + 7 + 10
    moved = PassPlan(micro_batches=tuple(replace(each, home="host") for each in plan.micro_batches))
    assert pass_load(moved, ("host", "disk"), GROUPS).repeated_tokens == {"disk": [0] * len(GROUPS)}
    assert pass_load(moved, ("host", "disk"), GROUPS, brought=("disk", "host")).repeated_tokens["host"] == load.repeated_tokens["disk"]


def test_what_is_computed_where() -> None:
    """A prompt is counted as begun where its last chunk is."""
    batches = (
        MicroBatch(home="host", slices=(next_token(9), next_token(3), prompt(0, 5, 8))),
        MicroBatch(home="host", slices=(prompt(5, 8, 8),), after=(0,)),
        MicroBatch(home="disk", slices=(prompt(0, 3, 3),)),
    )
    load = pass_load(PassPlan(micro_batches=batches), ("host", "disk"), GROUPS)
    assert load.prompt_tokens == {"host": 8, "disk": 3}
    assert load.num_prompts == {"host": 1, "disk": 1}
    assert load.earlier_tokens == {"host": [5, 5, 5, 0], "disk": [0, 0, 0, 0]}, "what a later chunk sees of the first"
    assert load.next_tokens == {"host": 2, "disk": 0}
    assert (load.num_sampled, load.num_scored) == (0, 0)


def test_what_goes_through_the_head() -> None:
    """Alternatives at one position are one row; a choice of one more token samples nothing."""
    scored = Slice(
        sequence=0, token_ids=(5,) * 8, start=0, prompt_len=8, total=8, wanted=range(8, 8), scored=(3, 4, 7, 7, 7), targets=(1,) * 5,
        tables=((0, 1, 2),) * len(GROUPS),
    )  # fmt: skip
    choice = replace(next_token(9), wanted=range(10, 10), scored=(9,), targets=(2,))
    answered = replace(next_token(8), wanted=range(8, 9))
    load = pass_load(PassPlan(micro_batches=(MicroBatch(home="host", slices=(choice, answered, scored)),)), ("host",), GROUPS)
    assert (load.num_sampled, load.num_scored) == (1, 4)
    assert (load.next_tokens, load.num_prompts) == ({"host": 2}, {"host": 1})
