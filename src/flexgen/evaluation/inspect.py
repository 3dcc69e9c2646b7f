"""inspect-ai evaluates models that flexgen runs in this process: `inspect eval TASK --model flexgen/MODEL` (docs/helm.md)."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexgen.errors import ModelError, RequestError
from flexgen.evaluation.gather import Gatherer
from flexgen.evaluation.inspect_requests import Seeds, choices_of, line_of, stop_reason_of

try:
    import anyio
    import anyio.from_thread
    import anyio.lowlevel
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        TopLogprob,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flexgen.evaluation.inspect needs inspect-ai ({error.name} is missing): pip install inspect-ai==0.3.285", name=error.name
    ) from error

MAX_CONNECTIONS = 10_000
MAX_TOKENS = 2048  # where the task sets none; inspect-ai's own default for local models
_GATHER_SECONDS = 0.5


@modelapi(name="flexgen")
def flexgen() -> type[ModelAPI]:
    """Return the provider.  inspect-ai calls this when a model of it is wanted."""
    return FlexGenAPI


class FlexGenAPI(ModelAPI):
    """Gathers the requests of a task and answers them together.

    Args:
        model_name: The folder or hub id of the model.
        base_url: Not used.
        api_key: Not used.
        config: The configuration of the model.
        **model_args: The keywords of `flexgen.LLM` (`-M host_mem=16GiB`), and:
            model_path: The folder of the model, in place of the name.
            gather_seconds: The time without a new request after which those that have arrived are answered.

    Raises:
        FlexGenError: The model cannot be served, or has no chat template.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        **model_args: Any,
    ) -> None:
        from flexgen.evaluation.answers import check_formats  # inspect-ai loads this module for every command
        from flexgen.llm import LLM

        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        options = dict(model_args)
        path, quiet_seconds = options.pop("model_path", None), float(options.pop("gather_seconds", _GATHER_SECONDS))
        self._llm = LLM(path or model_name, **options)
        check_formats(self._llm.options)
        if self._llm.chat_template is None:
            self._llm.close()
            raise ModelError(f"{model_name} has no chat template, as base models do not: give one with -M chat_template=FILE")
        self._defaults = dataclasses.replace(self._llm.get_default_sampling_params(), max_tokens=MAX_TOKENS)
        self._seeds = Seeds(self._llm.options.seed)
        self._gathered = Gatherer(self._answer, quiet_seconds=quiet_seconds)
        if config.max_connections is None and config.adaptive_connections is None:
            config.max_connections = MAX_CONNECTIONS  # else inspect-ai begins with 20 and never goes above 100

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one request, together with those that arrive at the same time.

        Raises:
            RequestError: The request cannot be served.
        """
        if tools:
            raise RequestError("flexgen does not support tools yet", code="unsupported_field", param="tools")
        line = self._seeds.with_seed(line_of(input, config.model_dump(exclude_none=True)))
        started = time.monotonic()
        record = await _result(self._gathered.submit(line))
        if (failed := record.get("error")) is not None:
            raise RequestError(failed["message"], code=failed["code"], param=failed["param"])
        return self._output(record, time.monotonic() - started)

    def max_connections(self) -> int:
        """Return the number of requests that may wait for answers, so large that whole tasks arrive at once."""
        return MAX_CONNECTIONS

    def close(self) -> None:
        """Free the memory of the model."""
        self._llm.close()

    def _answer(self, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        from flexgen.jobs.durable import answer_lines

        with tempfile.TemporaryDirectory(prefix="flexgen-inspect-") as folder:
            return list(answer_lines(self._llm, lines, Path(folder) / "job", defaults=self._defaults))

    def _output(self, record: Mapping[str, Any], seconds: float) -> ModelOutput:
        usage = record["usage"]
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(each, record) for each in choices_of(record)],
            usage=ModelUsage(
                input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"], total_tokens=usage["total_tokens"]
            ),
            time=seconds,
        )

    def _choice(self, answer: Mapping[str, Any], record: Mapping[str, Any]) -> ChatCompletionChoice:
        return ChatCompletionChoice.model_validate(
            {
                "message": ChatMessageAssistant(content=answer["text"], model=self.model_name, source="generate"),
                "stop_reason": stop_reason_of(answer["finish_reason"], record["usage"], self._llm.max_model_len),
                "logprobs": _logprobs(answer.get("logprobs")),
                "prompt_logprobs": _logprobs(record.get("prompt_logprobs")),
            }
        )


def _logprobs(entries: Sequence[Mapping[str, Any] | None] | None) -> Logprobs | None:
    """Return log probabilities as inspect-ai writes them; the first token of a prompt, which nothing predicts, is left out."""
    return None if entries is None else Logprobs(content=[_logprob(each) for each in entries if each is not None])


def _logprob(entry: Mapping[str, Any]) -> Logprob:
    likeliest = [TopLogprob(token=each["token"], logprob=each["logprob"], bytes=each["bytes"]) for each in entry["top_logprobs"]]
    return Logprob(token=entry["token"], logprob=entry["logprob"], bytes=entry["bytes"], top_logprobs=likeliest or None)


async def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """Wait for a future of another thread, under asyncio and trio; if this is cancelled, so is the future."""
    done, token, own_thread = anyio.Event(), anyio.lowlevel.current_token(), threading.get_ident()

    def tell(_: object) -> None:
        if threading.get_ident() == own_thread:
            done.set()
        else:
            with suppress(anyio.RunFinishedError):
                anyio.from_thread.run_sync(done.set, token=token)

    future.add_done_callback(tell)
    try:
        await done.wait()
    finally:
        future.cancel()
    return future.result()
