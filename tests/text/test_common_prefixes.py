"""The prefix tree against brute force over all pairs of prompts."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flexgen.text.common_prefixes import CommonPrefixes, PrefixCensus

PAGE = 3
prompts_strategy = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=20)


def census_of(prompts: list[list[int]]) -> tuple[CommonPrefixes, list[int]]:
    census = PrefixCensus(PAGE)
    known = [census.add(prompt) for prompt in prompts]
    return census.common(), known


def shared_by_two(one: list[int], other: list[int]) -> int:
    """Whole pages that one can begin with and the other computes, in tokens: not the last token of the one."""
    pairs = zip(one[:-1], other, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))) // PAGE * PAGE


@given(prompts_strategy)
def test_what_others_share_is_found(prompts: list[list[int]]) -> None:
    common, known = census_of(prompts)
    for place, prompt in enumerate(prompts):
        others = [shared_by_two(prompt, other) for number, other in enumerate(prompts) if number != place]
        path = common.path(prompt)
        assert (path[-1].length if path else 0) == max(others, default=0)
        assert known[place] == max(others[:place], default=0), "what earlier requests have computed"
        for point in path:
            begin_so = [other for other in prompts if len(other) > point.length and other[: point.length] == prompt[: point.length]]
            assert point.num_requests == len(begin_so)
            assert len(begin_so) > 1 or prompt[: point.length] in prompts
        assert sorted({point.length for point in path}) == [point.length for point in path]


@given(prompts_strategy)
def test_points_are_where_requests_part(prompts: list[list[int]]) -> None:
    """Wherever the longest common prefix of a request ends, those that go on have a point, too."""
    common, _ = census_of(prompts)
    ends = {point[-1].digest for prompt in prompts if (point := common.path(prompt))}
    parts: dict[bytes, set[bytes]] = {}
    for prompt in prompts:
        path = common.path(prompt)
        for point, following in itertools.pairwise(path):
            parts.setdefault(point.digest, set()).add(following.digest)
    for prompt in prompts:
        for length in range(PAGE, len(prompt), PAGE):
            (*_, last) = common.path(prompt[: length + 1]) or (None,)
            if last is not None and last.length == length and last.digest in ends:
                assert last.digest in {point.digest for point in common.path(prompt)}
    for digest, following in parts.items():
        assert digest in ends or len(following) > 1, "a point at which nobody parts"


def test_an_instruction_and_its_examples() -> None:
    instruction, first, second = [1] * 7, [2] * 6, [3] * 6
    prompts = [instruction + block + [9, place] for place, block in enumerate((first, first, second, second, second))]
    common, known = census_of([*prompts, [*instruction, 5], [4] * 20])
    assert [(point.length, point.num_requests) for point in common.path(prompts[0])] == [(6, 6), (12, 2)]
    assert [(point.length, point.num_requests) for point in common.path(prompts[4])] == [(6, 6), (12, 3)]
    assert [(point.length, point.num_requests) for point in common.path([*instruction, 5])] == [(6, 6)]
    assert common.path([4] * 20) == ()
    assert known == [0, 12, 6, 12, 12, 6, 0]


def test_the_table_stays_small_and_keeps_what_is_frequent() -> None:
    """A million prompts of their own between two that share would cost memory without bound."""
    census = PrefixCensus(PAGE, max_pages=200)
    instruction = [7] * (5 * PAGE)
    for number in range(2000):
        own = [8, *(number >> bit & 1 for bit in range(11))] * 3
        census.add((instruction if number % 5 == 0 else []) + own)
        assert len(census._counts) <= 200
    common = census.common()
    path = common.path([*instruction, 0])
    assert path
    assert path[-1].length == len(instruction)


def test_thinned_out_the_table_is_still_a_tree() -> None:
    census = PrefixCensus(PAGE, max_pages=50)
    prompts = [[number >> bit & 1 for bit in range(7) for _ in range(PAGE)] for number in range(128)] * 3
    for prompt in prompts:
        census.add([*prompt, 0])
    common = census.common()
    lengths = {point.length for prompt in prompts for point in common.path([*prompt, 0])}
    on_paths = {digest for prompt in prompts for digest in _nodes(common, [*prompt, 0])}
    assert lengths
    assert on_paths == set(common.num_requests), "every node can be reached from the root"


def _nodes(common: CommonPrefixes, prompt: list[int]) -> set[bytes]:
    found = set()
    for length in range(PAGE, len(prompt), PAGE):
        path = common.path(prompt[: length + 1])
        if path and path[-1].length == length:
            found.add(path[-1].digest)
    return found
