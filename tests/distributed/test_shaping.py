"""What an artificial link is written as, and when frames are through it."""

from __future__ import annotations

import pytest

from flexgen.distributed.shaping import LinkShape, Shaper, parse_link
from flexgen.errors import OptionError


@pytest.mark.parametrize(
    ("text", "latency", "rate"),
    [("10ms,1Gbit", 0.01, 125e6), ("1Gbit, 10 ms", 0.01, 125e6), ("250us", 250e-6, float("inf")), ("2.5Mbit", 0.0, 312_500.0)],
)
def test_links(text: str, latency: float, rate: float) -> None:
    assert parse_link(text) == LinkShape(latency_seconds=latency, bytes_per_s=rate)


@pytest.mark.parametrize("text", ["", "fast", "10", "1GB", "0Gbit", "10ms;1Gbit", "-1ms"])
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(OptionError, match="write a latency"):
        parse_link(text)


def test_frames_enter_one_after_the_other_and_arrive_a_latency_later() -> None:
    shaper = Shaper(LinkShape(latency_seconds=0.5, bytes_per_s=100.0))
    assert [shaper.due(100, 10.0), shaper.due(200, 10.0), shaper.due(100, 10.5)] == [11.5, 13.5, 14.5]
    assert shaper.due(100, 20.0) == 21.5  # what was not used before is gone
