"""Tokens into pages and out of them.  Bytes are only moved, so elements are integers of their size."""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.errors import EngineError
from flexgen.kernels.cpu.rows import moved, page_and_next, pointer


@entry
def write_kv(begin: int, end: int, key: Any, value: Any, key_pages: Any, value_pages: Any, page_ids: Any, page_offsets: Any) -> None:
    """Store tokens begin <= token < end, in runs that are adjacent in one page."""
    num_pages, kv_heads, key_dim, page_tokens = key_pages.shape
    value_dim = value_pages.shape[3]
    token = begin
    while token < end:
        page, offset, run = page_ids[token], page_offsets[token], 1
        while token + run < end and page_ids[token + run] == page and page_offsets[token + run] == offset + run:
            run += 1
        if page < 0 or page >= num_pages or offset < 0 or offset + run > page_tokens:
            raise EngineError("a new token's place is not in the pool")
        for head in range(kv_heads):
            source, place = token * kv_heads + head, page * kv_heads + head
            keys = pointer(key_pages, place * key_dim * page_tokens + offset)
            values = pointer(value_pages, (place * page_tokens + offset) * value_dim)
            for i in range(run):
                scatter(pointer(key, (source + i * kv_heads) * key_dim), moved(keys, i), key_dim, page_tokens)
                copy(pointer(value, (source + i * kv_heads) * value_dim), moved(values, i * value_dim), value_dim)
        token += run


@entry
def gather_kv(begin: int, end: int, key_pages: Any, value_pages: Any, page_table: Any, start: int, key: Any, value: Any) -> None:
    """Copy positions start + begin <= position < start + end to rows begin <= row < end of `key` and `value`."""
    num_pages, kv_heads, key_dim, page_tokens = key_pages.shape
    value_dim = value_pages.shape[3]
    row = begin
    while row < end:
        index, offset = (start + row) // page_tokens, (start + row) % page_tokens
        page, _ = page_and_next(pointer(page_table, 0), index, index, num_pages)
        run = min(page_tokens - offset, end - row)
        for head in range(kv_heads):
            target, place = row * kv_heads + head, page * kv_heads + head
            keys = pointer(key_pages, place * key_dim * page_tokens + offset)
            values = pointer(value_pages, (place * page_tokens + offset) * value_dim)
            for i in range(run):
                collect(moved(keys, i), pointer(key, (target + i * kv_heads) * key_dim), key_dim, page_tokens)
                copy(moved(values, i * value_dim), pointer(value, (target + i * kv_heads) * value_dim), value_dim)
        row += run


@njit
def copy(source: Any, target: Any, size: int) -> None:
    """Copy adjacent elements."""
    for i in range(size):
        target[i] = source[i]


@njit
def scatter(source: Any, target: Any, size: int, stride: int) -> None:
    """Copy a row into a column."""
    for i in range(size):
        target[i * stride] = source[i]


@njit
def collect(source: Any, target: Any, size: int, stride: int) -> None:
    """Copy a column into a row."""
    for i in range(size):
        target[i] = source[i * stride]
