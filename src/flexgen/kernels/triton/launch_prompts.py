"""How prefill attention is launched: for one prompt whose keys and values are given, or for all those of a micro-batch in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexgen.kernels.prompts import SHORT_TILE_ROWS, TILE_ROWS, PagedPrompts
from flexgen.kernels.triton.arguments import rows_of
from flexgen.kernels.triton.grids import ALIGNMENT, on_grid
from flexgen.kernels.triton.launch import columns, options, tile_tokens
from flexgen.kernels.triton.programs.prefill import prefill_attention

QUERY_BYTES = 16 << 10  # of a tile of queries


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """What queries see as it was stored, of the positions before `exact_start` and of those before each query's own page.

    Attributes:
        key: The keys, (D, K, Dk), of positions from the first on.
        value: The values, (D, K, Dv).
        borders: The first position of each query's own page, int64 (T,).
        exact_start: The position of the first of the other keys.
    """

    key: Tensor
    value: Tensor
    borders: Tensor
    exact_start: int


def run_prefill(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, out: Tensor, how: dict[str, Any], *, prompts: PagedPrompts | None = None,
    stored: StoredPart | None = None,
) -> None:  # fmt: skip
    """Launch prefill attention: of one prompt, whose keys and values (N, K, dim) are given, or of several in pages.

    Args:
        query: The queries, (T, H, Dk).
        key: The keys, (N, K, Dk) with contiguous heads; with `prompts` the pages of keys.
        value: The values; with `prompts` the pages of values.
        starts: The first position that each query sees, (T,).
        out: The results, (T, H, Dv).
        how: Scaling, cap and sinks of the scores.
        prompts: The prompts in pages.
        stored: What the queries of one prompt see as it was stored.
    """
    (num_queries, heads, key_dim), value_dim, query = query.shape, out.shape[2], rows_of(query)
    if not num_queries:
        return
    key_columns, value_columns = columns(key_dim), columns(value_dim)
    most_rows = max(QUERY_BYTES // (key_columns * query.dtype.itemsize), SHORT_TILE_ROWS)
    tile_rows = prompts.tile_rows if prompts is not None else TILE_ROWS if num_queries > SHORT_TILE_ROWS else SHORT_TILE_ROWS
    rows, token_bytes = min(tile_rows, most_rows), (key_columns + value_columns) * query.dtype.itemsize
    tile = tile_tokens(token_bytes)
    query_bytes = rows * key_columns * query.dtype.itemsize
    paged: dict[str, Any] = {"tiles": None, "tables": None, "table_stride": 0, "PAGE_TOKENS": 1, "KV_HEADS": key.shape[1]}
    if prompts is not None:
        paged |= {"tiles": prompts.tiles, "tables": prompts.page_tables, "table_stride": prompts.page_tables.shape[1]}
        paged |= {"PAGE_TOKENS": key.shape[3]}
    num_programs = -(-num_queries // rows) if prompts is None else len(prompts.tiles) * (tile_rows // rows)
    row_bytes = heads * value_dim * out.element_size()
    found = out if row_bytes % ALIGNMENT == 0 else out.new_empty(out.shape)  # rows of any micro-batch, aligned
    on_grid(prefill_attention, (num_programs, heads), out.device)(
        query, key, value, starts.contiguous(), out=found, num_queries=num_queries, num_keys=key.shape[0], **how, **paged,
        **_stored_arguments(stored), **_strides("query", query), **_strides("key", key), **_strides("value", value),
        HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, ROWS=rows, TILE_ROWS=tile_rows, KEY_COLUMNS=key_columns,
        VALUE_COLUMNS=value_columns, TILE=tile, **options(tile * token_bytes, rows * value_columns, query_bytes),
    )  # fmt: skip
    if found is not out:
        out.copy_(found)


def _stored_arguments(stored: StoredPart | None) -> dict[str, Any]:
    if stored is None:
        nothing: dict[str, Any] = {"stored_key": None, "stored_value": None, "borders": None, "exact_start": 0, "num_stored": 0}
        return nothing | {f"stored_{name}_stride": 0 for name in ("key", "key_head", "value", "value_head")}
    key, value = rows_of(stored.key), rows_of(stored.value)
    given: dict[str, Any] = {"stored_key": key, "stored_value": value, "borders": stored.borders.contiguous()}
    given |= {"exact_start": stored.exact_start, "num_stored": len(key)}
    return given | _strides("stored_key", key) | _strides("stored_value", value)


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_stride": tensor.stride(0), f"{name}_head_stride": tensor.stride(1)}
