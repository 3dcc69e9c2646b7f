"""Byte sizes as people write them: "4GiB", "16GB", "50%"; and back again."""

from __future__ import annotations

import re

from flexgen.errors import OptionError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {
    "": 1, "B": 1,
    "K": KIB, "M": MIB, "G": GIB, "T": TIB,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


def parse_size(text: str | int, *, total_bytes: int | None = None, name: str = "") -> int:
    """Bytes meant by `text`: "4GiB" and "4G" are binary, "16GB" decimal, a bare number is bytes, "50%" is of `total_bytes`.

    Args:
        name: of the option, for messages: `--host-mem` or `host_mem=`.

    Raises:
        OptionError: when the text is no size, or a percentage of an unknown total.
    """
    if isinstance(text, int):
        return text
    said = f"{name}{text!r}" if name.endswith("=") else f"{name} {text!r}".strip()
    if match := _PERCENT.fullmatch(text):
        if total_bytes is None:
            raise OptionError(f"{said}: a percentage has no meaning here; give a size such as 4GiB or 16GB")
        share = float(match[1])
        if share > 100:
            raise OptionError(f"{said}: a share of more than 100 %")
        return int(total_bytes * share / 100)
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise OptionError(f"{said} is not a size; write 4GiB (binary), 16GB (decimal) or 50%")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_budget(text: object, *, name: str, least_bytes: int, zero: bool = True) -> None:
    """Refuse a size that nobody can mean before anything is done with it; percentages pass.

    Args:
        zero: whether 0 has a meaning.

    Raises:
        OptionError: the text is no size, or one below `least_bytes`.
    """
    if not isinstance(text, (str, int)) or isinstance(text, bool):
        raise OptionError(f"{name}={text!r} is not a size; write '4GiB' (binary), '16GB' (decimal) or '50%'")
    said = str(text)
    if _PERCENT.fullmatch(said):
        parse_size(said, total_bytes=100, name=f"{name}=")
        return
    size = parse_size(said, name=f"{name}=") if isinstance(text, str) else text
    if size == 0 and not zero:
        raise OptionError(f"{name}={said!r} leaves no memory to run in: write 4GiB (binary), 16GB (decimal) or 50%")
    if 0 < size < least_bytes or size < 0:
        number = re.split(r"[A-Za-z ]", said.strip())[0]
        unit = "GiB" if len(number) < 3 else "MiB"
        raise OptionError(
            f"{name}={said!r} is {format_size(size)}, and at least {format_size(least_bytes)} is needed: did you mean {number}{unit}? "
            "(a number without a unit is bytes)"
        )


def format_size(size_bytes: float) -> str:
    """A size for people, in binary units: 1536 -> "1.5 KiB"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes:.0f} B"


def align_up(size_bytes: int, alignment: int) -> int:
    """The least multiple of `alignment` that is at least `size_bytes`."""
    return -(-size_bytes // alignment) * alignment
