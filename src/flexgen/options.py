"""The options of the engine as one value: its fields are the flags of `flexgen run` and the keywords of `LLM`.

Sizes stay as the user wrote them; `solve` in plan/search/solve.py converts them to bytes for the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from flexgen.base.quantities import MIB, check_budget
from flexgen.base.scalars import as_float, as_int, as_list, plain, shown_in_python
from flexgen.errors import OptionError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "sim")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # the dtypes of computing, and the bytes of a number
DTYPES = ("auto", *DTYPE_BYTES)
KV_FORMATS = ("auto", "int8", "k8v4", "int4")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
WEIGHT_FORMATS = ("auto", "int8", "int4")
INT8 = "int8"
CPU_COMPUTES = ("auto", INT8)
# Names that `allow_formats` takes -> the option that each is a value of, and that value.
ALLOWABLE_FORMATS = {
    "int8": ("weight_format", "int8"), "int4": ("weight_format", "int4"),
    "kv-int8": ("kv_format", "int8"), "k8v4": ("kv_format", "k8v4"), "kv-int4": ("kv_format", "int4"),
}  # fmt: skip
SCHEDULES = ("auto", "diagonal", "zigzag", "row")
TIERS = ("device", "host", "disk")
# The homes of weights, and the tier of each; what is "encoded" is in host memory as stored, and decoded in every pass.
WEIGHT_HOMES = {"device": "device", "host": "host", "encoded": "host", "disk": "disk"}
# A budget below these is a typing mistake ("10" for "10GiB"): an interpreter with torch takes more, a page of a ring no less.
_LEAST_BYTES = {"host_mem": 64 * MIB, "device_mem": MIB, "disk": MIB}
# The integer options and the least value of each; those in _NEVER_NONE may not be None.
_LEAST_INTEGERS = {
    "max_num_seqs": 1, "micro_batch_tokens": 1, "prefill_tokens": 1, "max_model_len": 1, "max_logprobs": -1, "seed": -(2**63),
}  # fmt: skip
_NEVER_NONE = ("max_logprobs", "seed")
_KNOWN = {
    "device": DEVICES, "dtype": DTYPES, "kv_format": KV_FORMATS, "schedule": SCHEDULES, "load_format": LOAD_FORMATS,
    "weight_format": WEIGHT_FORMATS, "cpu_compute": CPU_COMPUTES,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The user's choices of where and how the model runs.

    Attributes:
        device: Device that computes matrix products; "sim" is a strict simulation of an accelerator on the CPU, for tests.
        dtype: Dtype of computing and of the KV cache; "auto" is that of the checkpoint, but never float16 on a CPU.
        device_mem: Hard budget of device memory; None for 90 % of the memory that is free on a GPU.
        host_mem: Hard budget of host memory for the whole process; None for 80 % of the memory that is free now.
        disk: Hard budget of disk space; None for 80 % of the space that is free.
        offload_dir: Folder for spilled KV; None for a new folder in the system's temporary folder.
        weights: Explicit placement of weights, such as "host=.3,disk=.7"; "encoded" is host memory that holds them as stored, to be decoded
            in every pass.  None lets the planner choose.
        kv: Explicit placement of the KV cache over the tiers, in the same form; None lets the planner choose.
        cpu_compute: How linear layers of decoder layers are computed on a CPU: "auto" (in the dtype), or "int8" (weights and inputs rounded
            to 8 bits, docs/cpu-compute.md).  Answers depend on it.
        kv_format: Format of the KV cache's complete pages: "auto" (the dtype of computing), "int8", "k8v4" (keys 8 bits, values 4) or
            "int4".  Answers depend on it.
        sparse_attention: Share of the positions that a head of a generated token keeps by their scores, such as 0.1; the other values are
            left out (docs/sparse-attention.md).  None keeps all.  Answers depend on it.
        max_num_seqs: Most sequences alive in a pass; None lets the planner choose.
        micro_batch_tokens: Most tokens computed together; None lets the planner choose.
        prefill_tokens: Most prompt tokens that a pass admits; None lets the planner choose.
        schedule: "auto", "diagonal" (admit as sequences finish), "zigzag" (admit into an empty block only) or "row" (one micro-batch
            at a time).
        prefix_sharing: Whether to compute common prefixes of prompts once.  Tokens do not change.
        max_request_seconds: Most seconds that a request may take from its first pass to its last, as predicted; None for no bound.
        max_job_seconds: Most seconds that the job may take, as predicted; None for no bound.
        load_format: "auto", "safetensors", or "dummy" for random weights from config.json alone, for benchmarks.
        weight_format: "auto" computes with the weights as the checkpoint holds them; "int8" and "int4" convert them on first need, into a
            cache, and run from there (docs/quantization.md).
        allow_formats: Formats of weights and KV that the planner may choose among, beside those of the options above: names in
            ALLOWABLE_FORMATS, as a text with commas or a list.  None leaves the formats as they are.
        max_model_len: Context limit, at most the model's; None for the model's.
        revision: Revision of a hub repository.
        seed: Base of every sampled request's own seed.
        max_logprobs: Most log probabilities per token that a request may ask for (vLLM's default); -1 is any number.
        verify_reads: Whether to compare checksums of bytes read from disk with those of the bytes written or first read (one core sums some
            10 GB/s).
        trust_remote_code: Accepted only as False.
    """

    device: str = "auto"
    dtype: str = "auto"
    device_mem: str | None = None
    host_mem: str | None = None
    disk: str | None = None
    offload_dir: str | None = None
    weights: str | None = None
    kv: str | None = None
    cpu_compute: str = "auto"
    kv_format: str = "auto"
    sparse_attention: float | None = None
    max_num_seqs: int | None = None
    micro_batch_tokens: int | None = None
    prefill_tokens: int | None = None
    schedule: str = "auto"
    prefix_sharing: bool = True
    max_request_seconds: float | None = None
    max_job_seconds: float | None = None
    load_format: str = "auto"
    weight_format: str = "auto"
    allow_formats: str | None = None
    max_model_len: int | None = None
    revision: str | None = None
    seed: int = 0
    max_logprobs: int = 20
    verify_reads: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST_INTEGERS.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        for name in ("max_request_seconds", "max_job_seconds"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        object.__setattr__(self, "sparse_attention", _share("sparse_attention", self.sparse_attention))
        for name, homes in (("weights", tuple(WEIGHT_HOMES)), ("kv", TIERS)):
            if (shares := getattr(self, name)) is not None:
                parse_placement(shares, name=name, homes=homes)
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        for name, least_bytes in _LEAST_BYTES.items():
            object.__setattr__(self, name, size := plain(getattr(self, name)))
            if size is not None:
                check_budget(size, name=name, least_bytes=least_bytes, zero=name != "host_mem")
        self.check_placement(self.device)
        if self.prefill_tokens is not None and self.schedule not in ("auto", "diagonal"):
            raise OptionError(f"prefill_tokens has a meaning for schedule='diagonal' only, not for {self.schedule!r}")
        if self.load_format == "dummy" and self.weight_format != "auto":
            raise OptionError(f"weight_format={self.weight_format!r} converts a checkpoint, and load_format='dummy' reads none")
        object.__setattr__(self, "allow_formats", _format_names(self.allow_formats))
        self._check_allowed()
        if self.trust_remote_code:
            raise OptionError("trust_remote_code: flexgen runs no code from model folders")

    @property
    def kept_share(self) -> float | None:
        """The share of positions that heads of generated tokens keep; None where they keep all."""
        return None if self.sparse_attention == 1 else self.sparse_attention

    def _check_allowed(self) -> None:
        """Refuse formats to choose among where there is no choice."""
        for name in self._allowed_names():
            option, _ = ALLOWABLE_FORMATS[name]
            if getattr(self, option) != "auto":
                raise OptionError(
                    f"{option}={getattr(self, option)!r} leaves {name} of allow_formats={self.allow_formats!r} nothing to choose: "
                    "leave out one of them"
                )
            if option == "weight_format" and self.load_format == "dummy":
                raise OptionError(f"allow_formats={name!r} converts a checkpoint, and load_format='dummy' reads none")

    def _allowed_names(self) -> list[str]:
        return self.allow_formats.split(",") if self.allow_formats else []

    def choices(self, option: str) -> tuple[str, ...]:
        """Return the values that `weight_format` or `kv_format` may take: its own first, then those that `allow_formats` names."""
        allowed = (ALLOWABLE_FORMATS[name] for name in self._allowed_names())
        return (getattr(self, option), *(value for its_option, value in allowed if its_option == option))

    def in_formats(self, weight_format: str, kv_format: str) -> EngineOptions:
        """Return the options with these formats, which leave nothing to choose."""
        return replace(self, weight_format=weight_format, kv_format=kv_format, allow_formats=None)

    def check_placement(self, device: str) -> None:
        """Check that the placements name no tier that a device does not have, and that products are computed as it can.

        Args:
            device: The device; "auto" where it is not known yet.

        Raises:
            OptionError: They do.
        """
        if self.cpu_compute != "auto" and device not in ("auto", "cpu"):
            raise OptionError(f"cpu_compute={self.cpu_compute!r}: products run on {device}; give device='cpu', or leave cpu_compute out")
        for name, shares, homes in (("weights", self.weights, tuple(WEIGHT_HOMES)), ("kv", self.kv, TIERS)):
            if device == "cpu" and shares is not None and parse_placement(shares, name=name, homes=homes)["device"]:
                *others, last = (home for home in homes if home != "device")
                there = f"divide between {', '.join(others)} and {last}"
                raise OptionError(f"{name}={shares!r}: on a CPU device there is no device tier; {there}")


def _format_names(given: object) -> str | None:
    """Return the names of ALLOWABLE_FORMATS that are given, each once, in the order of that table, as a text with commas."""
    if given is None:
        return None
    asked = given.split(",") if isinstance(given, str) else as_list(given) or [given]
    names = [name.strip() if isinstance(name, str) else name for name in asked]
    for name in names:
        if not isinstance(name, str) or name not in ALLOWABLE_FORMATS:
            known = ", ".join(ALLOWABLE_FORMATS)
            raise OptionError(f"allow_formats: {name!r} is unknown; known: {known} (int8 and int4 are formats of weights)")
    return ",".join(name for name in ALLOWABLE_FORMATS if name in names)


def _integer(name: str, value: object, least: int) -> int | None:
    """Check an integer option, and return it as an int.  Integers of numpy and 16.0 are accepted, too."""
    if value is None and name not in _NEVER_NONE:
        return None
    number = as_int(value)
    if number is None or not least <= number < 2**63:
        wanted = {1: "a positive integer", -1: "an integer of at least -1"}.get(least, "an integer that fits 64 bits")
        raise OptionError(f"{name} must be {wanted}, not {shown_in_python(value)}")
    return number


def _seconds(name: str, value: object) -> float | None:
    number = as_float(value)
    if value is not None and (number is None or number <= 0):
        raise OptionError(f"{name} must be a positive number of seconds, not {shown_in_python(value)}")
    return number


def _share(name: str, value: object) -> float | None:
    number = as_float(value)
    if value is not None and (number is None or not 0 < number <= 1):
        raise OptionError(f"{name} must be a share above 0 and up to 1 (0.1, not 10%), not {shown_in_python(value)}")
    return number


class OptionKeywords(TypedDict, total=False):
    """The fields of EngineOptions as keywords, for editors and type checkers; `LLM` also takes some of vLLM's values."""

    device: str
    dtype: str | torch.dtype
    device_mem: str | None
    host_mem: str | None
    disk: str | None
    offload_dir: str | None
    weights: str | None
    kv: str | None
    cpu_compute: str
    kv_format: str
    sparse_attention: float | None
    max_num_seqs: int | None
    micro_batch_tokens: int | None
    prefill_tokens: int | None
    schedule: str
    prefix_sharing: bool
    max_request_seconds: float | None
    max_job_seconds: float | None
    load_format: str
    weight_format: str
    allow_formats: str | Sequence[str] | None
    max_model_len: int | None
    revision: str | None
    seed: int | None
    max_logprobs: int
    verify_reads: bool
    trust_remote_code: bool


def parse_placement(text: object, *, name: str = "", homes: Sequence[str] = TIERS) -> dict[str, float]:
    """Parse shares per home such as "device=.2,host=.3,disk=.5", which must add up to 1.

    Args:
        text: The shares as the user wrote them.
        name: The name of the option, for messages.
        homes: The homes that may be named.

    Raises:
        OptionError: A home is unknown, a number is malformed, or the sum is not 1.
    """
    said = f"{name}={text!r}" if name else repr(text)
    example = f"write shares of {', '.join(homes)}, such as device=.2,host=.3,disk=.5"
    if not isinstance(text, str):
        raise OptionError(f"{said} is not a text; {example}")
    shares: dict[str, float] = dict.fromkeys(homes, 0.0)
    named: set[str] = set()
    for part in text.split(","):
        home, separator, number = part.partition("=")
        home = home.strip()
        if home not in homes or not separator:
            wrong = f"{home!r} is not a tier" if separator else f"{part!r} is not a share"
            raise OptionError(f"{said}: {wrong}; {example}")
        if home in named:
            raise OptionError(f"{said}: {home} is there twice")
        named.add(home)
        try:
            shares[home] = float(number)
        except ValueError as error:
            raise OptionError(f"{said}: {number!r} is not a share: write a number between 0 and 1 (.25, not 25%)") from error
        if not 0 <= shares[home] <= 1:
            raise OptionError(f"{said}: a share must be between 0 and 1 (.25, not 25%)")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise OptionError(f"{said}: the shares add up to {sum(shares.values()):g}, not 1")
    return shares
