"""HELM's client for models that flexgen runs in this process, for one request and for many at once (docs/helm.md)."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen.errors import FlexGenError, RequestError
from flexgen.evaluation.answers import check_formats
from flexgen.evaluation.gather import Gatherer
from flexgen.evaluation.helm_batches import Answerer, Keyed
from flexgen.evaluation.helm_requests import cache_key, refusal
from flexgen.llm import LLM
from flexgen.report.progress import Progress

try:
    from helm.clients.client import Client
    from helm.common.cache import Cache, CacheConfig, cache_stats, create_key_value_store
    from helm.common.hierarchical_logger import hlog
    from helm.common.request import (
        EMBEDDING_UNAVAILABLE_REQUEST_RESULT,
        ErrorFlags,
        GeneratedOutput,
        Request,
        RequestResult,
        Token,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flexgen.evaluation.helm needs HELM ({error.name} is missing): pip install crfm-helm==0.5.16, in an environment of its own",
        name=error.name,
    ) from error

_GATHER_SECONDS = 0.1
_TELL_SECONDS = 10.0


class FlexGenClient(Client):
    """Answers requests by a model that runs in this process.

    Requests of several threads are gathered for a moment and answered together, so that it also serves HELM's own executor with many
    threads (`helm-run -n 256`).

    Args:
        cache_config: HELM's cache of requests and responses.
        model_name: The name of the model in HELM.
        pretrained_model_name_or_path: The folder or hub id of the model; None for the name of the model.
        apply_chat_template: Whether prompts are put into the model's chat template; None for whether it has one.  Prompts that are echoed
            never are, because their log probabilities are those of the text.
        gather_seconds: The time without a new request after which those that have arrived are answered.
        **options: The keywords of `flexgen.LLM`.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        model_name: str,
        pretrained_model_name_or_path: str | None = None,
        apply_chat_template: bool | None = None,
        gather_seconds: float = _GATHER_SECONDS,
        **options: Any,
    ) -> None:
        self._cache = Cache(cache_config)
        self._model = pretrained_model_name_or_path or model_name
        self._options, self._apply_chat_template = options, apply_chat_template
        self._llm: LLM | None = None
        self._opening = threading.Lock()
        self._gathered = Gatherer(self._answer_gathered, quiet_seconds=gather_seconds)

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request, together with those of other threads."""
        if (failed := _unavailable(request)) is not None:
            return failed
        try:
            each = self._keyed(request)
            response, cached = self._cache.get(each.key, lambda: _raised(self._gathered.submit(each).result()))
        except FlexGenError as error:
            return _failure(error)
        return _result(response, cached=cached)

    def make_requests(self, requests: Sequence[Request], folder: Path) -> list[RequestResult]:
        """Answer requests at once, in a job that is kept in a folder: a call that was interrupted goes on where it stopped.

        Answers that HELM's cache has are taken from there, and new ones are put into it.

        Args:
            requests: The requests.
            folder: The folder, which may be removed once the answers are used.
        """
        refused = {place: failed for place, request in enumerate(requests) if (failed := _unavailable(request)) is not None}
        keyed = {place: self._keyed(request) for place, request in enumerate(requests) if place not in refused}
        cached = self._cached(list(keyed.values()))
        left = [each for each in keyed.values() if each.identity not in cached]
        answered = self._answerer().answer(left, folder, on_progress=_teller()) if left else {}
        self._keep(left, answered)
        responses: dict[str, dict[str, Any] | RequestError] = {**cached, **answered}
        done = {place: _outcome(responses[each.identity], cached=each.identity in cached) for place, each in keyed.items()}
        return [refused[place] if place in refused else done[place] for place in range(len(requests))]

    def close(self) -> None:
        """Free the memory of the model, which the next request opens again."""
        with self._opening:
            if self._llm is not None:
                self._llm.close()
            self._llm = None

    def _keyed(self, request: Request) -> Keyed:
        chat = bool(request.messages) or (not request.echo_prompt and self._uses_template())
        options = self._options
        key = cache_key(request, model=self._model, revision=options.get("revision"), chat=chat, seed=options.get("seed") or 0)
        return Keyed(request=request, key=key)

    def _uses_template(self) -> bool:
        if self._apply_chat_template is None:
            self._apply_chat_template = self._opened().chat_template is not None
            hlog(f"{self._model}: apply_chat_template is {self._apply_chat_template}, by whether the model has a template")
        return self._apply_chat_template

    def _opened(self) -> LLM:
        with self._opening:
            if self._llm is None:
                llm = LLM(self._model, **self._options)
                check_formats(llm.options)
                self._llm = llm
            return self._llm

    def _answerer(self) -> Answerer:
        return Answerer(self._opened())

    def _answer_gathered(self, batch: Sequence[Keyed]) -> list[dict[str, Any] | RequestError]:
        """Answer requests that arrived one by one.  HELM's cache keeps the answers, so that the job itself need not last."""
        with tempfile.TemporaryDirectory(prefix="flexgen-helm-") as folder:
            answers = self._answerer().answer(batch, Path(folder))
        return [answers[each.identity] for each in batch]

    def _cached(self, keyed: Sequence[Keyed]) -> dict[str, dict[str, Any]]:
        """Return the responses that HELM's cache has, by the ids of the requests."""
        with create_key_value_store(self._cache.config) as store:
            for _ in keyed:
                cache_stats.increment_query(self._cache.config.cache_stats_key)
            found = {each.identity: store.get(each.key) for each in keyed}
        return {identity: response for identity, response in found.items() if response}

    def _keep(self, keyed: Sequence[Keyed], answered: Mapping[str, dict[str, Any] | RequestError]) -> None:
        with create_key_value_store(self._cache.config) as store:
            for each in {each.identity: each for each in keyed}.values():
                response = answered[each.identity]
                if not isinstance(response, RequestError):
                    cache_stats.increment_compute(self._cache.config.cache_stats_key)
                    store.put(each.key, response)


