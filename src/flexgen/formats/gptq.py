"""GPTQ: integer codes of 2, 3, 4 or 8 bits along the inputs of each linear layer, stored transposed, so that a matrix is read as a whole.

The layout is that of AutoGPTQ and GPTQModel (gptqmodel/nn_modules/qlinear), which auto-round writes too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.linear_names import is_linear_of_layer, module_of
from flexgen.formats.matrices import StoredMatrix
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

_BITS = (2, 3, 4, 8)
_LAYOUTS = {"gptq": 1, "gptq_v2": 0}  # what a stored zero point lacks
_ROUNDED = {"auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}  # auto-round's names of the same layouts
_WORD_BITS = 32
_FIELDS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a config states.

    Attributes:
        bits: The bits of a code.
        group_size: The inputs that share a scale; -1 for all of them.
        zero_lacks: What a stored zero point lacks: 1 in the first version of the layout.
        ordered: Whether the group of each input is stored and used (desc_act).
        head: Whether the output embeddings are encoded.
        changes: Patterns of names with their own bits and group size; None for modules that are not encoded.
        only: The ends of the names of modules that are encoded; None for all of a decoder layer's.
    """

    bits: int = 4
    group_size: int = 128
    zero_lacks: int = 1
    ordered: bool = False
    head: bool = False
    changes: tuple[tuple[str, tuple[int, int] | None], ...] = ()
    only: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GPTQMatrix(StoredMatrix):
    """A matrix of one layout.  Parts: words, scales, zero points and, if it is used, the group of each input.

    Attributes:
        bits: The bits of a code.
        group_size: The inputs that share a scale.
        zero_lacks: What a stored zero point lacks.
    """

    bits: int
    group_size: int
    zero_lacks: int
    stored_as_linear = True

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"gptq_int{self.bits}"

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints
        from flexgen.kernels.dequantize.integers import decode_gptq

        outputs = len(out)
        scales = parts[1].view(-1, outputs)
        words = parts[2].view(len(scales), -1)
        # The largest code and one is 0 again, as AutoGPTQ computes it, since -1 was stored so.
        zeros = ZeroPoints(words=words.t(), packing=Packing(bits=self.bits), rows=outputs, lacks=self.zero_lacks)
        groups = Groups(
            scales=scales.t(), zeros=zeros, columns=self.group_size,
            order=_order(parts[3], self.group_size) if len(parts) > 3 else None,
        )  # fmt: skip
        decode_gptq(parts[0].view(-1, outputs), self.bits, groups, out, parallel)


