"""A fake engine that also scores choices, for tests of tables."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import FakeEngine

from flexgen.plan.workload import Workload
from flexgen.request import TokenLogprobs, TokenRequest, TokenResult


def fake_score(prompt: Sequence[int], choice: Sequence[int]) -> float:
    """The log probability of a choice, which is as odd as it must be to depend on the prompt."""
    return -sum(0.1 + (sum(prompt) + 7 * token_id) % 11 for token_id in choice)


class ScoringEngine(FakeEngine):
    """Scores choices by `fake_score`."""

    def _answer(self, request: TokenRequest) -> TokenResult:
        if request.num_prompt_logprobs is None:
            return super()._answer(request)
        tokens, start = request.prompt_token_ids, request.first_scored
        if request.alternatives:
            scored = [fake_score(tokens, [token]) for token in request.alternatives]
        else:  # a choice of several tokens, of which the first is among the alternatives of another request
            scored = [fake_score(tokens[: start - 1], [token]) for token in tokens[start:]]
        return TokenResult(
            index=request.index, prompt_logprobs=tuple(TokenLogprobs(token_ids=(0, 0), logprobs=(each, each), rank=None) for each in scored)
        )


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Every engine that a test opens, in order; all fake, and able to score."""
    opened: list[FakeEngine] = []

    def open_engine(files: object, options: object, workload: Workload) -> FakeEngine:
        opened.append(ScoringEngine(workload))
        return opened[-1]

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    return opened