def _unavailable(request: Request) -> RequestResult | None:
    """Return the result of a request that is not served; None if it is."""
    if request.embedding:
        return EMBEDDING_UNAVAILABLE_REQUEST_RESULT
    reason = refusal(request)
    return None if reason is None else _failure(RequestError(reason))


def _failure(error: FlexGenError) -> RequestResult:
    """Return the result of a request that failed, and would fail again."""
    flags = ErrorFlags(is_retriable=False, is_fatal=True)
    return RequestResult(success=False, cached=False, error=str(error), error_flags=flags, completions=[], embedding=[])


def _raised(response: dict[str, Any] | RequestError) -> dict[str, Any]:
    if isinstance(response, RequestError):
        raise response
    return response


def _outcome(response: dict[str, Any] | RequestError, *, cached: bool) -> RequestResult:
    return _failure(response) if isinstance(response, RequestError) else _result(response, cached=cached)


def _result(response: Mapping[str, Any], *, cached: bool) -> RequestResult:
    return RequestResult(
        success=True,
        cached=cached,
        embedding=[],
        completions=[_completion(each) for each in response["completions"]],
        request_time=response["request_time"],
        request_datetime=response["request_datetime"],
        batch_size=response["batch_size"],
        batch_request_time=response["batch_request_time"],
    )


def _completion(value: Mapping[str, Any]) -> GeneratedOutput:
    tokens = [Token(text=text, logprob=logprob) for text, logprob in value["tokens"]]
    total = sum(token.logprob for token in tokens)
    return GeneratedOutput(text=value["text"], logprob=total, tokens=tokens, finish_reason={"reason": value["finish_reason"]})


def _teller() -> Callable[[Progress], None]:
    """Return a callback that logs the progress now and then."""
    following = time.monotonic() + _TELL_SECONDS

    def tell(progress: Progress) -> None:
        nonlocal following
        if time.monotonic() >= following:
            following = time.monotonic() + _TELL_SECONDS
            left = "" if progress.eta_seconds is None else f", {progress.eta_seconds:.0f} s left"
            hlog(f"flexgen: {progress.num_requests_done} of {progress.num_requests} answers{left}")

    return tell
