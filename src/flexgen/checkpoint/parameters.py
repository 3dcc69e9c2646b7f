"""The mapping from stored tensors to the parameters of a model.

It follows transformers' own renamings and conversions, which are called, not repeated.  No weight is read,
except to find out whether two copies of a tied weight are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from flexgen.base.quantities import counted
from flexgen.checkpoint.conversion import Traced, Untraceable
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.gguf import gguf_sources
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource, read_bytes
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import StoredTensor
from flexgen.hub.diagnose import some

logger = logging.getLogger(__name__)

_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSources:
    """The sources of all tensors in a model's state dict.

    Attributes:
        parameters: The source of each parameter and persistent buffer, by its name in the state dict.
        tied: For each tied parameter, the name in `parameters` of the one with which it shares its numbers.  A pair that the skeleton ties
            is missing if the checkpoint stores two different weights; then both are in `parameters`, as in transformers.
        initialized: The names that the model class allows a checkpoint to lack; they keep their initial values.
        unexpected: The stored tensors that the model does not use, without those that the model class ignores.
    """

    parameters: dict[str, ParameterSource]
    tied: dict[str, str]
    initialized: tuple[str, ...]
    unexpected: tuple[str, ...]

    def names(self) -> list[str]:
        """Return all names that have a source, including tied ones."""
        return [*self.parameters, *self.tied]

    def kept_as(self, name: str) -> str:
        """Return the name in `parameters` of the one with which `name` shares its numbers; usually `name` itself."""
        return self.tied.get(name, name)

    def __getitem__(self, name: str) -> ParameterSource:
        return self.parameters[self.kept_as(name)]

    def __contains__(self, name: str) -> bool:
        return self.kept_as(name) in self.parameters


def parameter_sources(model: PreTrainedModel, checkpoint: Headers) -> ModelSources:
    """Return which stored bytes become which parameter.

    Args:
        model: A skeleton on the meta device; it is not changed.
        checkpoint: The files from which the model is to be loaded, or headers alone, in which case two stored copies of a tied weight are
            assumed to be equal.

    Raises:
        CheckpointError: Parameters are missing, shapes differ from the config's, or nothing matches.
        UnsupportedModelError: A GGUF file has tensors that the model does not use.
    """
    expected = model.state_dict()
    if checkpoint.architecture is not None:
        sources, unexpected = gguf_sources(model, checkpoint)
    else:
        groups, unexpected = _gather(model, checkpoint, expected)
        sources = [source for group in groups for source in group.sources(model)]
    if not sources:
        raise CheckpointError(
            f"{checkpoint.folder}: none of the {len(checkpoint.tensors)} tensors belongs to a {type(model).__name__} "
            f"({some(checkpoint.tensors)}); is config.json that of these weights?"
        )
    found: dict[str, ParameterSource] = {}
    for source in sources:
        if source.name not in expected:
            unexpected.add(source.name)
        elif source.name in found:
            names = some({piece.tensor.name for each in (source, found[source.name]) for piece in each.pieces})
            raise CheckpointError(f"{checkpoint.folder}: {source.name} is stored twice, in {names}")
        else:
            found[source.name] = source
    _check_shapes(found.values(), expected, checkpoint.folder)
    tied = _tie(model, found, expected, _equal if checkpoint.readable else _alike)
    # transformers' own rules about which tensors a checkpoint may lack or have in addition
    report = SimpleNamespace(missing_keys=expected.keys() - found.keys() - tied.keys(), unexpected_keys=unexpected)
    absent = set(report.missing_keys)
    model._adjust_missing_and_unexpected_keys(report)  # pyright: ignore[reportArgumentType]
    if report.missing_keys:
        of = f"of {type(model).__name__}"
        missing = counted(len(report.missing_keys), f"parameter {of} is missing", f"parameters {of} are missing")
        raise CheckpointError(
            f"{checkpoint.folder}: {missing}: {some(report.missing_keys)}" + (f"; not understood: {some(unexpected)}" if unexpected else "")
        )
    if report.unexpected_keys and checkpoint.architecture is not None:  # a GGUF file's config says less than its tensors
        raise UnsupportedModelError(
            f"{checkpoint.folder}: {counted(len(report.unexpected_keys), 'tensor has', 'tensors have')} no place in transformers' "
            f"{type(model).__name__}, so that answers would be wrong without them: {some(report.unexpected_keys)}"
        )
    if report.unexpected_keys:
        unused = counted(len(report.unexpected_keys), "tensor is", "tensors are")
        logger.warning("%s: %s not used: %s", checkpoint.folder, unused, some(report.unexpected_keys))
    return ModelSources(
        parameters={name: found[name] for name in expected if name in found},
        tied=tied,
        initialized=tuple(sorted(absent)),
        unexpected=tuple(sorted(report.unexpected_keys)),
    )


@dataclass(slots=True)
class _Group:
    """Stored tensors that are converted together, into one parameter or several."""

    target: str  # the (first) parameter
    converter: WeightConverter | None
    tensors: list[tuple[str, StoredTensor]] = field(default_factory=list)  # with the pattern that matched

    @property
    def names(self) -> list[str]:
        return [tensor.name for _, tensor in self.tensors]

    def sources(self, model: PreTrainedModel) -> list[ParameterSource]:
        """Return the sources of the parameters: pieces to place if the conversion only moves numbers."""
        if self.converter is None:
            if len(self.tensors) > 1:
                raise CheckpointError(f"{some(self.names)} would all become {self.target}")
            tensor = self.tensors[0][1]
            if _is_conv1d_as_linear(model, self.target, tensor):
                return [_traced_source(self.target, Traced.of(tensor).t())]
            return [ParameterSource(name=self.target, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))]
        self._check_complete()
        try:
            return [_traced_source(name, x) for name, x in self._run(model, map(Traced.of, self._stored)).items()]
        except Exception as error:  # noqa: BLE001 - conversions fail in any way on tensors without numbers
            logger.debug("%s cannot be traced, so it will be computed: %r", self.target, error)
        meta = (torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in self._stored)
        try:
            results = self._run(model, meta)
        except Exception as error:
            raise CheckpointError(f"{self.target} cannot be made of {some(self.names)}: {error}") from error
        pieces = tuple(piece for tensor in self._stored for piece in whole(tensor))
        return [
            ParameterSource(name=name, shape=tuple(x.shape), dtype=x.dtype, pieces=pieces, convert=partial(self._compute, model, name))
            for name, x in results.items()
        ]

    @property
    def _stored(self) -> list[StoredTensor]:
        return [tensor for _, tensor in self.tensors]

    def _compute(self, model: PreTrainedModel, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._run(model, tensors)[name]

    def _run(self, model: PreTrainedModel, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run transformers' conversion on `tensors`, which stand for the stored ones; return the results by parameter name."""
        converter = deepcopy(self.converter)
        assert converter is not None
        for (pattern, stored), tensor in zip(self.tensors, tensors, strict=True):
            converter.add_tensor(self.target, stored.name, pattern, tensor)  # pyright: ignore[reportArgumentType]
        results = converter.convert(self.target, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in results.items()}

    def _check_complete(self) -> None:
        """Check that merged tensors are numbered consecutively: if one were missing, all that follow would be misplaced."""
        for pattern in {pattern for pattern, _ in self.tensors}:
            split = [tensor.name.split(".") for matched, tensor in self.tensors if matched == pattern]
            varying = [part for part in zip(*split, strict=False) if len(set(part)) > 1]
            if len(varying) != 1 or not all(number.isdecimal() for number in varying[0]):
                continue
            numbers = sorted(int(number) for number in varying[0])
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                raise CheckpointError(f"{self.target}: some of {pattern} are missing; there are {len(numbers)}, up to number {numbers[-1]}")


