"""ModelSpec: the costs of a model as numbers only (bytes, FLOPs and KV, unit by unit). No torch, no files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

from flexgen.errors import OptionError

# Matches the number of a layer in the name of a unit.
_LAYER_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.| |$)")
_ENCODED = "encoded_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A group of weights that moves and becomes ready at once.

    Attributes:
        name: The name that is shown to people, e.g. "layers.3.mlp.up_proj".
        disk_bytes: The stored bytes, read from the source each time the unit streams (alignment included).
        decoded_bytes: The bytes in the compute dtype.
        flops_per_token: The FLOPs of a token that passes through the unit; a multiply-add counts as two.
        head: Whether the unit is vocabulary rows of the output head, which are computed for sampled positions only.
        plain: Whether the stored bytes are used as they are; None where that must be guessed from the sizes.
        encoded_bytes: The bytes that cross a link to a device which decodes them itself; None where the host decodes before the link.
    """

    name: str
    disk_bytes: int
    decoded_bytes: int
    flops_per_token: float
    head: bool = False
    plain: bool | None = None
    encoded_bytes: int | None = None

    @property
    def carried_bytes(self) -> int:
        """The bytes that cross a link to a device."""
        return self.decoded_bytes if self.encoded_bytes is None else self.encoded_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroupSpec:
    """Attention layers that share a page-table shape.

    Attributes:
        num_layers: The number of layers of this group that own KV.
        bytes_per_token: The KV bytes of one token in ONE layer of the group.
        attention_flops_per_pair: The FLOPs of one (query token, visible token) pair in one layer (all heads, both products).
        window: The number of visible tokens; None for all. Chunked attention counts as its chunk size.
    """

    num_layers: int
    bytes_per_token: int
    attention_flops_per_pair: float
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the planner sees it.

    Attributes:
        name: The name of the folder or hub repository.
        model_type: transformers' name of the architecture.
        units: The streamed units, in the order in which a pass needs them.
        kv_groups: The groups of attention layers with equal KV.
        resident_bytes: The bytes of small tensors (norms, biases, buffers) that always live where the model computes.
        embedding_row_bytes: The bytes gathered per input token when the embedding is not resident.
        embedding_bytes: The bytes of the whole input embedding (0 when it is tied to the head's units).
        hidden_size: The width of a hidden state, which decides activation memory.
        intermediate_size: The width inside an MLP, which decides activation memory.
        vocab_size: The number of logits of a position.
        max_position_embeddings: The model's context length.
        number_format: The format of the stored weights: a dtype (that of most bytes), or a published low-bit format ("mxfp4", "fp8_block").
        dtype: The dtype of computing, and of decoded and resident bytes.
    """

    name: str
    model_type: str
    units: tuple[UnitSpec, ...]
    kv_groups: tuple[KVGroupSpec, ...]
    resident_bytes: int
    embedding_bytes: int
    embedding_row_bytes: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    number_format: str = "bfloat16"
    dtype: str = "bfloat16"

    @cached_property
    def streamed_bytes(self) -> int:
        """The bytes that one pass reads when nothing is resident."""
        return sum(unit.disk_bytes for unit in self.units)

    @property
    def checkpoint_bytes(self) -> int:
        """The approximate bytes of the weights on disk."""
        return self.streamed_bytes + self.embedding_bytes + self.resident_bytes

    @cached_property
    def decoded_bytes(self) -> int:
        return sum(unit.decoded_bytes for unit in self.units)

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """The KV bytes of one token over all layers, with windows ignored."""
        return sum(group.num_layers * group.bytes_per_token for group in self.kv_groups)

    def kv_bytes(self, num_tokens: int) -> int:
        """Return the KV bytes of a sequence of `num_tokens`, with windows honoured and pages ignored."""
        return sum(g.num_layers * g.bytes_per_token * min(num_tokens, g.window or num_tokens) for g in self.kv_groups)

    @cached_property
    def flops_per_token(self) -> float:
        """The linear FLOPs of one token through every unit but the head."""
        return sum(unit.flops_per_token for unit in self.units if not unit.head)

    @cached_property
    def head_flops_per_token(self) -> float:
        return sum(unit.flops_per_token for unit in self.units if unit.head)

    def to_json(self) -> str:
        """Return the model as JSON; units that differ only in the layer's number are written once, and runs of equal layers as a count."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("units", "kv_groups")}
        kinds, runs = _unit_runs(self.units)
        lists = {
            "kv_groups": [dataclasses.asdict(group) for group in self.kv_groups],
            "unit_kinds": [_without_default(dataclasses.asdict(kind)) for kind in kinds],
            "unit_runs": [dataclasses.asdict(run) for run in runs],
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        lines += [f"{json.dumps(name)}: [\n  {_lines(values)}\n]" for name, values in lists.items()]
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Return the model that `to_json` wrote.

        Raises:
            OptionError: The text is not a model's JSON, or a key is unknown or missing.
        """
        try:
            fields = _checked("model", json.loads(text), _keys(cls) - {"units"} | {"unit_kinds", "unit_runs"})
            kinds = [UnitSpec(**_checked("model: unit_kinds", kind, _keys(UnitSpec), {_ENCODED})) for kind in fields.pop("unit_kinds")]
            runs = [_Run(**_checked("model: unit_runs", run, _keys(_Run))) for run in fields.pop("unit_runs")]
            groups = [KVGroupSpec(**_checked("model: kv_groups", group, _keys(KVGroupSpec))) for group in fields.pop("kv_groups")]
            return cls(units=tuple(_units(kinds, runs)), kv_groups=tuple(groups), **fields)
        except (ValueError, TypeError, IndexError) as error:
            raise OptionError(f"model: not the JSON of one: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Consecutive layers with equal units.

    Attributes:
        first: The number of the first layer; None for units outside of layers.
        layers: The number of layers.
        kinds: The kinds of the units of each layer, in order, as indices into the list of kinds.
    """

    first: int | None
    layers: int
    kinds: Sequence[int]

    def with_next(self, other: _Run) -> _Run | None:
        """Merge with the next layer's run into one; return None unless `other` is the next layer and has equal units."""
        if self.first is None or other.first != self.first + self.layers or self.kinds != other.kinds:
            return None
        return dataclasses.replace(self, layers=self.layers + other.layers)


def _unit_runs(units: Iterable[UnitSpec]) -> tuple[list[UnitSpec], list[_Run]]:
    """Return the kinds of units, with "{}" in their names in place of the layer's number, and the runs of them."""
    kinds: dict[UnitSpec, int] = {}
    numbered: list[tuple[int | None, int]] = []
    for unit in units:
        layer, name = _split_name(unit.name)
        numbered.append((layer, kinds.setdefault(dataclasses.replace(unit, name=name), len(kinds))))
    runs: list[_Run] = []
    for layer, members in groupby(numbered, key=itemgetter(0)):
        run = _Run(first=layer, layers=1, kinds=[kind for _, kind in members])
        if runs and (longer := runs[-1].with_next(run)) is not None:
            runs[-1] = longer
        else:
            runs.append(run)
    return list(kinds), runs


def _units(kinds: Sequence[UnitSpec], runs: Iterable[_Run]) -> Iterable[UnitSpec]:
    """Yield the units from which `_unit_runs` made these kinds and runs."""
    for run in runs:
        for layer in range(run.layers):
            for kind in run.kinds:
                unit = kinds[kind]
                if run.first is not None:
                    unit = dataclasses.replace(unit, name=unit.name.replace("{}", str(run.first + layer), 1))
                yield unit


def _split_name(name: str) -> tuple[int | None, str]:
    """Return the layer's number and the name with "{}" in its place, or (None, the name) if the name has no number."""
    match = _LAYER_NUMBER.search(name)
    if match is None or "{}" in name:
        return None, name
    return int(match[0]), name[: match.start()] + "{}" + name[match.end() :]


def _lines(values: Iterable[Any]) -> str:
    return ",\n  ".join(json.dumps(value) for value in values)


def _keys(kind: type[ModelSpec | UnitSpec | KVGroupSpec | _Run]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _without_default(kind: dict[str, Any]) -> dict[str, Any]:
    """Return a unit's fields without `encoded_bytes` where it is None, as it is for most units."""
    return {name: value for name, value in kind.items() if name != _ENCODED or value is not None}


def _checked(what: str, value: object, known: set[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """Return `value`, a JSON object with exactly the known keys; the optional ones may be missing."""
    if not isinstance(value, dict):
        raise OptionError(f"{what}: {str(value)[:40]!r} is not an object")
    fields = cast("dict[str, Any]", value)
    if unknown := fields.keys() - known:
        raise OptionError(f"{what}: unknown keys {sorted(unknown)}; known: {sorted(known)}")
    if missing := known - fields.keys() - set(optional):
        raise OptionError(f"{what}: missing keys {sorted(missing)}")
    return fields
