"""Which GPU a rank computes on: each sees its own alone, which CUDA then calls the first.  Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping

from flexgen.distributed.place import is_placed, place_of
from flexgen.errors import OptionError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def own_device(environment: Mapping[str, str], devices: str | None, num_devices: int | None = None) -> str | None:
    """Return what CUDA_VISIBLE_DEVICES must be for this process; None to leave it as it is.

    Args:
        environment: The environment.
        devices: The devices of the ranks of this machine, such as "cuda:0,cuda:1"; None if the options name none.
        num_devices: The GPUs that this process sees; None if that is not known, and then ranks without named devices share what they see.

    Raises:
        OptionError: The environment hides the device, or there are fewer names than ranks.
    """
    place = place_of(environment) if is_placed(environment) else None
    index = 0 if place is None else place.local_rank
    if devices is not None:
        names = devices.split(",")
        if index >= len(names):
            raise OptionError(f"{len(names)} devices ({devices}) for more stages on this machine: name one for each")
        return visible_name(names[index], environment)
    if place is None or place.local_size == 1 or num_devices is None or num_devices < place.local_size:
        return None
    return visible_name(f"cuda:{index}", environment)


def visible_name(device: str, environment: Mapping[str, str]) -> str | None:
    """Return the name under which CUDA_VISIBLE_DEVICES knows a device of this process; None for devices that it is not about.

    Raises:
        OptionError: The environment hides the device.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    number = int(index) if index.isdecimal() else 0
    shown = environment.get(VISIBLE)
    if shown is None:
        return str(number)
    names = [name.strip() for name in shown.split(",") if name.strip()]
    if number >= len(names):
        raise OptionError(f"device {device}: CUDA_VISIBLE_DEVICES={shown} shows {len(names)}")
    return names[number]
