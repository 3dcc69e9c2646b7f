"""What a conversion is asked for, as one value.  Needs no torch."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import Any

from flexgen.errors import OptionError
from flexgen.formats.flexgen_v0 import GROUP as PAPER_GROUP
from flexgen.formats.flexgen_v0 import NAME as PAPER

BITS = {"int4": 4, "int8": 8, PAPER: 4}  # format -> bits of a number; the FlexGen paper's own is for comparisons
GROUP_SIZES = (32, 64, 128)
# Format -> its group size where none is asked for: what 4 bits lose depends on it, 8 bits lose nothing (docs/accuracy.md).
_USUAL_GROUP_SIZES = {"int4": 32, "int8": 64, PAPER: PAPER_GROUP}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """How weights are to be rounded, and which.

    Attributes:
        weight_format: "int4", "int8" or "flexgen-v0".
        group_size: The number of neighbouring weights that share a scale: along the inputs, in flexgen-v0 along the outputs.  0 stands
            for what is usual for the format, and is replaced by it.
        keep: Shell patterns of names of stored tensors that stay as they are, such as "*.down_proj.weight".
        eight_bits: Shell patterns of names of stored tensors that have 8 bits in int4.
        quantize_head: Whether the output head is rounded, too.

    Raises:
        OptionError: A value is unknown, or values contradict each other.
    """

    weight_format: str = "int4"
    group_size: int = 0
    keep: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    quantize_head: bool = False

    def __post_init__(self) -> None:
        if self.weight_format not in BITS:
            raise OptionError(f"weight_format={self.weight_format!r} is unknown; known: {', '.join(BITS)}")
        if not self.group_size:
            object.__setattr__(self, "group_size", _USUAL_GROUP_SIZES[self.weight_format])
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"group_size={self.group_size!r} is not supported; take one of {', '.join(map(str, GROUP_SIZES))}")
        if self.is_paper and self.group_size != PAPER_GROUP:
            raise OptionError(f"{PAPER} has groups of {PAPER_GROUP}; leave out the group size {self.group_size}")
        if self.eight_bits and self.weight_format != "int4":
            raise OptionError(
                f"eight_bits={self.eight_bits[0]!r} names tensors of a model in int4 that have 8 bits, not in {self.weight_format}"
            )

    @property
    def bits(self) -> int:
        """The bits of a number."""
        return BITS[self.weight_format]

    @property
    def is_paper(self) -> bool:
        """Whether the format is the FlexGen paper's."""
        return self.weight_format == PAPER

    def bits_of(self, name: str) -> int:
        """Return the bits of the numbers of a rounded tensor of this name."""
        return 8 if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.eight_bits) else self.bits

    def granule_rows(self, name: str) -> int:
        """Return the number of rows that are rounded and stored together: those whose zero points share a word, or that share a scale."""
        return self.group_size if self.is_paper else 32 // self.bits_of(name)

    @property
    def words(self) -> str:
        """All settings in words."""
        head = ", the head too" if self.quantize_head else ""
        eight_bits = f", {', '.join(self.eight_bits)} in 8 bits" if self.eight_bits else ""
        kept = f", {', '.join(self.keep)} kept" if self.keep else ""
        return f"{self.weight_format}, groups of {self.group_size}{head}{eight_bits}{kept}"

    def keeps(self, name: str) -> bool:
        """Return whether a pattern says that the tensor of this name stays as it is."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dataclasses.asdict(self) | {"keep": list(self.keep), "eight_bits": list(self.eight_bits)}
