"""The weights of a model in a plan: where each unit lives, what it takes there, and the work of moving those that stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexgen.base.quantities import align_up
from flexgen.options import DTYPE_BYTES, WEIGHT_HOMES
from flexgen.plan.machine import has_device_tier
from flexgen.plan.model import ModelSpec, UnitSpec
from flexgen.plan.policy import HOME_ALIGNMENT, Fractions
from flexgen.plan.price.work import PassWork

# Where stored and decoded bytes differ by no more than this, only alignment differs: the unit needs views and no decode stage.
ALIGNMENT_SLACK_BYTES = 2 * 4096
# Units of at least this share of active weights are not experts (packed sizes include alignment).
WHOLE_SHARE = 0.9


def needs_decode(unit: UnitSpec) -> bool:
    """Return whether the unit's stored numbers differ from those that it computes with."""
    if unit.plain is not None:
        return not unit.plain
    return abs(unit.decoded_bytes - unit.disk_bytes) > ALIGNMENT_SLACK_BYTES


def can_stay_encoded(unit: UnitSpec) -> bool:
    """Return whether the unit takes less host memory as it is stored than in the dtype of computing."""
    return needs_decode(unit) and unit.disk_bytes < unit.decoded_bytes


def num_weights(unit: UnitSpec, dtype: str) -> float:
    """Return about how many weights a unit has: in int8 each takes a byte."""
    in_int8 = unit.int8_flops_per_token / 2
    return (unit.decoded_bytes - in_int8) / DTYPE_BYTES[dtype] + in_int8


def active_share(unit: UnitSpec, dtype: str) -> float:
    """Return the share of a unit's weights that a token passes through: 1 except for experts, which see that share of the rows."""
    in_int8 = unit.int8_flops_per_token
    if in_int8 and in_int8 == unit.flops_per_token:
        return 1.0
    share = (unit.flops_per_token - in_int8) / max(2 * num_weights(unit, dtype) - in_int8, 1)
    return 1.0 if share >= WHOLE_SHARE else float(f"{share:.3g}")


def unit_homes(spec: ModelSpec, fractions: Fractions) -> tuple[str, ...]:
    """Return the home of each unit; shares are honoured to within one unit at every depth (error diffusion over stored bytes).

    Of the units in host memory that can stay encoded, the share that does is that of `encoded` in host memory.
    """
    in_host_memory = fractions.host + fractions.encoded
    homes = _diffused(spec.units, {"device": fractions.device, "host": in_host_memory, "disk": fractions.disk})
    if not fractions.encoded:
        return tuple(homes)
    chosen = [number for number, home in enumerate(homes) if home == "host" and can_stay_encoded(spec.units[number])]
    shares = {"host": fractions.host / in_host_memory, "encoded": fractions.encoded / in_host_memory}
    for number, home in zip(chosen, _diffused([spec.units[number] for number in chosen], shares), strict=True):
        homes[number] = home
    return tuple(homes)


def _diffused(units: Sequence[UnitSpec], shares: Mapping[str, float]) -> list[str]:
    """Return a home for each unit, so that the stored bytes of all units so far are divided by these shares, to within one unit."""
    credit = {home: 0.0 for home, share in shares.items() if share > 0}
    if len(credit) == 1:
        return [*credit] * len(units)
    homes: list[str] = []
    for unit in units:
        for home in credit:
            credit[home] += shares[home] * unit.disk_bytes
        home = max(credit, key=credit.__getitem__)
        credit[home] -= unit.disk_bytes
        homes.append(home)
    return homes


def memory_bytes(unit: UnitSpec, home: str, device: str) -> int:
    """Return the bytes that a unit takes at its home: on disk as stored, in memory as it is kept there.

    That is decoded, or just as it was read (over-read included) where computing happens, and as it crosses the link in whole pages of
    the host's memory beside a device.
    """
    if home == "disk" or (home == "encoded" and needs_decode(unit)):
        return unit.disk_bytes
    if home != "device" and has_device_tier(device):
        return align_up(unit.carried_bytes, HOME_ALIGNMENT)
    return unit.decoded_bytes if needs_decode(unit) else max(unit.decoded_bytes, unit.disk_bytes)


def weight_bytes(spec: ModelSpec, homes: Sequence[str], device: str) -> dict[str, int]:
    """Return the bytes of the units per home."""
    held: dict[str, int] = dict.fromkeys(WEIGHT_HOMES, 0)
    for unit, home in zip(spec.units, homes, strict=True):
        held[home] += memory_bytes(unit, home, device)
    return held


def weights_work(spec: ModelSpec, homes: Sequence[str], device: str) -> PassWork:
    """Return the work of moving weights in every pass, whatever the pass carries.

    The host decodes before the link, unless the device decodes.
    """
    disk = link = memory = decoded = on_device = streamed = 0
    for unit, home in zip(spec.units, homes, strict=True):
        crosses = has_device_tier(device) and home != "device"
        decodes = home in ("encoded", "disk") and needs_decode(unit) and not (crosses and unit.encoded_bytes is not None)
        streamed += home == "disk" or crosses or decodes
        if home == "disk":
            disk += unit.disk_bytes
            memory += unit.disk_bytes
        if decodes:
            memory += unit.disk_bytes + unit.decoded_bytes
            decoded += unit.decoded_bytes
        if crosses:
            on_device += unit.decoded_bytes * (unit.encoded_bytes is not None)
            link += unit.carried_bytes
            memory += unit.carried_bytes
    return PassWork(
        disk_read_bytes=disk, host_to_device_bytes=link, host_memory_bytes=memory, decoded_bytes=decoded, device_decoded_bytes=on_device,
        num_streamed_units=streamed,
    )  # fmt: skip
