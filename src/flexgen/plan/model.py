"""ModelSpec: what a model costs, as numbers only: bytes, FLOPs and KV, unit by unit.  No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_FORMATS = frozenset({"bfloat16", "float16", "float32", "float64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """The group of weights that moves and becomes ready at once.

    Attributes:
        name: for people, e.g. "layers.3.mlp.up_proj".
        disk_bytes: bytes read from the source each time it streams (alignment included).
        decoded_bytes: bytes once in the compute dtype.
        flops_per_token: multiply-adds count two; of a token that passes through it.
        head: True for vocabulary rows of the output head, computed for sampled positions only.
        plain: whether the stored bytes are used as they are; None where that must be guessed from the sizes.
    """

    name: str
    disk_bytes: int
    decoded_bytes: int
    flops_per_token: float
    head: bool = False
    plain: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroupSpec:
    """Attention layers that share a page-table shape.

    Attributes:
        num_layers: layers of this group that own KV.
        bytes_per_token: KV bytes of one token in ONE layer of the group.
        attention_flops_per_pair: FLOPs of one (query token, visible token) pair in one layer (all heads, both products).
        window: visible tokens, or None for all; chunked attention counts as its chunk size.
    """

    num_layers: int
    bytes_per_token: int
    attention_flops_per_pair: float
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as the planner sees it.

    Attributes:
        name: of the folder or hub repository.
        units: streamed units, in the order in which a pass needs them.
        resident_bytes: small tensors (norms, biases, buffers) that always live on the device.
        embedding_row_bytes: bytes gathered per input token when the embedding is not resident.
        embedding_bytes: the whole input embedding (0 when it is tied to the head's units).
        hidden_size, vocab_size, intermediate_size: for activation memory.
        max_position_embeddings: the model's context.
        number_format: of the stored weights: a dtype (that of most bytes), or a published low-bit format ("mxfp4", "fp8_block").
        dtype: computed in; decoded bytes, resident bytes and KV are of it.
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

    @property
    def is_plain(self) -> bool:
        """Whether the weights are stored as plain numbers.  Others can be planned for, but not run yet."""
        return self.number_format in PLAIN_FORMATS

    @property
    def streamed_bytes(self) -> int:
        """Bytes one pass reads when nothing is resident."""
        return sum(unit.disk_bytes for unit in self.units)

    @property
    def decoded_bytes(self) -> int:
        return sum(unit.decoded_bytes for unit in self.units)

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all layers, windows ignored."""
        return sum(group.num_layers * group.bytes_per_token for group in self.kv_groups)

    def kv_bytes(self, num_tokens: int) -> int:
        """KV bytes of a sequence of `num_tokens`, windows honoured, pages ignored."""
        return sum(g.num_layers * g.bytes_per_token * min(num_tokens, g.window or num_tokens) for g in self.kv_groups)

    def flops_per_token(self) -> float:
        """Linear FLOPs of one token through every unit but the head."""
        return sum(unit.flops_per_token for unit in self.units if not unit.head)

    def head_flops_per_token(self) -> float:
        return sum(unit.flops_per_token for unit in self.units if unit.head)
