"""Triton's kernels with those for sealed pages.  Sealing and unsealing are operations of torch, over whole pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexgen.kernels.checks import check_prompt, check_sealed_memory, check_sealed_queries, check_shapes, check_stored_part
from flexgen.kernels.codes import GROUP, HeadCodes, SealedPages
from flexgen.kernels.triton.arguments import cap, of_scores, rows_of, seen, sink_logits
from flexgen.kernels.triton.kernels import PlainKernels, covers, latent_arguments, run_latents
from flexgen.kernels.triton.launch import columns, group_rows, options, run_in_parts, tile_tokens
from flexgen.kernels.triton.launch_prompts import StoredPart, run_prefill
from flexgen.kernels.triton.programs import decode_sealed

FLOAT32_BYTES = 4
# Of keys and values together: tiles that are decoded take more fast memory than plain ones, and no model has longer heads.
MOST_COLUMNS, MOST_LATENT_COLUMNS = 512, 576


class TritonKernels(PlainKernels):
    """Attention kernels for tensors on a CUDA device of compute capability 8.0 or more.

    For what they do not cover, which is float64, very long heads, and sealed latents in float32, torch operations are used.
    """

    def decode_sealed_attention(
        self,
        query: Tensor,
        pages: SealedPages,
        tail_keys: Tensor,
        tail_values: Tensor,
        page_tables: Tensor,
        tails: Tensor,
        starts: Tensor,
        lengths: Tensor,
        *,
        scaling: float,
        out: Tensor,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        (num_sequences, heads, key_dim), (_, kv_heads, page_tokens, value_dim) = query.shape, tail_values.shape
        key_columns, value_columns = columns(key_dim, GROUP), columns(value_dim, GROUP)
        if not covers(query, value_dim) or key_columns + value_columns > MOST_COLUMNS:
            where = query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths
            super().decode_sealed_attention(*where, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_sealed_queries(query, tail_keys, tail_values, tails, pages.page_tokens, out)
        what = seen(num_sequences, page_tables, starts, lengths) | {"query": rows_of(query), "tails": tails.contiguous()}
        keys, key_parameters = _codes(pages.keys, pages.key_codes, kv_heads, page_tokens)
        values, value_parameters = _codes(pages.values, pages.value_codes, kv_heads, page_tokens)
        turned = self.rotations(query).contiguous() if pages.key_codes.rotated else None
        rows, tile = group_rows(heads // kv_heads), tile_tokens((key_columns + value_columns) * FLOAT32_BYTES)
        shared: dict[str, Any] = {
            "keys": keys, "key_parameters": key_parameters, "values": values, "value_parameters": value_parameters,
            "KEY_BITS": pages.key_codes.bits, "KEY_CODE_BYTES": pages.key_codes.code_bytes, "KEY_HEAD_BYTES": pages.keys.shape[2],
            "VALUE_BITS": pages.value_codes.bits, "VALUE_CODE_BYTES": pages.value_codes.code_bytes,
            "VALUE_HEAD_BYTES": pages.values.shape[2], "tail_keys": tail_keys, "tail_values": tail_values, "scaling": float(scaling),
            "softcap": cap(softcap),
            "query_stride": what["query"].stride(0), "head_stride": what["query"].stride(1), "table_stride": page_tables.shape[1],
            "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "PAGE_TOKENS": page_tokens,
            "ROWS": rows, "KEY_COLUMNS": key_columns, "VALUE_COLUMNS": value_columns, "TILE": tile,
            "TAIL_TILE": min(tile, columns(page_tokens)), **options(tile * (key_columns + value_columns), rows * value_columns),
        }  # fmt: skip
        by_sequence = what if turned is None else what | {"turned": turned}
        shared |= {"turned": None} if turned is None else {}
        programs = kv_heads * -(-heads // kv_heads // rows)
        positions = (page_tables.shape[1] + 1) * page_tokens  # tables need not have the page of the tail
        run_in_parts(decode_sealed.decode_sealed_attention, programs, by_sequence, shared, sink_logits(sinks, heads), out, positions)

    def decode_sealed_latent_attention(
        self,
        query_latent: Tensor,
        query_rope: Tensor,
        pages: SealedPages,
        tail_keys: Tensor,
        tail_values: Tensor,
        page_tables: Tensor,
        tails: Tensor,
        starts: Tensor,
        lengths: Tensor,
        *,
        scaling: float,
        out: Tensor,
    ) -> None:
        codes = pages.key_codes, pages.value_codes
        num_columns = sum(columns(each.dim, GROUP) for each in codes)
        is_known = query_latent.dtype.itemsize == 2 and all(each.bits == 8 and not each.rotated for each in codes)
        if not is_known or num_columns > MOST_LATENT_COLUMNS or not covers(query_latent, query_rope.shape[2]):
            where = query_latent, query_rope, pages, tail_keys, tail_values, page_tables, tails, starts, lengths
            super().decode_sealed_latent_attention(*where, scaling=scaling, out=out)
            return
        check_shapes(tail_keys=(tail_keys, (None, 1, None, pages.page_tokens)), tails=(tails, (len(query_latent),)))
        what = seen(len(query_latent), page_tables, starts, lengths)
        code_tables, what["tables"] = what["tables"], tails.contiguous()
        shared = latent_arguments(query_latent, query_rope, tail_keys, tail_values, scaling, out)
        latents, latent_parameters = _codes(pages.keys, codes[0], 1, pages.page_tokens)
        ropes, rope_parameters = _codes(pages.values, codes[1], 1, pages.page_tokens)
        tile = tile_tokens(num_columns * FLOAT32_BYTES)
        shared |= {
            "codes": latents, "code_parameters": latent_parameters, "RANK_HEAD_BYTES": pages.keys.shape[2],
            "rope_codes": ropes, "rope_parameters": rope_parameters, "ROPE_HEAD_BYTES": pages.values.shape[2],
            "RANK_COLUMNS": columns(codes[0].dim, GROUP), "ROPE_COLUMNS": columns(codes[1].dim, GROUP), "CODE_TILE": tile,
            "TILE": min(shared["TILE"], columns(pages.page_tokens)), "table_stride": page_tables.shape[1], "num_stages": 1,
        }  # fmt: skip
        by_sequence = {"query": rows_of(query_latent), "query_rope": rows_of(query_rope), "code_tables": code_tables, **what}
        run_latents(by_sequence, shared, out, page_tables.shape[1] + 1)

    def prefill_sealed_attention(
        self,
        query: Tensor,
        stored_key: Tensor,
        stored_value: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        borders: Tensor,
        exact_start: int,
        *,
        scaling: float,
        out: Tensor,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if not covers(query, value.shape[2]):
            what = query, stored_key, stored_value, key, value, starts, borders, exact_start
            super().prefill_sealed_attention(*what, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_prompt(query, key, value, starts, out)
        check_stored_part(query, stored_key, stored_value, borders, value)
        how = of_scores(scaling, softcap, sinks, query.shape[1])
        stored = StoredPart(key=stored_key, value=stored_value, borders=borders, exact_start=exact_start)
        run_prefill(query, rows_of(key), rows_of(value), starts, out, how, stored=stored)


def _codes(memory: Tensor, codes: HeadCodes, heads: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Return codes, signed bytes where they have 8 bits, and their parameters, which lie in the same memory."""
    check_sealed_memory(memory, codes.token_bytes, page_tokens, heads)
    return memory.view(torch.int8) if codes.bits == 8 else memory, memory.view(torch.float16)
