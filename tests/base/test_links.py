"""Links between machines as people write them."""

from __future__ import annotations

import pytest

from flexgen.base.quantities import format_link, parse_link
from flexgen.errors import OptionError


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("1Gbit,10ms", (1.25e8, 0.01)),
        ("10 Gbit/s, 0.1 ms", (1.25e9, 1e-4)),
        ("100mbit,100ms", (1.25e7, 0.1)),
        ("500Kbit,1s", (62_500, 1.0)),
        ("125MB/s,50us", (1.25e8, 5e-5)),
        ("1.5GiB/s,0ms", (1.5 * 2**30, 0.0)),
    ],
)
def test_links(text: str, link: tuple[float, float]) -> None:
    assert parse_link(text, name="--link") == pytest.approx(link)


@pytest.mark.parametrize(
    "text", ["", "1Gbit", "10ms", "10ms,1Gbit", "1GB,10ms", "0Gbit,1ms", "1Gbit,10", "1Gbit,1ms,2ms", "fast,10ms", "-1Gbit,1ms"]
)
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(OptionError, match=r"--link .* is not a link; write its rate and its latency, such as 1Gbit,10ms"):
        parse_link(text, name="--link")


def test_links_for_people() -> None:
    assert format_link(1.25e8, 0.01) == "1 Gbit/s, 10 ms"
    assert format_link(1.25e7, 1e-4) == "100 Mbit/s, 0.1 ms"
    assert format_link(1000, 0) == "8 Kbit/s, 0 ms"
