"""Everything that travels between stages arrives as it was sent, through JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.distributed.messages import (
    answer_message,
    error_message,
    for_next_stage,
    plan_message,
    read_answer,
    read_error,
    read_masks,
    read_plan,
    read_request,
    request_message,
)
from flexgen.engine.choosing import BatchAnswer
from flexgen.engine.sampler import Sampled
from flexgen.errors import RequestError
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.request import Generated, TokenLogprobs, TokenRequest

small = st.integers(0, 1 << 40)
tuples = st.lists(small, max_size=4).map(tuple)
floats = st.floats(allow_nan=False)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@st.composite
def slices(draw: Any) -> Slice:
    first = draw(small)
    return Slice(
        sequence=draw(small), token_ids=draw(tuples), start=draw(small), prompt_len=draw(small), total=draw(small),
        wanted=range(first, first + draw(st.integers(0, 2))), scored=draw(tuples), targets=draw(tuples),
        num_likeliest=draw(st.integers(-1, 5)), tables=draw(st.lists(tuples, max_size=3).map(tuple)),
    )  # fmt: skip


batches = st.builds(
    MicroBatch,
    home=st.sampled_from(("device", "host", "disk")), slices=st.lists(slices(), max_size=3).map(tuple), after=tuples,
    filler=st.integers(0, 1),
)  # fmt: skip


@given(st.lists(batches, max_size=3).map(tuple))
def test_plans_of_all_stages_arrive(micro_batches: tuple[MicroBatch, ...]) -> None:
    def elsewhere(batch: MicroBatch) -> MicroBatch:
        slices = tuple(
            Slice(
                sequence=each.sequence, token_ids=each.token_ids, start=each.start, prompt_len=each.prompt_len, total=each.total,
                wanted=each.wanted, scored=each.scored, targets=each.targets, num_likeliest=each.num_likeliest, tables=((7, -1), (3,)),
            )
            for each in batch.slices
        )  # fmt: skip
        return MicroBatch(home="disk", slices=slices, after=batch.after, filler=batch.filler)

    one, other = PassPlan(micro_batches=micro_batches), PassPlan(micro_batches=tuple(map(elsewhere, micro_batches)))
    message = through_json(plan_message([one, other]))
    assert read_plan(message) == one
    assert read_plan(through_json(for_next_stage(message))) == other


@given(
    prompt=st.lists(small, min_size=1, max_size=5).map(tuple),
    numbers=st.tuples(floats, floats, floats, floats),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_ids=st.frozensets(small, max_size=4),
    bias=st.lists(st.tuples(small, floats), max_size=3).map(tuple),
    allowed=st.none() | tuples,
    bad=st.lists(tuples, max_size=3).map(tuple),
    generated=tuples,
)
def test_requests_arrive_with_all_that_sampling_needs(
    prompt: Any, numbers: Any, seed: int, stop_ids: Any, bias: Any, allowed: Any, bad: Any, generated: Any
) -> None:
    presence, frequency, repetition, temperature = numbers
    request = TokenRequest(
        index=3, prompt_token_ids=prompt, max_tokens=9, presence_penalty=presence, frequency_penalty=frequency,
        repetition_penalty=repetition, temperature=temperature, top_k=4, min_tokens=2, seed=seed, stop_token_ids=stop_ids, logit_bias=bias,
        allowed_token_ids=allowed, bad_words_token_ids=bad, num_logprobs=None, generated=Generated(token_ids=generated),
    )  # fmt: skip
    arrived, before = read_request(through_json(request_message(request)))
    assert before == list(generated)
    assert arrived.guide is None
    for name in TokenRequest.__slots__:
        if name != "generated":
            assert getattr(arrived, name) == getattr(request, name), name


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_of_guides_arrive(allowed: list[bool]) -> None:
    error = RequestError("no", code="grammar", param="structured_outputs")
    mask = torch.from_numpy(np.packbits(np.array(allowed)))
    found = read_masks(through_json([[5, [0, len(allowed)]], [8, error_message(error)]]), [mask])
    arrived = found[5]
    assert isinstance(arrived, np.ndarray)
    assert arrived.tolist() == allowed
    assert str(found[8]) == "no"


def test_a_guided_request_arrives_with_the_guide_of_its_leader() -> None:
    class Guide:
        def prepare(self, token_ids: Any) -> None: ...
        def allowed(self, token_ids: Any) -> np.ndarray:
            return np.ones(3, bool)

        def is_complete(self, token_ids: Any) -> bool:
            return False

        def forget(self) -> None: ...

    request = TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=2, guide=Guide())
    arrived, _ = read_request(through_json(request_message(request)))
    guide: Any = arrived.guide
    guide.mask = np.array([True, False])
    assert guide.allowed([1]).tolist() == [True, False]
    guide.mask = RequestError("no", code="grammar")
    with pytest.raises(RequestError, match="no"):
        guide.allowed([1])


logprobs = st.builds(
    TokenLogprobs, token_ids=tuples, logprobs=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple), rank=st.none() | small
)


@given(st.lists(logprobs, max_size=3), st.lists(st.builds(Sampled, small, st.none() | logprobs), max_size=3))
def test_answers_arrive(scores: list[TokenLogprobs], chosen: list[Sampled]) -> None:
    assert read_answer(through_json(answer_message(BatchAnswer(scores=list(scores), chosen=list(chosen))))) == BatchAnswer(
        scores=list(scores), chosen=list(chosen)
    )


def test_errors_of_rows_arrive() -> None:
    error = RequestError("not finite", code="non_finite_logits", param="x")
    answer = read_answer(through_json(answer_message(BatchAnswer(scores=[error], chosen=[error, Sampled(4)]))))
    for each in (answer.scores[0], answer.chosen[0], read_error(error_message(error))):
        assert isinstance(each, RequestError)
        assert (str(each), each.code, each.param) == ("not finite", "non_finite_logits", "x")
    assert answer.chosen[1] == Sampled(4)
