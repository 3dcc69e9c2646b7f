"""`generate` of transformers, timed token by token, wherever a peer keeps the weights.  Knows nothing of flexgen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A batch that was answered, with fewer tokens each than it should have, maybe.

    Attributes:
        requests: The sequences of the batch.
        tokens: The tokens that each of them was given.
        prefill_seconds: The time until the first of them.
        decode_seconds: The time of the others.
    """

    requests: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float

    def seconds(self, output_tokens: int) -> float:
        """Return the time that so many tokens each would have taken; later ones count as those that were timed."""
        return self.prefill_seconds + self.decode_seconds * (output_tokens - 1) / max(self.tokens - 1, 1)


def timed_generation(model: Any, ids: torch.Tensor, tokens: int) -> Timed:
    """Have a model of transformers generate exactly so many tokens for each row of `ids`, greedily, and return the times.

    Args:
        model: The model, wherever its weights are.
        ids: The prompts, all of one length, where the model takes them.
        tokens: The tokens of each answer.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        """Called by `generate` after every token; notes when, stops nothing."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:  # pyright: ignore
            done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            input_ids[0, -1].item()  # a device has computed it
            times.append(time.perf_counter())
            return done

    start = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )  # fmt: skip
    end = time.perf_counter()
    assert output.shape[1] - ids.shape[1] == tokens == len(times), (output.shape, len(times))
    return Timed(requests=len(ids), tokens=tokens, prefill_seconds=times[0] - start, decode_seconds=end - times[0])
