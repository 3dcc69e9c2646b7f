"""The tensors of a model folder's weight files, and which of them becomes which parameter of a model.

transformers decides that: its renamings and conversions are asked, not repeated.  No weight is read, except to find out whether
two copies of a tied weight are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from flexgen.checkpoint.conversion import Traced, Untraceable
from flexgen.checkpoint.headers import MAX_TENSORS, StoredTensor, parse_header, read_header
from flexgen.checkpoint.sources import ParameterSource, read_bytes, whole
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.hub.diagnose import some
from flexgen.hub.model_files import INDEX_FILE, find_weight_files

logger = logging.getLogger(__name__)

_COMPARED_BYTES = 16 << 20


class Headers:
    """The tensors of a model's files, known by their validated headers.  The files may be elsewhere, or not exist at all.

    Attributes:
        folder: Folder of the files, or the name of a model that has no folder here.
        tensors: Every stored tensor by name, over all files.
        total_bytes: Bytes of all tensors.
        readable: Whether the files are here, so that numbers can be compared.

    Args:
        folder: Folder of the files, or a name for messages.
        tensors: Tensors by name, file by file.

    Raises:
        CheckpointError: Two files hold a tensor of the same name.
    """

    readable = False

    def __init__(self, folder: Path, tensors: Iterable[Mapping[str, StoredTensor]]) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for stored in tensors:
            for name in stored.keys() & self.tensors.keys():
                raise CheckpointError(f"{name} is stored twice: in {self.tensors[name].path.name} and in {stored[name].path.name}")
            self.tensors.update(stored)
            if len(self.tensors) > MAX_TENSORS:
                raise CheckpointError(f"{folder}: more than {MAX_TENSORS:,} tensors; no known model has as many")
        self.total_bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def parsed(cls, folder: Path, files: Mapping[str, tuple[bytes, int]]) -> Headers:
        """Make the tensors from file name -> (its header without the 8 bytes of its length, size of the whole file).

        Raises:
            CheckpointError: A header breaks a rule of the format.
        """
        return Headers(folder, [parse_header(header, file_bytes=size, path=folder / name) for name, (header, size) in files.items()])


class Checkpoint(Headers):
    """The safetensors files of a model folder.

    Args:
        folder: Folder that holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.  Files may be symbolic
            links into the same repository of the Hugging Face cache.

    Raises:
        CheckpointError: There are no such files, or one of them is unsafe or broken.
    """

    readable = True

    def __init__(self, folder: Path) -> None:
        files, index = find_weight_files(Path(folder))
        super().__init__(Path(folder), map(read_header, files))
        for name, file_name in index.items():
            if name not in self.tensors or self.tensors[name].path.name != file_name:
                raise CheckpointError(f"{self.folder / INDEX_FILE}: {name} is not in {file_name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSources:
    """The sources of everything in a model's state dict.

    Attributes:
        parameters: The source of each parameter and persistent buffer, by its name in the state dict.
        tied: Name of a parameter -> name in `parameters` of the one it shares its numbers with.  It can lack a pair that the
            skeleton ties: when the checkpoint stores two different weights, both are in `parameters`, as in transformers.
        initialized: Names that the model class allows a checkpoint to lack; they keep the values of initialization.
        unexpected: Stored tensors that the model has no use for, without those that the model class knows to ignore.
    """

    parameters: dict[str, ParameterSource]
    tied: dict[str, str]
    initialized: tuple[str, ...]
    unexpected: tuple[str, ...]


def parameter_sources(model: PreTrainedModel, checkpoint: Headers) -> ModelSources:
    """Find out which stored bytes become which parameter.

    Args:
        model: A skeleton on the meta device; it is not changed.
        checkpoint: The folder that the model is to be loaded from, or headers alone: two stored copies of a tied weight are then
            taken for equal.

    Raises:
        CheckpointError: Parameters are missing, shapes differ from the config's, or nothing matches.
    """
    expected = model.state_dict()
    groups, unexpected = _gather(model, checkpoint, expected)
    if not groups:
        raise CheckpointError(
            f"{checkpoint.folder}: none of the {len(checkpoint.tensors)} tensors belongs to a {type(model).__name__} "
            f"({some(checkpoint.tensors)}); is config.json that of these weights?"
        )
    found: dict[str, ParameterSource] = {}
    for group in groups:
        for source in group.sources(model):
            if source.name not in expected:
                unexpected.add(source.name)
            elif source.name in found:
                raise CheckpointError(f"{checkpoint.folder}: {source.name} is stored twice, as {some(group.names)} and otherwise")
            else:
                found[source.name] = source
    _check_shapes(found.values(), expected, checkpoint.folder)
    tied = _tie(model, found, expected, _equal if checkpoint.readable else _alike)
    # transformers' own rules about what a checkpoint may lack or have in addition
    report = SimpleNamespace(missing_keys=expected.keys() - found.keys() - tied.keys(), unexpected_keys=unexpected)
    absent = set(report.missing_keys)
    model._adjust_missing_and_unexpected_keys(report)  # pyright: ignore[reportArgumentType]
    if report.missing_keys:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(report.missing_keys)} parameters of {type(model).__name__} are missing: "
            f"{some(report.missing_keys)}" + (f"; not understood: {some(unexpected)}" if unexpected else "")
        )
    if report.unexpected_keys:
        logger.warning("%s: %d tensors are not used: %s", checkpoint.folder, len(report.unexpected_keys), some(report.unexpected_keys))
    return ModelSources(
        parameters={name: found[name] for name in expected if name in found},
        tied=tied,
        initialized=tuple(sorted(absent)),
        unexpected=tuple(sorted(report.unexpected_keys)),
    )


def check_supported_number_format(config: PreTrainedConfig | Mapping[str, Any]) -> None:
    """Refuse weights that are not plain numbers.

    Args:
        config: the model's config, or the contents of its config.json.

    Raises:
        UnsupportedModelError: naming the quantization method.
    """
    quantization = quantization_of(config)
    if quantization is not None:
        raise refuse_quantization(quantization)


def quantization_of(config: PreTrainedConfig | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the config says about how its weights, or those of a part of it, are quantized; None where they are plain numbers."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    for part in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            return quantization if isinstance(quantization, Mapping) else {}
    return None


def refuse_quantization(quantization: Mapping[str, Any]) -> UnsupportedModelError:
    """The error that names the method of a quantization_config."""
    return UnsupportedModelError(
        f"the weights are quantized ({quantization.get('quant_method') or 'by an unnamed method'}, see quantization_config in "
        "config.json), which is not supported: use a repository with the bfloat16, float16 or float32 weights of this model"
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
        """Return the sources of the parameters, as pieces to place where the conversion only moves numbers."""
        if self.converter is None:
            if len(self.tensors) > 1:
                raise CheckpointError(f"{some(self.names)} would all become {self.target}")
            tensor = self.tensors[0][1]
            return [ParameterSource(name=self.target, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))]
        self._check_complete()
        try:
            return [_traced_source(name, x) for name, x in self._run(model, map(Traced.of, self._stored)).items()]
        except Exception as error:  # noqa: BLE001 - whatever a conversion makes of tensors without numbers
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
        """Run transformers' conversion on `tensors`, which stand for the stored ones; return the results by name of the parameter."""
        converter = deepcopy(self.converter)
        assert converter is not None
        for (pattern, stored), tensor in zip(self.tensors, tensors, strict=True):
            converter.add_tensor(self.target, stored.name, pattern, tensor)  # pyright: ignore[reportArgumentType]
        results = converter.convert(self.target, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in results.items()}

    def _check_complete(self) -> None:
        """Check that merged tensors are numbered consecutively; if one is missing, all that follow would take another's place."""
        for pattern in {pattern for pattern, _ in self.tensors}:
            split = [tensor.name.split(".") for matched, tensor in self.tensors if matched == pattern]
            varying = [part for part in zip(*split, strict=False) if len(set(part)) > 1]
            if len(varying) != 1 or not all(number.isdecimal() for number in varying[0]):
                continue
            numbers = sorted(int(number) for number in varying[0])
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                raise CheckpointError(f"{self.target}: some of {pattern} are missing; there are {len(numbers)}, up to number {numbers[-1]}")


def _traced_source(name: str, x: torch.Tensor) -> ParameterSource:
    if not isinstance(x, Traced):
        raise Untraceable(f"{name} was made of nothing stored")
    return ParameterSource(name=name, shape=tuple(x.shape), dtype=x.dtype, pieces=x.pieces)


def _gather(model: PreTrainedModel, checkpoint: Headers, expected: Mapping[str, torch.Tensor]) -> tuple[Collection[_Group], set[str]]:
    """Group stored tensors by the parameter that they belong to; also return the names of those that belong to none.

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
        raise CheckpointError(
            f"{folder}: {len(wrong)} parameters do not have the shape that config.json asks for: {first.name} is {first.shape}, "
            f"expected {tuple(expected[first.name].shape)}" + (f"; also {some([s.name for s in wrong[1:]])}" if wrong[1:] else "")
        )


def _tie(
    model: PreTrainedModel,
    found: dict[str, ParameterSource],
    expected: Collection[str],
    equal: Callable[[ParameterSource, ParameterSource], bool],
) -> dict[str, str]:
    """Return tied parameters -> the one that is kept in `found`: the model's choice if it is stored, else the first that is."""
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
    """Return whether two sources hold the same bytes.  Reads them, up to the first difference."""
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
