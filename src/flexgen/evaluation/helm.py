"""HELM runs its scenarios on flexgen: a client for single requests, and an executor and a runner that hand over whole scenario states.

HELM loads this module by its entry point and finds models under names such as flexgen/ORGANISATION/NAME (docs/helm.md).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgen.base.quantities import counted
from flexgen.errors import FlexGenError
from flexgen.evaluation.helm_batches import Answerer
from flexgen.evaluation.helm_client import FlexGenClient  # before HELM's modules, because it explains what is missing
from flexgen.llm import LLM

from helm.benchmark.adaptation.request_state import RequestState  # isort: skip
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor, ExecutorError
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.model_deployment_registry import (
    ClientSpec,
    ModelDeployment,
    model_deployment_generator,
    register_model_deployment,
)
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.benchmark.tokenizer_config_registry import (
    TokenizerConfig,
    TokenizerSpec,
    register_tokenizer_config,
    tokenizer_config_generator,
)
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.common.hierarchical_logger import hlog, htrack
from helm.common.local_context import LocalContext

__all__ = ["FlexGenClient", "FlexGenExecutor", "FlexGenRunner", "model_deployment", "tokenizer_config"]

PREFIX = "flexgen"


class FlexGenExecutor(Executor):
    """Hands the requests of a whole scenario state to the engine at once.

    Scenario states of other clients' models, and those for a proxy server, are executed as HELM does.

    Args:
        execution_spec: How HELM executes requests.

    Attributes:
        folder: The folder of the jobs in progress.
    """

    def __init__(self, execution_spec: ExecutionSpec) -> None:
        super().__init__(execution_spec)
        self.folder = Path(execution_spec.local_path or ".") / "flexgen"

    @htrack(None)
    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Return the scenario state with the results of its requests.

        Raises:
            ExecutorError: A request failed; all others were answered and are not answered again.
        """
        states = scenario_state.request_states
        client = self._client(states)
        if client is None or self.execution_spec.dry_run:
            return super().execute(scenario_state)
        try:
            results = client.make_requests([state.request for state in states], self.folder)
        except FlexGenError as error:
            raise ExecutorError(str(error)) from error
        failed = [(state, result) for state, result in zip(states, results, strict=True) if not result.success]
        if failed:
            state, result = failed[0]
            found = f"{len(failed):,} of {counted(len(states), 'request')} failed"
            raise ExecutorError(f"{found}, the first with: {result.error} Request: {state.request}")
        hlog(f"Processed {counted(len(states), 'request')}, {sum(result.cached for result in results)} of them from the cache")
        done = [dataclasses.replace(state, result=result) for state, result in zip(states, results, strict=True)]
        return dataclasses.replace(scenario_state, request_states=done)

    def _client(self, states: Sequence[RequestState]) -> FlexGenClient | None:
        """Return the one client of all requests if it is of this kind; the models of others of this kind are closed then."""
        names = {state.request.model_deployment for state in states}
        if len(names) != 1 or not isinstance(self.context, LocalContext):
            return None
        clients = self.context.client
        client = clients._get_client(names.pop())  # the only way to a client with HELM's own arguments
        if not isinstance(client, FlexGenClient):
            return None
        for other in clients.clients.values():
            if isinstance(other, FlexGenClient) and other is not client:
                other.close()
        return client


class FlexGenRunner(Runner):
    """HELM's runner with `FlexGenExecutor`.

    The jobs of an interrupted run are kept in the folder of the run, and removed once the run is complete.
    """

    def __init__(self, execution_spec: ExecutionSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(execution_spec, *args, **kwargs)
        self.executor = FlexGenExecutor(execution_spec)
        self.tokenizer_service = TokenizerService(self.executor.context)
        self.metric_service = MetricService(self.executor.context)

    def run_one(self, run_spec: RunSpec) -> None:
        """Run one run spec."""
        self.executor.folder = Path(self._get_run_path(run_spec)) / "flexgen"
        super().run_one(run_spec)
        if not (self.dry_run or self.skip_instances or self.cache_instances_only):
            shutil.rmtree(self.executor.folder, ignore_errors=True)


@model_deployment_generator(PREFIX)
def model_deployment(name: str) -> ModelDeployment:
    """Register the deployment of a model that is named by its folder or hub id, such as flexgen/facebook/opt-125m, and return it."""
    model = _path(name)
    with LLM(model) as llm:
        most_tokens = llm.max_model_len - len(Answerer(llm).lead)
    deployment = ModelDeployment(
        name=name,
        model_name="/".join(name.split("/")[-2:]),
        tokenizer_name=name,
        max_sequence_length=most_tokens,
        client_spec=ClientSpec(f"{__name__}.FlexGenClient", args={"pretrained_model_name_or_path": model}),
    )
    register_model_deployment(deployment)  # HELM asks again for every request
    return deployment


@tokenizer_config_generator(PREFIX)
def tokenizer_config(name: str) -> TokenizerConfig:
    """Register the configuration of the tokenizer of such a model, and return it."""
    with LLM(_path(name)) as llm:
        tokenizer, folder = llm.get_tokenizer(), str(llm.files.folder)
    config = TokenizerConfig(
        name=name,
        tokenizer_spec=TokenizerSpec(
            "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", args={"pretrained_model_name_or_path": folder}
        ),
        end_of_text_token=str(tokenizer.eos_token or ""),
        prefix_token=str(tokenizer.bos_token or ""),
    )
    register_tokenizer_config(config)
    return config


def _path(name: str) -> str:
    """Return the folder or hub id in a name; that of an absolute path is flexgen//data/models/NAME."""
    return name.partition("/")[2]
