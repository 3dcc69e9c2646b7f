"""ModelSpec: the costs of a model as numbers only (bytes, FLOPs and KV, unit by unit). No torch, no files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter

from flexgen.base.from_json import dataclass_from_json, parsed_json
from flexgen.errors import OptionError
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.unit_names import split_name

_ENCODED, _IN_INT8, _DECODED_FROM = "encoded_bytes", "int8_flops_per_token", "decoded_from"
_OPERATIONS, _EXPERTS = "operations", ("expert_numbers_per_token", "expert_bytes_per_token")
# What is left out of the JSON of a model whose KV is in the dtype of computing.
_KV_FORMAT, _LOW_BIT = "kv_format", ("exact_bytes_per_token", "slot_bytes_per_token")
# What is left out of the JSON of a model whose generated tokens attend to all that they see.
_SPARSE, _OF_SPARSE = "sparse_attention", {"value_bytes_per_token": 0, "queries_per_key": 1, "key_heads": 1}
# What is left out of that of groups whose layers are not known.
_LAYERS = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A group of weights that moves and becomes ready at once.

    Attributes:
        name: The name that is shown to people, e.g. "layers.3.mlp.up_proj".
        disk_bytes: The stored bytes, read from the source each time the unit streams (alignment included).
        decoded_bytes: The bytes in the compute dtype.
        flops_per_token: The FLOPs of a token that passes through the unit; a multiply-add counts as two.
        int8_flops_per_token: Those of them that are computed in int8.
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
    int8_flops_per_token: float = 0.0

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
        exact_bytes_per_token: Its bytes in the last page of a sequence, which a low-bit format keeps in the dtype of computing beside the
            other pages; 0 where all pages are alike.
        slot_bytes_per_token: Its bytes where keys and values of a page lie on disk in one padded piece; 0 where they lie as elsewhere.
        attention_flops_per_pair: The FLOPs of one (query token, visible token) pair in one layer (all heads, both products).
        window: The number of visible tokens; None for all. Chunked attention counts as its chunk size.
        value_bytes_per_token: The bytes of one token's values in one layer; 0 where that does not matter.
        queries_per_key: The number of query heads that share a key head; 1 where that does not matter.
        key_heads: The number of key heads; 1 where that does not matter.
        layers: The model's own indices of these layers; empty where they are not known.
    """

    num_layers: int
    bytes_per_token: int
    attention_flops_per_pair: float
    window: int | None = None
    exact_bytes_per_token: int = 0
    slot_bytes_per_token: int = 0
    value_bytes_per_token: int = 0
    queries_per_key: int = 1
    key_heads: int = 1
    layers: tuple[int, ...] = ()

    @property
    def disk_bytes_per_token(self) -> int:
        """The KV bytes of one token on disk, in one layer."""
        return self.slot_bytes_per_token or self.bytes_per_token


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
        decoded_from: The decoded bytes of the units' tensors that are not used as they are stored, by the format or dtype in which they are
            stored (see `int8_name` for those that are rounded then); empty if that is not known: then all count as `number_format`.
        kv_format: The low-bit format of KV; None for the dtype of computing.
        sparse_attention: The share of positions that a head of a generated token keeps; None for all.
        operations: The operations that the host launches on a device for a micro-batch; 0 where that is not known.
        expert_numbers_per_token: The numbers that the experts of a token, which are computed together on a device, hold at a time in the
            layer where they are most.
        expert_bytes_per_token: The bytes that elementwise operations of a token's experts read and write in all layers together: gates, and
            the sums of their outputs.
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
    decoded_from: dict[str, int] = field(default_factory=dict[str, int])
    kv_format: str | None = None
    sparse_attention: float | None = None
    operations: int = 0
    expert_numbers_per_token: int = 0
    expert_bytes_per_token: int = 0

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

    @cached_property
    def disk_kv_bytes_per_token(self) -> int:
        """The KV bytes of one token over all layers on disk, where pages are padded, with windows ignored."""
        return sum(group.num_layers * group.disk_bytes_per_token for group in self.kv_groups)

    @cached_property
    def disk_kv_growth(self) -> float:
        """The bytes that a byte of KV becomes on disk, where pages are padded."""
        return max(self.disk_kv_bytes_per_token / max(self.kv_bytes_per_token, 1), 1.0)

    @cached_property
    def tail_bytes_per_token(self) -> int:
        """The bytes of one token over all layers in the last page of a sequence, where that is kept beside the others; otherwise 0."""
        return sum(group.num_layers * group.exact_bytes_per_token for group in self.kv_groups)

    @cached_property
    def exact_kv_bytes_per_token(self) -> int:
        """The bytes of one token over all layers in the dtype of computing."""
        return self.tail_bytes_per_token or self.kv_bytes_per_token

    def kv_bytes(self, num_tokens: int) -> int:
        """Return the KV bytes of a sequence of `num_tokens`, with windows honoured and pages ignored, but for the last if it is apart."""
        pages = sum(g.num_layers * g.bytes_per_token * min(num_tokens, g.window or num_tokens) for g in self.kv_groups)
        return pages + PAGE_TOKENS * self.tail_bytes_per_token

    @cached_property
    def flops_per_token(self) -> float:
        """The linear FLOPs of one token through every unit but the head."""
        return sum(unit.flops_per_token for unit in self.units if not unit.head)

    @cached_property
    def int8_flops_per_token(self) -> float:
        """Those of them that are computed in int8."""
        return sum(unit.int8_flops_per_token for unit in self.units)

    @cached_property
    def has_head(self) -> bool:
        """Whether logits are computed: by every model, but by the last of its stages only."""
        return any(unit.head for unit in self.units)

    @cached_property
    def head_flops_per_token(self) -> float:
        return sum(unit.flops_per_token for unit in self.units if unit.head)

    def to_json(self) -> str:
        """Return the model as JSON; units that differ only in the layer's number are written once, and runs of equal layers as a count."""
        fields = dataclasses.asdict(dataclasses.replace(self, units=())) | dataclasses.asdict(_packed(self.units))
        del fields["units"]
        for name in (_DECODED_FROM, _OPERATIONS, *_EXPERTS):
            if not fields[name]:
                del fields[name]
        for kind in fields["unit_kinds"]:
            if kind[_ENCODED] is None:  # as for most units
                del kind[_ENCODED]
            if not kind[_IN_INT8]:
                del kind[_IN_INT8]
        if self.kv_format is None:
            del fields[_KV_FORMAT]
            for group in fields["kv_groups"]:
                for name in _LOW_BIT:
                    del group[name]
        if self.sparse_attention is None:
            del fields[_SPARSE]
            for group in fields["kv_groups"]:
                for name in _OF_SPARSE:
                    del group[name]
        for group in fields["kv_groups"]:
            if not group[_LAYERS]:
                del group[_LAYERS]
        lists = {name: fields.pop(name) for name in ("kv_groups", "unit_kinds", "unit_runs")}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        lines += [f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, values)) + "\n]" for name, values in lists.items()]
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Return the model that `to_json` wrote.

        Raises:
            OptionError: The text is not a model's JSON, or a key is unknown or missing.
        """
        fields = parsed_json(text, "model")
        try:
            packed = {name: fields.pop(name) for name in ("unit_kinds", "unit_runs") if name in fields}
            for kind in packed.get("unit_kinds", ()):
                kind.setdefault(_ENCODED, None)
                kind.setdefault(_IN_INT8, 0.0)
            fields = {_KV_FORMAT: None, _SPARSE: None, _DECODED_FROM: {}, _OPERATIONS: 0, **dict.fromkeys(_EXPERTS, 0)} | fields
            for group in fields.get("kv_groups", ()):
                group.setdefault(_LAYERS, [])
                for name, default in (_OF_SPARSE | dict.fromkeys(_LOW_BIT, 0)).items():
                    group.setdefault(name, default)
            units = _unpacked(dataclass_from_json(_PackedUnits, packed, "model"))
            return dataclasses.replace(dataclass_from_json(cls, fields | {"units": []}, "model"), units=units)
        except (TypeError, AttributeError, IndexError) as error:
            raise OptionError(f"model: not the JSON of one: {error}") from error


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive layers with equal units.

    Attributes:
        first: The number of the first layer; None for units outside of layers.
        layers: The number of layers.
        kinds: The kinds of the units of each layer, in order, as indices into the list of kinds.
    """

    first: int | None
    layers: int
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _PackedUnits:
    """The units of a model as they are written.

    Attributes:
        unit_kinds: The different units, with "{}" in their names in place of the layer's number.
        unit_runs: The runs of them, in order.
    """

    unit_kinds: tuple[UnitSpec, ...]
    unit_runs: tuple[_Run, ...]


def _packed(units: Iterable[UnitSpec]) -> _PackedUnits:
    kinds: dict[UnitSpec, int] = {}
    numbered: list[tuple[int | None, int]] = []
    for unit in units:
        layer, name = split_name(unit.name)
        numbered.append((layer, kinds.setdefault(dataclasses.replace(unit, name=name), len(kinds))))
    runs: list[_Run] = []
    for layer, members in groupby(numbered, key=itemgetter(0)):
        last, run = runs[-1] if runs else None, _Run(layer, 1, tuple(kind for _, kind in members))
        if last is not None and last.first is not None and (last.first + last.layers, last.kinds) == (run.first, run.kinds):
            runs[-1] = dataclasses.replace(last, layers=last.layers + 1)
        else:
            runs.append(run)
    return _PackedUnits(tuple(kinds), tuple(runs))


def _unpacked(packed: _PackedUnits) -> tuple[UnitSpec, ...]:
    return tuple(
        kind if run.first is None else dataclasses.replace(kind, name=kind.name.replace("{}", str(run.first + layer), 1))
        for run in packed.unit_runs
        for layer in range(run.layers)
        for kind in map(packed.unit_kinds.__getitem__, run.kinds)
    )
