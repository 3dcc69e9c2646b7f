"""A fake engine that also scores choices, for tests of tables."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import FakeEngine, open_fakes

from flexgen.request import TokenLogprobs, TokenRequest, TokenResult


def fake_score(prompt: Sequence[int], choice: Sequence[int]) -> float:
    """The log probability of a choice, which depends on its tokens and on the first of the prompt."""
    return -sum(0.1 + (31 * prompt[0] + 7 * token_id) % 11 for token_id in choice)


class ScoringEngine(FakeEngine):
    """Scores choices by `fake_score`."""

    def _answer(self, request: TokenRequest) -> TokenResult:
        if request.num_prompt_logprobs is None:
            return super()._answer(request)
        scored = (*request.prompt_token_ids[request.first_scored :], *(request.alternatives or ()))
        scores = [(token, fake_score(request.prompt_token_ids, [token])) for token in scored]
        found = tuple(TokenLogprobs(token_ids=(token, token), logprobs=(score, score), rank=None) for token, score in scores)
        return TokenResult(index=request.index, prompt_logprobs=found)


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Every engine that a test opens, in order; all fake, and able to score."""
    return open_fakes(monkeypatch, ScoringEngine)
