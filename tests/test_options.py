"""Options that have no meaning together are refused, never ignored."""

from __future__ import annotations

import pytest

from flexgen.errors import OptionError
from flexgen.options import EngineOptions


@pytest.mark.parametrize("schedule", ["zigzag", "row"])
def test_a_quota_is_for_the_diagonal_schedule(schedule: str) -> None:
    with pytest.raises(OptionError, match="prefill_tokens"):
        EngineOptions(schedule=schedule, prefill_tokens=100)
