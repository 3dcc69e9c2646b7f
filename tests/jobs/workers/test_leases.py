"""Leases as values: every line is in one range, ranges shrink, what a dead worker had is offered again, and a line that kills is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexgen.jobs.workers.leases import PARTS, Claim, Fate, Lease, Ledger, Offer


def claim(ledger: Ledger, offer: Offer, worker: str) -> None:
    lease = offer.lease
    ledger.note_claim(lease.depth, lease.start, offer.attempt, Claim(worker=worker, stop=lease.stop))


@given(num_lines=st.integers(1, 5000), room=st.integers(1, 300), workers=st.integers(1, 9))
def test_ranges_follow_each_other_and_shrink_towards_the_end(num_lines: int, room: int, workers: int) -> None:
    ledger, sizes = Ledger(num_lines), []
    while (lease := ledger.next_lease(room, workers)) is not None:
        assert lease.start == sum(sizes)
        sizes.append(len(lease))
        claim(ledger, Offer(lease=lease), "a")
    assert sum(sizes) == num_lines
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert len(sizes) < 4096 + 64 * workers or room < num_lines // 4096


def test_a_long_job_has_few_leases() -> None:
    ledger, count = Ledger(1_000_000), 0
    while (lease := ledger.next_lease(4, 2)) is not None:
        claim(ledger, Offer(lease=lease), "a")
        count += 1
    assert count < 4200


@given(st.integers(2, 10_000))
def test_parts_are_the_lines_of_their_range(size: int) -> None:
    lease = Lease(depth=0, start=7, stop=7 + size)
    parts = lease.parts()
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(7, 7 + size))
    assert 2 <= len(parts) <= PARTS
    assert max(map(len, parts)) < size
    assert len({part.name for part in [lease, *parts]}) == 1 + len(parts)


def test_what_a_worker_left_is_offered_again_and_what_it_holds_is_not() -> None:
    fates = {"alive": Fate.ALIVE, "stopped": Fate.RELEASED, "dead": Fate.DEAD}
    ledger = Ledger(30)
    for start, worker in ((0, "alive"), (10, "stopped"), (20, "dead")):
        ledger.note_claim(0, start, 1, Claim(worker=worker, stop=start + 10))
    found = {offer.lease.start: offer for offer in ledger.offers(fates.__getitem__)}
    assert {start: (offer.attempt, offer.deaths, offer.earlier) for start, offer in found.items()} == {
        10: (2, 0, ("stopped",)),
        20: (2, 1, ("dead",)),
    }
    assert not ledger.is_over
    claim(ledger, found[20], "alive")
    assert [offer.lease.start for offer in ledger.offers(fates.__getitem__)] == [10]
    for start in (0, 10, 20):
        ledger.note_done(0, start)
    assert ledger.is_over


def test_a_worker_that_was_given_up_and_lives_counts_as_a_death_but_one_that_was_stopped_does_not() -> None:
    ledger = Ledger(1)
    for attempt, worker in enumerate(("woken", "stopped", "dead"), 1):
        ledger.note_claim(0, 0, attempt, Claim(worker=worker, stop=1))
    fates = {"woken": Fate.ALIVE, "stopped": Fate.RELEASED, "dead": Fate.DEAD}
    (offer,) = ledger.offers(fates.__getitem__)
    assert (offer.deaths, offer.attempt, offer.alone, offer.hopeless) == (2, 4, True, False)


def finish(num_lines: int, is_deadly: Callable[[int], bool], *, room: int = 50, attempts: int = 3) -> tuple[set[int], int, set[int]]:
    """(lines with an error, number of deaths, answered lines) of one worker after another, each of which dies if it has a deadly line."""
    ledger, fates, refused, deaths, answered = Ledger(num_lines, attempts), dict[str, Fate](), set[int](), 0, set[int]()
    while not ledger.is_over:
        worker = f"w{deaths}"
        fates.setdefault(worker, Fate.ALIVE)
        offers = sorted(ledger.offers(fates.__getitem__), key=lambda offer: offer.alone)
        new = ledger.next_lease(room, 1)
        offer = offers[0] if offers and not offers[0].alone else Offer(lease=new) if new is not None else offers[0]
        claim(ledger, offer, worker)
        lines = range(offer.lease.start, offer.lease.stop)
        if offer.hopeless:
            refused.update(lines)
        elif any(is_deadly(line) for line in lines):
            fates[worker] = Fate.DEAD
            deaths += 1
            continue
        else:
            answered.update(lines)
        ledger.note_done(offer.lease.depth, offer.lease.start)
    return refused, deaths, answered


@settings(max_examples=60)
@given(num_lines=st.integers(1, 400), deadly=st.sets(st.integers(0, 399), max_size=4), attempts=st.integers(2, 5))
def test_a_line_that_kills_ends_in_an_error_and_no_other_line_does(num_lines: int, deadly: set[int], attempts: int) -> None:
    deadly = {line for line in deadly if line < num_lines}
    refused, deaths, answered = finish(num_lines, deadly.__contains__, attempts=attempts)
    assert refused == deadly
    assert answered == set(range(num_lines)) - deadly
    assert deaths <= len(deadly) * (attempts + 3)  # 50 lines, 7 and 1 after the attempts at the whole


def test_a_single_line_dies_as_often_as_it_may() -> None:
    assert finish(1, lambda line: True) == ({0}, 3, set())


class Workers(RuleBasedStateMachine):
    """Workers whose views of each other differ: no line may be left out, whatever they believe."""

    @initialize(num_lines=st.integers(1, 60))
    def begin(self, num_lines: int) -> None:
        self.num_lines = num_lines
        self.files: dict[str, Claim] = {}
        self.done: set[tuple[int, int]] = set()
        self.lines_done: set[int] = set()
        self.ledgers: dict[str, Ledger] = {}
        self.held: dict[str, list[Lease]] = {}
        self.dead: set[str] = set()
        self.count = 0

    def _ledger(self, worker: str, *, misses: int = 0) -> Ledger:
        """What a worker has read, which may lack the last files."""
        ledger = self.ledgers.setdefault(worker, Ledger(self.num_lines))
        for name, each in list(self.files.items())[: len(self.files) - misses]:
            head, _, attempt = name.partition(".")
            depth, _, start = head.partition("-")
            ledger.note_claim(int(depth), int(start), int(attempt), each)
        for key in self.done:
            ledger.note_done(*key)
        return ledger

    @rule()
    def join(self) -> None:
        self.count += 1
        self.held[f"w{self.count}"] = []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), room=st.integers(1, 20), misses=st.integers(0, 3), doubts=st.booleans())
    def take(self, data: st.DataObject, room: int, misses: int, doubts: bool) -> None:
        """A claim by a worker that may take others for dead although they live."""
        worker = data.draw(st.sampled_from(sorted(self.held)))
        ledger = self._ledger(worker, misses=min(misses, len(self.files)))
        taken_for_dead = {each for each in self.held if doubts and each != worker} | self.dead
        offers = list(ledger.offers(lambda each: Fate.DEAD if each in taken_for_dead else Fate.ALIVE))
        new = ledger.next_lease(room, len(self.held))
        offers += [Offer(lease=new)] if new is not None else []
        if offers:
            offer = data.draw(st.sampled_from(offers))
            name = f"{offer.lease.name}.{offer.attempt}"
            if name not in self.files:  # what a link decides
                self.files[name] = Claim(worker=worker, stop=offer.lease.stop)
                self.held[worker].append(offer.lease)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(each for each, leases in self.held.items() if leases)))
        lease = self.held[worker].pop()
        self.lines_done.update(range(lease.start, lease.stop))
        self.done.add((lease.depth, lease.start))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[worker]
        self.dead.add(worker)

    @invariant()
    def over_means_that_all_is_done(self) -> None:
        if self.num_lines and self._ledger("watcher").is_over:
            assert self.lines_done == set(range(self.num_lines))

    def teardown(self) -> None:
        """Whatever has happened, one worker that lives can finish."""
        if not self.count:
            return
        for _ in range(20 * self.num_lines + 200):
            ledger = self._ledger("last")
            if ledger.is_over:
                break
            offers = list(ledger.offers(lambda worker: Fate.DEAD))
            new = ledger.next_lease(10, 1)
            offer = offers[0] if offers else Offer(lease=new) if new is not None else pytest.fail("nothing to do, and not over")
            self.files[f"{offer.lease.name}.{offer.attempt}"] = Claim(worker="last", stop=offer.lease.stop)
            self.lines_done.update(range(offer.lease.start, offer.lease.stop))
            self.done.add((offer.lease.depth, offer.lease.start))
        assert self.lines_done == set(range(self.num_lines))


Workers.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestWorkers = Workers.TestCase
