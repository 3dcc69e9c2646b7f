"""How large units are: a share of the weights, and no more than what a link to a device brings in a few milliseconds."""

from __future__ import annotations

import pytest

from flexgen.base.quantities import GIB, MIB
from flexgen.formats.base import Encoding, NumberFormat
from flexgen.models.unit_size import LINK_UNIT_BYTES, default_unit_bytes


def encoding(*, carried_as_stored: bool) -> Encoding:
    number_format = NumberFormat()
    number_format.carried_as_stored = carried_as_stored
    return Encoding(number_format, (1,), ())


@pytest.mark.parametrize(
    ("weight_bytes", "unit_bytes"), [(59 * GIB, 59 * GIB // 100), (300 * GIB, GIB), (GIB, GIB // 100), (24 * MIB, MIB), (5, 1)]
)
def test_units_of_a_cpu_are_a_share_of_the_weights(weight_bytes: int, unit_bytes: int) -> None:
    assert default_unit_bytes(weight_bytes, weight_bytes, [], "cpu") == unit_bytes


@pytest.mark.parametrize("device", ["cuda", "sim"])
def test_units_cross_a_link_in_milliseconds(device: str) -> None:
    assert default_unit_bytes(59 * GIB, 59 * GIB, [], device) == LINK_UNIT_BYTES
    assert 5e-3 < LINK_UNIT_BYTES / 25e9 < 8e-3
    assert default_unit_bytes(GIB, GIB, [], device) == GIB // 100, "smaller ones stay as they are"


def test_units_that_the_device_decodes_are_as_large_on_the_link() -> None:
    assert default_unit_bytes(200 * GIB, 50 * GIB, [encoding(carried_as_stored=True)], "cuda") == 4 * LINK_UNIT_BYTES
    both = [encoding(carried_as_stored=True), encoding(carried_as_stored=False)]
    assert default_unit_bytes(200 * GIB, 50 * GIB, both, "cuda") == LINK_UNIT_BYTES, "decoded bytes cross"
