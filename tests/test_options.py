"""Options that have no meaning together are refused, never ignored."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.errors import OptionError
from flexgen.options import EngineOptions


@pytest.mark.parametrize("schedule", ["zigzag", "row"])
def test_a_quota_is_for_the_diagonal_schedule(schedule: str) -> None:
    with pytest.raises(OptionError, match="prefill_tokens"):
        EngineOptions(schedule=schedule, prefill_tokens=100)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host_mem": "10"}, "did you mean 10GiB"),
        ({"host_mem": "16000"}, "did you mean 16000MiB"),
        ({"host_mem": "10K"}, "did you mean 10GiB"),
        ({"host_mem": 10}, "did you mean 10GiB"),
        ({"device_mem": "8"}, "did you mean 8GiB"),
        ({"disk": "100B"}, "did you mean 100MiB"),
        ({"disk": "many"}, "not a size"),
        ({"disk": "101%"}, "more than 100 %"),
        ({"host_mem": 4e9}, "not a size"),
    ],
)
def test_budgets_that_nobody_means(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        EngineOptions(**given)


@pytest.mark.parametrize("given", [{"host_mem": "64MiB"}, {"host_mem": "1.5G"}, {"disk": "0"}, {"device_mem": "50%"}, {"disk": 1 << 30}])
def test_budgets_that_somebody_may_mean(given: dict[str, Any]) -> None:
    EngineOptions(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "host=2"}, "weights='host=2': a share must be between 0 and 1"),
        ({"weights": "gpu=1"}, "'gpu' is not a tier"),
        ({"kv": "host"}, "'host' is not a share"),
        ({"kv": "host=50%"}, "'50%' is not a share"),
        ({"kv": "host=.5,host=.5"}, "host is there twice"),
        ({"weights": "host=.5"}, "add up to 0.5, not 1"),
        ({"host_mem": "0"}, "host_mem='0' leaves no memory"),
        ({"host_mem": 0}, "leaves no memory"),
    ],
)
def test_placements_and_budgets_are_looked_at_before_anything_is_read(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        EngineOptions(**given)
    assert said in str(caught.value)
