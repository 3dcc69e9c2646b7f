"""The client, executor and runner inside HELM itself, where it is installed (in an environment of its own, docs/helm.md)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm.benchmark.run", reason="needs crfm-helm==0.5.16")
pytestmark = pytest.mark.filterwarnings("default")  # HELM's own, and those of its dependencies

from helm.benchmark.adaptation.adapter_spec import AdapterSpec  # noqa: E402
from helm.benchmark.adaptation.request_state import RequestState  # noqa: E402
from helm.benchmark.adaptation.scenario_state import ScenarioState  # noqa: E402
from helm.benchmark.executor import ExecutionSpec, ExecutorError  # noqa: E402
from helm.benchmark.model_deployment_registry import get_model_deployment  # noqa: E402
from helm.benchmark.scenarios.scenario import Input, Instance  # noqa: E402
from helm.benchmark.tokenizer_config_registry import get_tokenizer_config  # noqa: E402
from helm.common.authentication import Authentication  # noqa: E402
from helm.common.cache import SqliteCacheConfig  # noqa: E402
from helm.common.cache_backend_config import SqliteCacheBackendConfig  # noqa: E402
from helm.common.request import Request  # noqa: E402

from flexgen.evaluation import helm_client  # noqa: E402
from flexgen.evaluation.helm import FlexGenClient, FlexGenExecutor  # noqa: E402
from flexgen.evaluation.helm_batches import Answerer  # noqa: E402

OPTIONS: dict[str, Any] = {"dtype": "float32", "host_mem": "2GiB"}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches that are answered."""
    sizes: list[int] = []

    class Counting(Answerer):
        def answer(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(requests))
            return super().answer(requests, *args, **kwargs)

    monkeypatch.setattr(helm_client, "Answerer", Counting)
    return sizes


@pytest.fixture
def client(novels_opt: Path, tmp_path: Path) -> Iterator[FlexGenClient]:
    cache = SqliteCacheConfig(path=str(tmp_path / "cache.sqlite"))
    made = FlexGenClient(cache, "novels/opt", pretrained_model_name_or_path=str(novels_opt), gather_seconds=1.0, **OPTIONS)
    yield made
    made.close()


def test_requests_of_many_threads_are_answered_together_and_cached(client: FlexGenClient, batches: list[int]) -> None:
    requests = [Request(model="novels/opt", prompt=f"It was {number}", max_tokens=3) for number in range(8)]
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda number=number: results.update({number: client.make_request(requests[number])}))
        for number in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(batches) == 8
    assert len(batches) < 8
    assert all(result.success and not result.cached and result.completions[0].text for result in results.values())
    again = client.make_request(requests[0])
    assert again.cached
    assert again.completions == results[0].completions
    assert sum(batches) == 8


def test_what_fails_is_told_and_neither_retried_nor_cached(client: FlexGenClient, batches: list[int]) -> None:
    for _ in range(2):
        result = client.make_request(Request(model="novels/opt", prompt="word " * 600, max_tokens=2))
        assert not result.success
        assert "context" in (result.error or "")
        assert result.error_flags is not None
        assert result.error_flags.is_retriable is False
    assert batches == [1, 1]
    assert not client.make_request(Request(model="novels/opt", embedding=True)).success


def scenario_state(deployment: str, *requests: Request) -> ScenarioState:
    states = [
        RequestState(
            instance=Instance(Input(text=str(number)), references=[]), reference_index=None, request_mode=None, train_trial_index=0,
            output_mapping=None, request=request, result=None, num_train_instances=0, prompt_truncated=False,
        )
        for number, request in enumerate(requests)
    ]  # fmt: skip
    return ScenarioState(adapter_spec=AdapterSpec(model_deployment=deployment), request_states=states)


def test_a_scenario_state_is_answered_at_once(novels_opt: Path, tmp_path: Path, batches: list[int]) -> None:
    deployment = f"flexgen/{novels_opt}"
    prompts = [Request(model_deployment=deployment, prompt=f"It was {number}", max_tokens=3, temperature=0) for number in range(5)]
    scores = Request(model_deployment=deployment, prompt="It was dark", max_tokens=0, echo_prompt=True)
    cache = SqliteCacheBackendConfig(path=str(tmp_path))
    spec = ExecutionSpec(
        url=None, auth=Authentication(""), local_path=str(tmp_path / "env"), parallelism=1, sqlite_cache_backend_config=cache
    )  # fmt: skip
    executor = FlexGenExecutor(spec)
    done = executor.execute(scenario_state(deployment, *prompts, scores, prompts[0])).request_states
    assert batches == [7]
    results = [state.result for state in done]
    assert all(result is not None and result.success for result in results)
    assert results[0].completions == results[6].completions  # pyright: ignore[reportOptionalMemberAccess]
    assert [token.text for token in results[5].completions[0].tokens] == ["It", " was", " dark"]  # pyright: ignore[reportOptionalMemberAccess]
    again = FlexGenExecutor(spec).execute(scenario_state(deployment, *prompts)).request_states
    assert all(state.result is not None and state.result.cached for state in again)
    assert batches == [7]
    with pytest.raises(ExecutorError, match="1 of 2"):
        executor.execute(scenario_state(deployment, prompts[0], Request(model_deployment=deployment, prompt="word " * 600)))


def test_models_are_found_by_their_folder(novels_opt: Path) -> None:
    name = f"flexgen/{novels_opt}"
    deployment = get_model_deployment(name)
    assert deployment.max_sequence_length == 511  # of 512, one is the beginning of the sequence
    assert deployment is get_model_deployment(name)  # HELM asks for every request
    config = get_tokenizer_config(name)
    assert config is get_tokenizer_config(name)
    assert config is not None
    assert config.end_of_text_token
