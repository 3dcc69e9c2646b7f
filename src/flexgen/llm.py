"""LLM: the one place that wires the parts (files, tokenizer, plan, engine), with vLLM's names.

Knows nothing of files of requests (jobs/) or terminals (cli/).
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen.chat import Chat, Templates, make_chats
from flexgen.choices import Choices
from flexgen.defaults import default_sampling_params, token_limits, unsupported_defaults
from flexgen.engine.progress import Progress, RunReport
from flexgen.errors import FlexGenError, ModelError, OptionError, RequestError
from flexgen.hub import ModelFiles, resolve_model, resolve_tokenizer
from flexgen.inputs import Prompt, as_prompts, text_and_ids
from flexgen.open_engine import OpenEngine, plan_job
from flexgen.options import EngineOptions
from flexgen.plan.forecast import Plan
from flexgen.plan.simulate import PAGE_TOKENS
from flexgen.plan.workload import Workload
from flexgen.prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from flexgen.request import CompletionOutput, Live, RequestOutput, SamplingParams, TokenRequest, TokenResult
from flexgen.steps import step
from flexgen.text import Tokenizer, eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class LLM:
    """A model, ready to answer batches of prompts.

    The engine is opened by the first call that generates, because the plan depends on the work, and stays open for later calls.

    Args:
        model: a Hugging Face folder or hub id, or files that are already resolved.
        tokenizer: folder or hub id of another tokenizer than the model's.
        chat_template: a Jinja template, the file that holds one, or the name of one of the model's; None is the model's default.
        chat_template_kwargs: variables that every chat's template sees, unless the chat gives them another value.
        **options: the fields of `EngineOptions`, by name.

    Attributes:
        files: of the model, resolved.
        tokenizer: None where the model has none: prompts are then token ids, and answers have no text.
        vocab_size, max_model_len: ids lie below the first; prompt and answer together have at most the second.
        eos_token_ids: what ends an answer unless its parameters ignore it.

    Raises:
        OptionError: an unknown option, or one that cannot be honoured, by name.
        ModelError: the model cannot be found or is not supported.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelFiles,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        asked = _engine_options(options)
        if isinstance(model, ModelFiles):
            self.files = model
        else:
            self.files = resolve_model(model, revision=asked.revision, with_weights=asked.load_format != "dummy")
        step(f"reading configuration and tokenizer of {self.files.name}")
        self.vocab_size, self.max_model_len = token_limits(self.files, asked.max_model_len)
        if tokenizer is not None:
            self.tokenizer = Tokenizer.load(resolve_tokenizer(tokenizer))
        else:
            self.tokenizer = Tokenizer.load(self.files.folder) if self.files.has_tokenizer else None
        self.eos_token_ids = eos_token_ids(self.files.config, self.files.generation_config, self.tokenizer)
        for setting in unsupported_defaults(self.files.generation_config):
            logger.warning("%s: generation_config.json asks for %s, which is not supported yet and not applied", self.files.name, setting)
        own, tokens = (self.tokenizer.chat_template, self.tokenizer.special_tokens) if self.tokenizer is not None else (None, {})
        self._templates = Templates(self.files.name, own, tokens, given=chat_template, kwargs=chat_template_kwargs)
        self._choices = Choices(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            seed=asked.seed,
            max_logprobs=asked.max_logprobs,
        )
        self._num_requests = 0
        self._open = OpenEngine(self.files, asked)
        self._finalizer = weakref.finalize(self, _close, self._open, self._templates)

    @property
    def options(self) -> EngineOptions:
        """What was asked for; smaller after `shrink`."""
        return self._open.options

    # -- vLLM's calls -------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs are in the order of the prompts, each with its `n` answers.

        Args:
            prompts: one or several of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
            sampling_params: one for all, one for each, or None for `get_default_sampling_params()`.
            use_tqdm: draw a progress bar on stderr.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has run then.  (A request that fails alone while
                running has finish_reason "error" and the error's code as stop_reason.)
            CapacityError: the work does not fit the budgets.
        """
        batch = [text_and_ids(prompt) for prompt in as_prompts(prompts)]
        params = self._params_for(sampling_params, len(batch))
        choices = self._token_requests(batch, params)
        requests = [request for of_prompt in choices for request in of_prompt]
        if not requests:
            return []
        census = self.prefix_census()
        workload = Workload(
            prompt_lens=tuple(len(request.prompt_token_ids) for request in requests),
            output_lens=tuple(request.max_tokens for request in requests),
            may_end_early=any(request.may_end_early for request in requests),
            shared_lens=() if census is None else tuple(census.add(request.prompt_token_ids) for request in requests),
        )
        stream = self.stream(requests, workload, prefixes=NO_PREFIXES if census is None else census.common())
        results = {result.index: result for result in _with_bar(stream, len(requests), use_tqdm)}
        return [
            RequestOutput(
                request_id=str(of_prompt[0].index),
                prompt=text,
                prompt_token_ids=of_prompt[0].prompt_token_ids,
                outputs=self.completions([results[request.index] for request in of_prompt], prompt_params, of_prompt[0].prompt_token_ids),
            )
            for of_prompt, (text, _), prompt_params in zip(choices, batch, params, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one or several conversations; outputs are in their order, with the rendered prompts.

        Args:
            messages: {"role", "content"} objects, or a list of such lists; the content is text or a list of text parts.
            sampling_params, use_tqdm: as for `generate`.
            chat_template: for this call, in place of the model's.
            add_generation_prompt: end the prompt with the header of an answer.
            continue_final_message: leave the last message open, for the model to continue (without a generation prompt).
            chat_template_kwargs: more variables for the template.

        Raises:
            RequestError: a conversation is malformed or refused by the template, or the model has none; nothing has run then.
        """
        self._check_open()
        chats = make_chats(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )
        texts = self._templates.prompts(chats, chat_template)
        ids = self.encode(texts, add_special_tokens=False)
        prompts = [{"prompt": text, "prompt_token_ids": each} for text, each in zip(texts, ids, strict=True)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The Hugging Face tokenizer.

        Raises:
            ModelError: the model has none.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.files.name} has no tokenizer")
        return self.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults under the values of generation_config.json."""
        return default_sampling_params(self.files.generation_config)

    # -- what jobs and benchmarks are made of ----------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text (rendered chats have their special tokens already).

        Raises:
            RequestError: the model has no tokenizer, or a text is no Unicode text.
        """
        if texts and self.tokenizer is None:
            raise RequestError(f"{self.files.name} has no tokenizer: give the prompt as token ids", param="prompt")
        return self.tokenizer.encode(texts, add_special_tokens=add_special_tokens) if self.tokenizer is not None else []

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> list[str | RequestError]:
        """The prompt of each conversation by the model's template, or why it has none.

        Args:
            now: the time that templates are told, in seconds since 1970, for prompts that a later run must find again; None is the
                clock's.
        """
        self._check_open()
        return self._templates.render(chats, now=now)

    @property
    def chat_template(self) -> str | None:
        """The text of the template that renders chats; None where the model has none, as base models do."""
        return self._templates.text

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """What the engine is asked for the `n` answers to one prompt: requests with indices from `index` on.

        `max_tokens` is cut to the context that the prompt leaves, as vLLM does.  The first answer to a prompt with a seed has that
        seed; all others are derived.

        Raises:
            RequestError: the prompt or a parameter cannot be served (`context_length_exceeded` where there is no room for an answer).
        """
        return self._choices.requests(index, prompt_token_ids, params)

    def prefix_census(self) -> PrefixCensus | None:
        """What finds the common prefixes of requests before they are streamed; None where they are not to be shared."""
        return PrefixCensus(PAGE_TOKENS) if self.options.prefix_sharing else None

    def stream(
        self,
        requests: Iterable[TokenRequest],
        workload: Workload,
        *,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[Live]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Results as they finish.

        Args:
            requests: pulled lazily.
            workload: tells their lengths beforehand; what an earlier run generated counts as prompt.
            prefixes: what their prompts have in common.
            on_progress: told now and then how the run goes.
            on_pass: called after every pass with what the unfinished answers are so far; they are gathered while it iterates.
        """
        self._check_open()
        engine = self._open.serving(workload)
        try:
            yield from engine.generate(requests, num_requests=len(workload), prefixes=prefixes, on_progress=on_progress, on_pass=on_pass)
        except BaseException:
            self._open.close()  # what was alive in it is of no use to a later call
            raise

    def completions(
        self, results: Iterable[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> list[CompletionOutput]:
        """The answers to one prompt as vLLM shows them, in the order of their indices; their text is decoded behind the prompt's."""
        return self._choices.completions(results, params, prompt_token_ids)

    def plan(self, workload: Workload) -> Plan:
        """What `open` would do with this work (see `plan_job`)."""
        return plan_job(self.files, self.options, workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this work, as `stream` would, and tell its plan."""
        self._check_open()
        engine = self._open.serving(workload)
        assert engine.forecast is not None
        return Plan(spec=engine.spec, machine=engine.machine, policy=engine.policy, forecast=engine.forecast)

    def shrink(self) -> int | None:
        """After memory ran out: have the next engine keep half as many sequences alive as the last one.

        Returns:
            how many; None if it was one already.
        """
        return self._open.shrink()

    def report(self) -> RunReport:
        """How the last run went.

        Raises:
            FlexGenError: nothing has run yet.
        """
        if self._open.engine is None:
            raise FlexGenError("nothing has run yet, so there is nothing to report")
        return self._open.engine.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes; a closed LLM cannot generate again."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise FlexGenError("this LLM is closed")

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise OptionError(f"{len(given)} sampling_params for {count} prompts")
        return list(given)

    def _token_requests(
        self, batch: list[tuple[str | None, Sequence[int] | None]], params: list[SamplingParams]
    ) -> list[list[TokenRequest]]:
        """The requests of each prompt."""
        encoded = iter(self.encode([text for text, ids in batch if text is not None and ids is None]))
        choices: list[list[TokenRequest]] = []
        index = self._num_requests
        for place, (_, ids) in enumerate(batch):
            try:
                choices.append(self.token_requests(index, ids if ids is not None else next(encoded), params[place]))
            except RequestError as error:
                raise RequestError(f"prompt {place}: {error}", code=error.code, param=error.param) from error
            index += len(choices[-1])
        self._num_requests = index
        return choices


def _close(engine: OpenEngine, templates: Templates) -> None:
    """What is left to do when an LLM is closed or forgotten."""
    templates.close()
    engine.close()


def _engine_options(options: Mapping[str, Any]) -> EngineOptions:
    known = [field.name for field in dataclasses.fields(EngineOptions)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            raise OptionError(f"LLM has no option {name!r}{hint}")
    return EngineOptions(**options)


def _with_bar(results: Iterator[TokenResult], count: int, use_tqdm: bool) -> Iterator[TokenResult]:
    if not use_tqdm:
        return results
    from tqdm.auto import tqdm  # a dependency of transformers and of the hub library

    return iter(tqdm(results, total=count, desc="Processed prompts", unit="request"))
