"""Differences between ranks are refused by name, with the same words on all of them."""

from __future__ import annotations

from crew import Crew

from flexgen.distributed.agreement import differences

DIFFERING = """
from flexgen.distributed.agreement import check_agreement

def body(ranks):
    facts = {"model": "m", "version of torch": "2.13.0" if ranks.rank else "2.12.0", "options": {"b": 1, "a": [1, 2]}}
    if ranks.rank == 1:
        facts["options"] = {"a": [1, 2], "b": 2}
    if SAME:
        facts = {"a": {"x": 1}, "b": 2} if ranks.rank else {"b": 2, "a": {"x": 1}}
    check_agreement(ranks, facts)
    say("agreed")

run(body)
"""


def test_all_ranks_raise_the_same_error(crew: Crew) -> None:
    crew.start(3, DIFFERING.replace("SAME", "False"))
    codes = [crew.wait(rank) for rank in range(3)]
    printed = [crew.printed(rank) for rank in range(3)]
    assert codes == [3, 3, 3], printed
    assert printed[0] == printed[1] == printed[2]
    lines = printed[0].splitlines()
    assert lines[0] == "JobError: the ranks do not agree:"
    assert lines[1].startswith('  version of torch: "2.12.0" on rank 0 (')
    assert ', "2.13.0" on rank 1 (' in lines[1]
    assert ") and rank 2 (" in lines[1]
    assert lines[2].startswith('  options: {"a": [1, 2], "b": 1} on rank 0 (')
    assert len(lines) == 3


def test_ranks_that_agree_go_on(crew: Crew) -> None:
    crew.start(3, DIFFERING.replace("SAME", "True"))
    crew.end_well()
    assert all("agreed\n" in crew.printed(rank) for rank in range(3))


def test_what_only_some_have_is_a_difference() -> None:
    assert differences([{"a": 1}, {}, {"a": 1}], ["x", "y", "z"]) == ["  a: 1 on rank 0 (x) and rank 2 (z), nothing on rank 1 (y)"]
    assert differences([{"a": 1, "b": [0]}, {"b": [0], "a": 1}], ["x", "y"]) == []