def _order(stored: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the group of each input: where all are 0, some tools mean groups of adjacent inputs."""
    import torch

    adjacent = torch.arange(len(stored), dtype=torch.int32, device=stored.device) // group_size
    return torch.where((stored == 0).all(), adjacent, stored.to(torch.int32))


class GPTQ(NumberFormat):
    """Weights as GPTQ's tools store them.

    Args:
        settings: What the config states.
    """

    name = "gptq"
    runs = True
    stored_as_linear = True

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        method, stated = quantization.get("quant_method"), Stated(quantization)
        if method == "gptq":
            is_marlin = stated.flag("is_marlin_format")
            layout = "marlin" if is_marlin else stated.text("checkpoint_format", "") or stated.text("format", "gptq")
            if layout not in _LAYOUTS:
                raise _refused(f"the layout {layout:.40}")
            return GPTQ(_settings(stated, _LAYOUTS[layout], _dynamic(stated)))
        if method == "auto-round" and (layout := stated.text("packing_format", "")) in _ROUNDED:
            return GPTQ(_settings(stated, _ROUNDED[layout], _rounded_otherwise(stated)))
        return None

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        module = module_of(tensor)
        if module is None or (chosen := self._chosen(module)) is None:
            return [tensor]
        bits, group_size = chosen
        outputs, inputs = tensor.shape
        if inputs * bits % _WORD_BITS or outputs * bits % _WORD_BITS:  # tools leave such a matrix as it is
            return [tensor]
        groups = 1 if group_size < 0 else -(-inputs // group_size)
        stored = [
            ("qweight", (inputs * bits // _WORD_BITS, outputs), torch.int32),
            ("qzeros", (groups, outputs * bits // _WORD_BITS), torch.int32),
            ("scales", (groups, outputs), torch.float16),
            ("g_idx", (inputs,), torch.int32),
        ]
        return [NamedTensor(f"{module}.{field}", shape, dtype) for field, shape, dtype in stored]

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {f"gptq_int{bits}": {"quant_method": "gptq", "bits": bits, "group_size": 128} for bits in (4, 8)}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        from flexgen.formats.integer_samples import sample_integers

        chosen = self._chosen(stored.name.rpartition(".")[0])
        return sample_integers(stored, chosen[0] if chosen is not None else self._settings.bits, generator)

    def _chosen(self, module: str) -> tuple[int, int] | None:
        """Return the bits and the group size of a module; None if it is not encoded."""
        settings = self._settings
        head = module.rpartition(".")[2] == "lm_head"
        if not (settings.head if head else is_linear_of_layer(module)):
            return None
        if settings.only is not None and not head and not module.endswith(settings.only):
            return None
        for pattern, change in settings.changes:
            if re.match(pattern, module):
                return change
        return settings.bits, settings.group_size

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return {f"{module}.weight": self._encoding(module, tensors) for module in modules}

    def _encoding(self, module: str, tensors: Mapping[str, StoredTensor]) -> Encoding:
        words, zeros, scales, order = (tensors.get(f"{module}.{field}") for field in _FIELDS)
        if words is None or zeros is None or scales is None or any(len(each.shape) != 2 for each in (words, zeros, scales)):
            raise CheckpointError(f"{module} needs matrices qweight, qzeros and scales: config.json says that the weights are {self.name}")
        (num_words, outputs), (groups, _) = words.shape, scales.shape
        bits = self._bits(module, words, zeros, scales, order)
        inputs = num_words * _WORD_BITS // bits
        used = order is not None and self._settings.ordered and groups > 1
        if order is None and self._settings.ordered and groups > 1:
            raise CheckpointError(f"{module}.g_idx is missing, which desc_act in config.json needs")
        parts = [EncodingPart(words, None), EncodingPart(scales, None), EncodingPart(zeros, None)]
        parts += [EncodingPart(order, None)] if order is not None and used else []
        matrix = GPTQMatrix(bits=bits, group_size=self._group_size(module, inputs, groups), zero_lacks=self._settings.zero_lacks)
        beside = (order.name,) if order is not None and not used else ()
        return Encoding(matrix, (outputs, inputs), tuple(parts), by_rows=False, beside=beside)

    def _bits(self, module: str, words: StoredTensor, zeros: StoredTensor, scales: StoredTensor, order: StoredTensor | None) -> int:
        """Return the bits of a code: those of the config if the tensors agree, as modules may have their own."""
        (groups, outputs), dtypes = scales.shape, {str(each.dtype).removeprefix("torch.") for each in (words, zeros)}
        for bits in (self._settings.bits, *_BITS):
            inputs = words.shape[0] * _WORD_BITS // bits
            fits = zeros.shape == (groups, -(-outputs * bits // _WORD_BITS)) and -(-inputs * bits // _WORD_BITS) == words.shape[0]
            if (
                fits
                and scales.dtype.is_floating_point
                and words.shape[1] == outputs
                and (order is None or order.shape == (inputs,))
                and dtypes == {"int32"}
            ):
                return bits
        raise CheckpointError(
            f"{module}: qweight {tuple(words.shape)}, qzeros {tuple(zeros.shape)} and scales {tuple(scales.shape)}, words of "
            f"{', '.join(sorted(dtypes))}, do not make a matrix in {self.name}"
        )

    def _group_size(self, module: str, inputs: int, groups: int) -> int:
        """Return the inputs that share a scale: those of the config if the scales agree, as modules may have their own."""
        stated = self._settings.group_size
        if groups == 1:
            return inputs
        if stated > 0 and -(-inputs // stated) == groups:
            return stated
        if inputs % groups:
            raise CheckpointError(f"{module} has {groups} groups of {inputs} inputs, which are not groups of {stated}")
        return inputs // groups


def _settings(stated: Stated, zero_lacks: int, changes: Sequence[tuple[str, tuple[int, int] | None]]) -> Settings:
    bits, group_size = _sizes(stated, 4, 128)
    if (words := stated.text("pack_dtype", "int32")) != "int32":
        raise _refused(f"codes packed in {words:.20}")
    if (kind := stated.text("data_type", "int")) != "int":
        raise _refused(f"numbers of type {kind:.20}")
    return Settings(
        bits=bits, group_size=group_size, zero_lacks=zero_lacks, ordered=stated.flag("desc_act"), head=stated.flag("lm_head"),
        changes=tuple(changes), only=stated.lists_of_names("modules_in_block_to_quantize") or None,
    )  # fmt: skip


def _dynamic(stated: Stated) -> list[tuple[str, tuple[int, int] | None]]:
    """Return GPTQModel's settings of single modules: patterns that begin with "-:" name modules that are not encoded."""
    return [
        (
            stated.pattern("dynamic", pattern.removeprefix("-:").removeprefix("+:")),
            None if pattern.startswith("-:") else _sizes(change, 4, 128),
        )
        for pattern, change in stated.objects("dynamic")
    ]


def _rounded_otherwise(stated: Stated) -> list[tuple[str, tuple[int, int] | None]]:
    """Return auto-round's settings of single modules: those of 16 bits are not encoded."""
    changes = []
    bits, group_size = _sizes(stated, 4, 128)
    for name, change in stated.objects("extra_config"):
        sizes = _sizes(change, bits, group_size) if change.whole("bits", bits) in _BITS else None
        pattern = name if re.search(r"[*+\\^$|()\[\]]", name) else f"{re.escape(name)}$"
        changes.append((stated.pattern("extra_config", pattern), sizes))
    return changes


def _sizes(stated: Stated, bits: int, group_size: int) -> tuple[int, int]:
    """Return the bits of a code and the inputs that share a scale, where they are not those given."""
    found = stated.whole("bits", bits), stated.group_size("group_size", group_size)
    if found[0] not in _BITS:
        raise _refused(f"{found[0]} bits in groups of {found[1]}")
    return found


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"quantization_config in config.json (gptq) states {what}, which is not supported; supported are "
        f"{', '.join(map(str, _BITS))} bits in the layouts {', '.join((*_LAYOUTS, *_ROUNDED))}"
    )
