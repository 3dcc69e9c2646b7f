"""Rotary frequencies that depend on a sequence's length, chosen for each sequence independently of its neighbours.

transformers takes the largest position of the whole call as the length (LongRoPE, dynamic NTK).  In a packed
micro-batch that could be another sequence's, so the rotary module is called once for each run of tokens of equal length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from flexgen.errors import CheckpointError
from flexgen.models.coroutine import current_forward
from flexgen.passes.plan import Slice

RECOMPUTING = frozenset({"phi3", "phi4_multimodal", "phimoe"})

Run = tuple[int, int]  # (tokens, the sequence length that transformers would see)


def recompute_length(config: Any) -> int | None:
    """Return the length beyond which the model's `generate` computes a sequence anew; None if it never does."""
    text = config.get_text_config(decoder=True)
    if config.model_type not in RECOMPUTING or not _types(getattr(text, "rope_parameters", None)):
        return None
    return getattr(text, "original_max_position_embeddings", None)


def rope_regime(config: Any) -> Callable[[int], Hashable]:
    """Return a function from the length of a prompt to a key of the rotary frequencies.

    Where these keys are equal, equal tokens have equal attention keys.
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None)
    kinds = _types(parameters)
    if not kinds:
        return lambda length: None
    return functools.partial(_frequencies, _thresholds(parameters, text.max_position_embeddings), "dynamic" in kinds)


def _types(parameters: Any) -> set[str]:
    """Return the length-dependent rope types among rope parameters, which may be one level down, by layer type."""
    if not isinstance(parameters, dict):
        return set()
    if "rope_type" not in parameters:
        return set().union(*(_types(each) for each in parameters.values()))
    return {parameters["rope_type"]} & {"longrope", "dynamic"}


def check_factors(model: nn.Module) -> None:
    """Refuse lists of factors that differ in length from the frequencies they scale; a single number would silently scale all.

    Raises:
        CheckpointError: The lengths differ; the message names both.
    """
    for module in model.modules():
        frequencies = module._buffers.get("inv_freq")
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        if frequencies is None or not isinstance(parameters, dict):
            continue
        for name in ("short_factor", "long_factor"):
            factors = parameters.get(name)
            if isinstance(factors, list) and len(factors) != frequencies.numel():
                raise CheckpointError(
                    f"config.json has {len(factors)} numbers in {name} of rope_parameters; the model has {frequencies.numel()} frequencies"
                )


def isolate_sequences(model: nn.Module, *, recomputes: bool) -> None:
    """Make every length-dependent rotary module of `model` treat each sequence by itself.

    Args:
        model: The model.
        recomputes: Whether a sequence that grows beyond the threshold is computed anew.  If not, each of its tokens keeps
            the frequencies of the length at which it was computed first.
    """
    for module in model.modules():
        rope_type: Any = getattr(module, "rope_type", None)
        kinds = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
        if kinds & {"longrope", "dynamic"}:
            module.forward = functools.partial(_by_sequence, module, module.forward, recomputes)


def _by_sequence(
    module: Any, forward: Callable[..., Any], recomputes: bool, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Call the module's forward on each run of tokens, with the last position of their sequence appended as the longest."""
    parts, row = [], 0
    for count, length in _merged(_runs(current_forward().slices(), recomputes), module):
        last = position_ids.new_full((1, 1), length - 1)
        _forget_lengths(module)
        out = forward(x, torch.cat([position_ids[:, row : row + count], last], dim=1), *args, **kwargs)
        parts.append(tuple(each[:, :-1] for each in out) if isinstance(out, tuple) else (out[:, :-1],))
        row += count
    joined = [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
    return tuple(joined) if len(joined) > 1 else joined[0]


def _runs(slices: Sequence[Slice], recomputes: bool) -> Iterator[Run]:
    """Yield runs of tokens with their length: a prompt has its own, a generated token that of the sequence up to it."""
    for each in slices:
        if recomputes:
            yield each.length, each.total
            continue
        in_prompt = min(max(each.prompt_len - each.start, 0), each.length)
        if in_prompt:
            yield in_prompt, each.prompt_len
        yield from ((1, position + 1) for position in range(each.start + in_prompt, each.stop))


def _merged(runs: Iterator[Run], module: Any) -> Iterator[Run]:
    """Merge adjacent runs that get the same frequencies."""
    thresholds = _thresholds(module.config.rope_parameters, module.original_max_seq_len)
    dynamic = "dynamic" in str(module.rope_type)
    for _, group in groupby(runs, key=lambda run: _frequencies(thresholds, dynamic, run[1])):
        members = list(group)
        yield sum(count for count, _ in members), max(length for _, length in members)


def _frequencies(thresholds: Sequence[int], dynamic: bool, length: int) -> Hashable:
    """Return a key of the frequencies for a length: LongRoPE has two sets, dynamic NTK one per length above the threshold."""
    return max(length, min(thresholds)) if dynamic else tuple(length > each for each in thresholds)


def _thresholds(parameters: Any, context: int) -> list[int]:
    """Return the lengths up to which frequencies do not change; `context` if the parameters state none."""
    nested = [parameters] if "rope_type" in parameters else list(parameters.values())
    return [each.get("original_max_position_embeddings") or context for each in nested]


def _forget_lengths(module: Any) -> None:
    """Reset the state that dynamic NTK keeps from earlier calls."""
    if "dynamic" not in str(module.rope_type):
        return
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name in [name for name in module._buffers if name.endswith("inv_freq") and "original" not in name]:
        module._buffers[name] = getattr(module, name.replace("inv_freq", "original_inv_freq")).to(module._buffers[name].device)
