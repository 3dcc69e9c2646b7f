"""The options of the engine as one value: its fields are the flags of `flexgen run` and the keywords of `LLM`.

Sizes stay as the user wrote them; `solve` in plan/search/solve.py converts them to bytes for the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, cast

from flexgen.base.option_values import (
    flag,
    integer,
    integer_or_none,
    one_of,
    parse_placement,
    passes_or_none,
    path_or_none,
    seconds_or_none,
    share_or_none,
    text_or_none,
)
from flexgen.base.quantities import MIB, check_budget
from flexgen.base.scalars import as_list, in_python, plain, shown_in_python
from flexgen.errors import OptionError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "sim")
_GPU = re.compile(r"cuda:\d+")
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
HOST_ATTENTIONS = ("auto", "on", "off")
SCHEDULES = ("auto", "diagonal", "zigzag", "row")
TIERS = ("device", "host", "disk")
# The homes of weights, and the tier of each; what is "encoded" is in host memory as stored, and decoded in every pass.
WEIGHT_HOMES = {"device": "device", "host": "host", "encoded": "host", "disk": "disk"}
PAPER_FORMAT = "flexgen-v0"  # a format that `flexgen convert` writes, for comparisons


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The user's choices of where and how the model runs.

    Attributes:
        device: Device that computes matrix products; "sim" is a strict simulation of an accelerator on the CPU, for tests.  Several,
            such as "cuda:0,cuda:1", are one for each of as many `stages` of this machine; they become `devices`, and this is "cuda" then.
        dtype: Dtype of computing and of the KV cache; "auto" is that of the checkpoint, but never float16 on a CPU.
        device_mem: Hard budget of the process on the device, CUDA itself included; None for 90 % of the memory that is free on a GPU.
        host_mem: Hard budget of host memory for the whole process; None for 80 % of the memory that is free now.
        disk: Hard budget of disk space; None for 80 % of the space that is free.
        offload_dir: Folder for spilled KV; None for a new folder in the system's temporary folder.
        weights: Explicit placement of weights, such as "host=.3,disk=.7"; "encoded" is host memory that holds them as stored, to be decoded
            in every pass.  None lets the planner choose.
        kv: Explicit placement of the KV cache over the tiers, in the same form; None lets the planner choose.
        host_attention: Where next tokens attend to KV in host memory beside a device: "on" the host, or "off" it, on the device, to which
            the link then brings the pages that they see (docs/cuda.md); "auto" lets the planner choose.
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
        stages: Machines, or devices of this one, that the model's layers are divided among (docs/distributed.md); None for one.
        devices: The devices of the stages of this machine, as `device` gave them; None where it gave one.
        interface: Network interface, such as "eth1", on which stages listen; None for the loopback interface where this process starts the
            others, and for the one that the host's name leads to where torchrun does.
        max_request_seconds: Most seconds that a request may take from its first pass to its last, as predicted; None for no bound.
        max_job_seconds: Most seconds that the job may take, as predicted; None for no bound.
        load_format: "auto", "safetensors", or "dummy" for random weights from config.json alone, for benchmarks.
        weight_format: "auto" computes with the weights as the checkpoint holds them; "int8" and "int4" convert them on first need, into a
            cache, and run from there (docs/quantization.md).
        allow_formats: Formats of weights and KV that the planner may choose among, beside those of the options above: names in
            ALLOWABLE_FORMATS, as a text with commas or a list.  None and an empty list leave the formats as they are.
        max_model_len: Context limit, at most the model's; None for the model's.
        revision: Revision of a hub repository.
        seed: Base of every sampled request's own seed.
        max_logprobs: Most log probabilities per token that a request may ask for (vLLM's default); -1 is any number.
        verify_reads: Whether to compare checksums of bytes read from disk with those of the bytes written or first read (one core sums some
            10 GB/s).
        overlap: Whether bytes may be copied while something is computed; False is for benchmarks of what that is worth.  Neither plans nor
            answers depend on it.
        trace: File for a trace of what happens when, for Perfetto or chrome://tracing (docs/trace.md); None for none.
        trace_passes: Passes that the trace has, counted from 0, such as "10:20" for ten of them; None for everything, up to 256 MiB.
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
    host_attention: str = "auto"
    cpu_compute: str = "auto"
    kv_format: str = "auto"
    sparse_attention: float | None = None
    max_num_seqs: int | None = None
    micro_batch_tokens: int | None = None
    prefill_tokens: int | None = None
    schedule: str = "auto"
    prefix_sharing: bool = True
    stages: int | None = None
    devices: str | None = None
    interface: str | None = None
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
    overlap: bool = True
    trace: str | None = None
    trace_passes: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._divide_among_devices()
        self.check_placement(self.device)
        if self.prefill_tokens is not None and self.schedule not in ("auto", "diagonal"):
            raise OptionError(f"prefill_tokens has a meaning for schedule='diagonal' only, not for {self.schedule!r}")
        if self.load_format == "dummy" and self.weight_format != "auto":
            raise OptionError(f"weight_format={self.weight_format!r} converts a checkpoint, and load_format='dummy' reads none")
        self._check_allowed()
        if self.stages is not None and self.stages > 1 and self.allow_formats is not None:
            raise OptionError(
                f"allow_formats={self.allow_formats!r} chooses for one machine: with stages, give weight_format= and kv_format="
            )
        if self.trace_passes is not None and self.trace is None:
            raise OptionError(f"trace_passes={self.trace_passes!r} chooses the passes of a trace, and there is none: give trace= as well")
        if self.trust_remote_code:
            raise OptionError("trust_remote_code: flexgen runs no code from model folders")

    def _divide_among_devices(self) -> None:
        """Make stages of several devices."""
        if "," in self.device:
            object.__setattr__(self, "devices", self.device)
            object.__setattr__(self, "device", "cuda")
        if self.devices is not None:
            count = len(self.devices.split(","))
            if self.stages not in (None, count):
                raise OptionError(f"stages={self.stages} on {count} devices ({self.devices}): one device for each is needed")
            object.__setattr__(self, "stages", count)

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
        """Check that the placements name no tier that a device does not have, and that products and attention are computed as it can.

        Args:
            device: The device; "auto" where it is not known yet.

        Raises:
            OptionError: They do.
        """
        if self.cpu_compute != "auto" and device not in ("auto", "cpu"):
            raise OptionError(f"cpu_compute={self.cpu_compute!r}: products run on {device}; give device='cpu', or leave cpu_compute out")
        if self.host_attention == "off" and device == "cpu":
            raise OptionError("host_attention='off': beside a CPU device there is none to attend on; leave host_attention out")
        for name, shares, homes in (("weights", self.weights, tuple(WEIGHT_HOMES)), ("kv", self.kv, TIERS)):
            if device == "cpu" and shares is not None and parse_placement(shares, name=name, homes=homes)["device"]:
                *others, last = (home for home in homes if home != "device")
                there = f"divide between {', '.join(others)} and {last}"
                raise OptionError(f"{name}={shares!r}: on a CPU device there is no device tier; {there}")


def _device(name: str, value: object) -> str:
    """Return the name of a device, or those of several GPUs with commas between them."""
    parts = value.replace(" ", "").split(",") if isinstance(value, str) else []
    if len(parts) > 1 and len(set(parts)) == len(parts) and all(_GPU.fullmatch(part) for part in parts):
        return ",".join(parts)
    if len(parts) > 1:
        raise OptionError(f"{name}={in_python(value)}: several devices are different GPUs, one for each stage, such as cuda:0,cuda:1")
    return one_of(name, value, known=DEVICES)


def _format_names(name: str, given: object) -> str | None:
    """Return the names of ALLOWABLE_FORMATS that are given, each once, in the order of that table, as a text with commas."""
    listed = [given] if isinstance(given, str) else [] if given is None else as_list(given)
    if listed is None:
        raise OptionError(f"{name} must be names with commas between them, or a list of names, not {shown_in_python(given)}")
    asked = [part for each in listed for part in (each.split(",") if isinstance(each, str) else [each])]
    named = [each.strip() if isinstance(each, str) else each for each in asked]
    for each in named:
        if not isinstance(each, str) or each not in ALLOWABLE_FORMATS:
            known = ", ".join(ALLOWABLE_FORMATS)
            raise OptionError(f"{name}: {in_python(each)} is unknown; known: {known} (int8 and int4 are formats of weights)")
    return ",".join(each for each in ALLOWABLE_FORMATS if each in named) or None


def _weight_format(name: str, value: object) -> str:
    if isinstance(value, str) and value == PAPER_FORMAT:
        raise OptionError(
            f"{name}={value!r} is for comparisons, and no run converts to it: `flexgen convert --weight-format {PAPER_FORMAT}` writes a "
            "folder in it, which is run as any other model (docs/quantization.md)"
        )
    return one_of(name, value, known=WEIGHT_FORMATS)


def _budget(name: str, value: object, *, least_bytes: int, zero: bool = True) -> str | int | None:
    size = plain(value)
    if size is not None:
        check_budget(size, name=name, least_bytes=least_bytes, zero=zero)
    return size


def _placement(name: str, value: object, *, homes: Sequence[str]) -> str | None:
    if value is not None:
        parse_placement(value, name=name, homes=homes)
    return cast("str | None", value)


# By name: the value in the form that is kept.  A budget below its least is a typing mistake ("10" for "10GiB"): an interpreter with torch
# takes more, a page of a ring no less.
_CHECKS: Mapping[str, Callable[[str, object], Any]] = {
    "device": _device,
    "dtype": partial(one_of, known=DTYPES),
    "device_mem": partial(_budget, least_bytes=MIB),
    "host_mem": partial(_budget, least_bytes=64 * MIB, zero=False),
    "disk": partial(_budget, least_bytes=MIB),
    "offload_dir": path_or_none,
    "weights": partial(_placement, homes=tuple(WEIGHT_HOMES)),
    "kv": partial(_placement, homes=TIERS),
    "host_attention": partial(one_of, known=HOST_ATTENTIONS),
    "cpu_compute": partial(one_of, known=CPU_COMPUTES),
    "kv_format": partial(one_of, known=KV_FORMATS),
    "sparse_attention": share_or_none,
    "max_num_seqs": partial(integer_or_none, least=1),
    "micro_batch_tokens": partial(integer_or_none, least=1),
    "prefill_tokens": partial(integer_or_none, least=1),
    "schedule": partial(one_of, known=SCHEDULES),
    "prefix_sharing": flag,
    "stages": partial(integer_or_none, least=1),
    "devices": lambda name, value: None if value is None else _device(name, value),
    "interface": text_or_none,
    "max_request_seconds": seconds_or_none,
    "max_job_seconds": seconds_or_none,
    "load_format": partial(one_of, known=LOAD_FORMATS),
    "weight_format": _weight_format,
    "allow_formats": _format_names,
    "max_model_len": partial(integer_or_none, least=1),
    "revision": text_or_none,
    "seed": partial(integer, least=-(2**63)),
    "max_logprobs": partial(integer, least=-1),
    "verify_reads": flag,
    "overlap": flag,
    "trace": partial(path_or_none, kind="file"),
    "trace_passes": passes_or_none,
    "trust_remote_code": flag,
}


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
    host_attention: str
    cpu_compute: str
    kv_format: str
    sparse_attention: float | None
    max_num_seqs: int | None
    micro_batch_tokens: int | None
    prefill_tokens: int | None
    schedule: str
    prefix_sharing: bool
    stages: int | None
    devices: str | None
    interface: str | None
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
    overlap: bool
    trace: str | None
    trace_passes: str | None
    trust_remote_code: bool
