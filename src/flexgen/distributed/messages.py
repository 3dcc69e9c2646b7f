"""What travels between pipeline stages, as JSON values: the plan of a pass, requests as sampling needs them, and what was computed.

Nothing here refers to live objects.  A value that is read has the types that it was written with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flexgen.engine.choosing import BatchAnswer
from flexgen.engine.sampler import Sampled
from flexgen.errors import RequestError
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.request import Generated, Guide, TokenLogprobs, TokenRequest

Message = dict[str, Any]

# The fields of a request that only its leader needs.
_OF_LEADER = ("stops", "guide", "generated")
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(TokenRequest)}


# -- the plan of a pass -----------------------------------------------------------------------------------------------------------------


def plan_message(plans: Sequence[PassPlan]) -> Message:
    """Return the plans of the same pass on several stages as one message; they differ in homes and page tables only.

    Args:
        plans: The plan of each stage, in their order; at least one.
    """
    return {
        "batches": [[list(batch.after), batch.filler, [_slice_message(each) for each in batch.slices]] for batch in plans[0].micro_batches],
        "stages": [[[batch.home, [each.tables for each in batch.slices]] for batch in plan.micro_batches] for plan in plans],
    }


def read_plan(message: Message) -> PassPlan:
    """Return the plan of the first stage of a message."""
    batches: list[MicroBatch] = []
    for (after, filler, slices), (home, tables) in zip(message["batches"], message["stages"][0], strict=True):
        own = tuple(_read_slice(each, its_tables) for each, its_tables in zip(slices, tables, strict=True))
        batches.append(MicroBatch(home=home, slices=own, after=tuple(after), filler=filler))
    return PassPlan(micro_batches=tuple(batches))


def for_next_stage(message: Message) -> Message:
    """Return the message without its first stage."""
    return message | {"stages": message["stages"][1:]}


def _slice_message(each: Slice) -> list[Any]:
    wanted = (each.wanted.start, each.wanted.stop)
    return [
        each.sequence, each.token_ids, each.start, each.prompt_len, each.total, *wanted, each.scored, each.targets, each.num_likeliest,
    ]  # fmt: skip


def _read_slice(message: list[Any], tables: list[list[int]]) -> Slice:
    sequence, token_ids, start, prompt_len, total, first, stop, scored, targets, num_likeliest = message
    return Slice(
        sequence=sequence, token_ids=tuple(token_ids), start=start, prompt_len=prompt_len, total=total, wanted=range(first, stop),
        scored=tuple(scored), targets=tuple(targets), num_likeliest=num_likeliest, tables=tuple(map(tuple, tables)),
    )  # fmt: skip


# -- requests ---------------------------------------------------------------------------------------------------------------------------


def request_message(request: TokenRequest) -> Message:
    """Return what choosing tokens needs of a request: all but its stop strings, its guide, and log probabilities of earlier runs."""
    fields = {name: value for name in _DEFAULTS if name not in _OF_LEADER and (value := getattr(request, name)) != _DEFAULTS[name]}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = sorted(request.stop_token_ids)
    return fields | {"has_guide": request.guide is not None, "generated": list(request.generated.token_ids)}


def read_request(message: Message) -> tuple[TokenRequest, list[int]]:
    """Return a request of a message, and the tokens that were generated for it before."""
    fields = {name: _frozen(value) for name, value in message.items() if name not in ("has_guide", "generated")}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = frozenset(fields["stop_token_ids"])
    guide = ShippedGuide() if message["has_guide"] else None
    return TokenRequest(**fields, guide=guide, generated=Generated()), list(message["generated"])


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class ShippedGuide(Guide):
    """A guide whose leader says which tokens may come next.

    Attributes:
        mask: Whether each token of the vocabulary may come next, (vocab,) bool; or the error that its leader found.
    """

    def __init__(self) -> None:
        self.mask: np.ndarray | RequestError = np.zeros(0, bool)

    def prepare(self, token_ids: Sequence[int]) -> None:
        pass

    def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
        if isinstance(self.mask, RequestError):
            raise self.mask
        return self.mask

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        return False

    def forget(self) -> None:
        pass


def read_masks(guided: Sequence[Sequence[Any]], masks: Sequence[torch.Tensor]) -> dict[int, np.ndarray | RequestError]:
    """Return, for each guided sequence, whether each token may come next, (vocab,) bool, or its error."""
    found: dict[int, np.ndarray | RequestError] = {}
    for sequence_id, told in guided:
        if isinstance(told, dict):
            found[sequence_id] = read_error(told)
        else:
            place, count = told
            found[sequence_id] = np.unpackbits(masks[place].numpy(), count=count).astype(bool)
    return found


# -- what was computed ------------------------------------------------------------------------------------------------------------------


def answer_message(answer: BatchAnswer) -> Message:
    """Return what the last stage has found for a micro-batch."""
    return {
        "scores": [error_message(each) if isinstance(each, RequestError) else _logprobs_message(each) for each in answer.scores],
        "chosen": [
            error_message(each)
            if isinstance(each, RequestError)
            else [each.token_id, None if each.logprobs is None else _logprobs_message(each.logprobs)]
            for each in answer.chosen
        ],
    }


def read_answer(message: Message) -> BatchAnswer:
    """Return the answer of a message."""
    return BatchAnswer(
        scores=[read_error(each) if isinstance(each, dict) else _read_logprobs(each) for each in message["scores"]],
        chosen=[
            read_error(each) if isinstance(each, dict) else Sampled(each[0], None if each[1] is None else _read_logprobs(each[1]))
            for each in message["chosen"]
        ],
    )


def _logprobs_message(logprobs: TokenLogprobs) -> list[Any]:
    return [logprobs.token_ids, logprobs.logprobs, logprobs.rank]


def _read_logprobs(message: list[Any]) -> TokenLogprobs:
    token_ids, logprobs, rank = message
    return TokenLogprobs(token_ids=tuple(token_ids), logprobs=tuple(logprobs), rank=rank)


def error_message(error: RequestError) -> Message:
    """Return the error of one request."""
    return {"message": str(error), "code": error.code, "param": error.param}


def read_error(message: Mapping[str, Any]) -> RequestError:
    """Return the error of a message."""
    return RequestError(message["message"], code=message["code"], param=message["param"])
