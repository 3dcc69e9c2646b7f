"""How large the units are that a model is cut into, where nobody says."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen.base.quantities import GIB, MIB
from flexgen.formats.base import Encoding
from flexgen.plan.machine import has_device_tier

SMALLEST_UNIT_BYTES = 8 * MIB
# A link of 20 to 34 GB/s brings so much in 5 to 8 ms: a small part of a layer's time, and many times what a unit costs apart from that.
LINK_UNIT_BYTES = 160 * MIB


def may_be_cut_smaller(weight_bytes: int, device: str) -> bool:
    """Return whether weights with so many decoded bytes may have smaller units on this device than on a CPU."""
    return has_device_tier(device) and weight_bytes // 100 > LINK_UNIT_BYTES


def default_unit_bytes(weight_bytes: int, stored_bytes: int, encodings: Iterable[Encoding], device: str) -> int:
    """Return the decoded bytes of a unit.

    It is 1 % of the weights, within [8 MiB, 1 GiB], or what a link to a device brings in a few milliseconds; small models are still cut
    into a few dozen units, decoded ones into more.

    Args:
        weight_bytes: The decoded bytes of all units.
        stored_bytes: Their bytes as stored.
        encodings: The tensors that are stored in a number format.
        device: Where the model is computed.
    """
    most = GIB
    if has_device_tier(device):
        device_decodes = all(encoding.format.carried_as_stored for encoding in encodings)
        most = int(LINK_UNIT_BYTES * max(weight_bytes / max(stored_bytes, 1), 1.0)) if device_decodes else LINK_UNIT_BYTES
    return max(min(weight_bytes // 100, most), min(SMALLEST_UNIT_BYTES, weight_bytes // 24, stored_bytes // 24), 1)