def _is_conv1d_as_linear(model: PreTrainedModel, target: str, tensor: StoredTensor) -> bool:
    """Return whether a tensor is the weight of a Conv1D, which its format stores with the dimensions of a linear layer's."""
    module, _, parameter = target.rpartition(".")
    as_linear = tensor.encoding is not None and tensor.encoding.format.stored_as_linear and parameter == "weight"
    return as_linear and isinstance(model.get_submodule(module), Conv1D)


def _traced_source(name: str, x: torch.Tensor) -> ParameterSource:
    if not isinstance(x, Traced):
        raise Untraceable(f"{name} was made of nothing stored")
    return ParameterSource(name=name, shape=tuple(x.shape), dtype=x.dtype, pieces=x.pieces)


def _gather(model: PreTrainedModel, checkpoint: Headers, expected: Mapping[str, torch.Tensor]) -> tuple[Collection[_Group], set[str]]:
    """Return the stored tensors by the parameter to which they belong, and the names of those that belong to none.

    The loop is that of transformers' `convert_and_load_state_dict_in_model`, without its loading.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, _Group] = {}
    unexpected: set[str] = set()
    prefix = model.base_model_prefix
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)  # pyright: ignore[reportArgumentType]
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)  # pyright: ignore[reportArgumentType]
        if target not in expected:
            unexpected.add(name)
            continue
        group = groups.setdefault(target, _Group(target, by_pattern[pattern] if pattern else None))
        if (pattern is None) != (group.converter is None):
            raise CheckpointError(f"{checkpoint.folder}: {target} is stored both whole and in parts: {some([name, *group.names])}")
        group.tensors.append((pattern or name, checkpoint.tensors[name]))
    return groups.values(), unexpected


def _check_shapes(sources: Iterable[ParameterSource], expected: Mapping[str, torch.Tensor], folder: Path) -> None:
    wrong = [source for source in sources if source.shape != tuple(expected[source.name].shape)]
    if wrong:
        first = wrong[0]
        found = counted(len(wrong), "parameter does", "parameters do")
        raise CheckpointError(
            f"{folder}: {found} not have the shape that config.json asks for: {first.name} is {first.shape}, "
            f"expected {tuple(expected[first.name].shape)}" + (f"; also {some([s.name for s in wrong[1:]])}" if wrong[1:] else "")
        )


def _tie(
    model: PreTrainedModel,
    found: dict[str, ParameterSource],
    expected: Collection[str],
    equal: Callable[[ParameterSource, ParameterSource], bool],
) -> dict[str, str]:
    """Return tied parameters -> the one that is kept in `found`: the model's choice if it is stored, otherwise the first that is."""
    families: dict[str, list[str]] = {}
    for name, main in model.all_tied_weights_keys.items():
        families.setdefault(main, [main]).append(name)
    tied: dict[str, str] = {}
    for family in families.values():
        stored = [name for name in family if name in found]
        for name in family:
            if not stored or name == stored[0] or name not in expected:
                continue
            if name in found and not equal(found[name], found[stored[0]]):
                logger.warning("%s and %s should be tied, but different weights are stored; both are used", name, stored[0])
                continue
            found.pop(name, None)
            tied[name] = stored[0]
    return tied


def _alike(a: ParameterSource, b: ParameterSource) -> bool:
    """Return whether two sources could hold the same bytes."""
    return (a.shape, a.dtype, len(a.pieces)) == (b.shape, b.dtype, len(b.pieces)) and a.is_view and b.is_view


def _equal(a: ParameterSource, b: ParameterSource) -> bool:
    """Return whether two sources hold the same bytes, reading them up to the first difference."""
    if not _alike(a, b):
        return False
    one, other = a.pieces[0], b.pieces[0]
    return all(
        torch.equal(
            read_bytes(one.path, one.offset + start, min(_COMPARED_BYTES, one.nbytes - start)),
            read_bytes(other.path, other.offset + start, min(_COMPARED_BYTES, one.nbytes - start)),
        )
        for start in range(0, one.nbytes, _COMPARED_BYTES)
    )
