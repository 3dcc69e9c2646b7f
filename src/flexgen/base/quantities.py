"""Byte sizes ("4GiB", "50%"), durations ("90s", "1h30m") and links ("1Gbit,10ms") as people write them, and back again."""

from __future__ import annotations

import re

from flexgen.base.scalars import in_python
from flexgen.errors import OptionError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_MOST_BYTES = 1 << 63

_UNITS = {
    "": 1, "B": 1,
    "K": KIB, "M": MIB, "G": GIB, "T": TIB,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SIZE = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*")
_PERCENT = re.compile(rf"\s*{_NUMBER}\s*%\s*")
_PLAIN = re.compile(_NUMBER)
_TIMES = (("d(?:ays?)?", 86400.0), ("h(?:ours?|rs?)?", 3600.0), ("m(?:in(?:utes?|s)?)?", 60.0), ("s(?:ec(?:onds?|s)?)?", 1.0))
_BITS = {"KBIT": 1e3 / 8, "MBIT": 1e6 / 8, "GBIT": 1e9 / 8}
_RATE = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]+)\s*(/\s*s)?\s*")
_LATENCIES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_LATENCY = re.compile(rf"\s*{_NUMBER}\s*(us|µs|ms|s)\s*")
_DURATION = re.compile("".join(f"(?:{_NUMBER}{unit})?" for unit, _ in _TIMES))


def parse_size(text: str | int, *, total_bytes: int | None = None, name: str = "") -> int:
    """Return the bytes meant by `text`.

    "4GiB" and "4G" are binary, "16GB" is decimal, a bare number is bytes, and "50%" is a share of `total_bytes`.

    Args:
        text: The size as a person wrote it, or a number of bytes.
        total_bytes: What a percentage refers to; None where percentages have no meaning.
        name: The option's name for messages, such as `--shard-size` or `host_mem=`.

    Raises:
        OptionError: The text is not a size, or a percentage of an unknown total.
    """
    if isinstance(text, int):
        return text
    said = f"{name}{in_python(text)}" if name.endswith("=") else f"{name} {in_python(text)}".strip()
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
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= _MOST_BYTES:
        raise OptionError(f"{said} is more than any machine has")
    return int(size)


def check_budget(text: object, *, name: str, least_bytes: int, zero: bool = True) -> None:
    """Refuse a size that nobody can mean, before anything is done with it.  Percentages pass.

    Args:
        text: The value of the option.
        name: The option's name for messages.
        least_bytes: The smallest size that makes sense.
        zero: Whether 0 has a meaning.

    Raises:
        OptionError: The text is not a size, or the size is below `least_bytes`.
    """
    if not isinstance(text, (str, int)) or isinstance(text, bool) or (isinstance(text, int) and text < 0):
        raise OptionError(f"{name}={in_python(text)} is not a size; write '4GiB' (binary), '16GB' (decimal) or '50%'")
    if isinstance(text, int) and text >= _MOST_BYTES:
        raise OptionError(f"{name}={in_python(text)} is more than any machine has")
    said = str(text)
    size = parse_size(text, total_bytes=100, name=f"{name}=")
    if _PERCENT.fullmatch(said):
        return
    if size == 0 and not zero:
        raise OptionError(f"{name}={said!r} leaves no memory to run in: write 4GiB (binary), 16GB (decimal) or 50%")
    if 0 < size < least_bytes:
        number = re.split(r"[A-Za-z ]", said.strip())[0]
        unit = "GiB" if len(number) < 3 else "MiB"
        raise OptionError(
            f"{name}={said!r} is {format_size(size)}, and at least {format_size(least_bytes)} is needed: did you mean {number}{unit}? "
            "(a number without a unit is bytes)"
        )


def format_size(size_bytes: float) -> str:
    """Write a size for people, in binary units: 1536 becomes "1.5 KiB"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes:.0f} B"


def counted(number: int, thing: str, things: str = "") -> str:
    """Write how many there are: "1 line", "2,000 lines"; `things` is the plural where it is not `thing` with an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def parse_seconds(text: str) -> float:
    """Return the seconds meant by "90", "90s", "30min", "8h", "1h30m" or "1d".

    Raises:
        ValueError: The text is not a duration.
    """
    given = "".join(text.lower().split())
    if _PLAIN.fullmatch(given):
        return float(given)
    parts = _DURATION.fullmatch(given)
    if not given or parts is None:
        raise ValueError(f"{text!r} is not a time; write seconds (90), or 30min, 8h, 1h30m, 1d")
    return sum(float(number) * seconds for number, (_, seconds) in zip(parts.groups(default="0"), _TIMES, strict=True))


def format_seconds(seconds: float | None) -> str:
    """Write a duration for people: 31 ms, 4.2 s, 3:07 min, 1:02:33 h; a dash for None."""
    if seconds is None:
        return "-"
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def parse_link(text: str, *, name: str) -> tuple[float, float]:
    """Return the bytes per second and the seconds of latency meant by "1Gbit,10ms" or "125MB/s,0.1ms".

    Rates are in Kbit, Mbit or Gbit (per second, said or not), or a size per second.

    Args:
        text: The rate and the latency as a person wrote them.
        name: The option's name for messages, such as `--link`.

    Raises:
        OptionError: The text is not that of a link.
    """
    parts = text.split(",")
    rate, latency = _RATE.fullmatch(parts[0]), _LATENCY.fullmatch(parts[-1])
    per_s = 0.0
    if rate is not None:
        unit = rate[2].upper()
        per_s = float(rate[1]) * (_BITS.get(unit) or (_UNITS.get(unit, 0) if rate[3] else 0))
    if len(parts) != 2 or latency is None or not per_s:
        raise OptionError(f"{name} {in_python(text)} is not a link; write its rate and its latency, such as 1Gbit,10ms or 125MB/s,0.1ms")
    return per_s, float(latency[1]) * _LATENCIES[latency[2]]


def format_link(bytes_per_s: float, latency_s: float) -> str:
    """Write a link for people: "1 Gbit/s, 10 ms"."""
    bits = 8 * bytes_per_s
    unit, name = next(((unit, name) for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "Kbit/s")) if bits >= unit), (1.0, "bit/s"))
    return f"{bits / unit:.3g} {name}, {1000 * latency_s:.3g} ms"


def power_of_two(size: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def align_up(size_bytes: int, alignment: int) -> int:
    """Return the least multiple of `alignment` that is at least `size_bytes`."""
    return -(-size_bytes // alignment) * alignment
