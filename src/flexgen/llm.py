"""LLM: the one place that wires the parts (files, tokenizer, plan, engine), with vLLM's names.

Knows nothing of files of requests (jobs/) or terminals (cli/).
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from flexgen.api.vllm_keywords import ModelKeywords, check_call, read_keywords
from flexgen.api.vllm_types import ChatKeywords, GenerateKeywords, LLMKeywords
from flexgen.base.steps import step
from flexgen.chat import Chat, Templates, make_chats
from flexgen.errors import FlexGenError, ModelError, OptionError, RequestError
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model, resolve_tokenizer
from flexgen.options import EngineOptions
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.request import CompletionOutput, PartialAnswer, RequestOutput, SamplingParams, TokenRequest, TokenResult
from flexgen.session.fingerprint import fingerprint
from flexgen.session.model import ResolvedModel
from flexgen.session.session import EngineSession, plan_job
from flexgen.session.turns import Turns
from flexgen.text.answers import Choices
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from flexgen.text.defaults import default_sampling_params, token_limits, unsupported_defaults
from flexgen.text.encoding import Encoder, ids_or_raise
from flexgen.text.prompts import Prompt, as_conversations, as_params, as_texts, naming, texts_and_ids
from flexgen.text.tokenizer import Tokenizer, eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CHAT_KEYWORDS = ("chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "use_tqdm")


class LLM:
    """A model, ready to answer batches of prompts.

    The engine is opened by the first call that generates, because the plan depends on the work, and stays open for later calls.

    Threads may share an LLM: calls that use the engine wait for each other.  While an iterator of `stream` is not at its end, they are
    refused instead.  Processes may not: a process that was forked after the first call is refused (take the start method "spawn").

    Args:
        model: A Hugging Face folder or hub id, or files that are already resolved.
        tokenizer: Folder or hub id of another tokenizer than the model's.
        chat_template: A Jinja template, the file that holds one, or the name of one of the model's; None is the model's default.
        chat_template_kwargs: Variables that every chat's template sees, unless the chat gives them another value.
        **keywords: The fields of `EngineOptions`, by name, and vLLM's arguments (docs/vllm.md): some mean something here, most change
            nothing and are named in a warning, and what asks for something else than is done is refused.

    Attributes:
        files: The model's files, resolved.
        tokenizer: None where the model has none: prompts are then token ids, and answers have no text.
        vocab_size: Token ids lie below it.
        max_model_len: The most tokens that a prompt and its answer have together.
        eos_token_ids: The tokens that end an answer unless its parameters ignore them.

    Raises:
        OptionError: An unknown option, or one that cannot be honoured, by name.
        ModelError: The model cannot be found or is not supported.

    Every call raises FlexGenError after `close`, and in a forked process.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelFiles,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Unpack[LLMKeywords],
    ) -> None:
        asked = read_keywords(keywords)
        options = asked.options
        if isinstance(model, ModelFiles):
            self.files = model
        else:
            self.files = resolve_model(model, revision=options.revision, token=asked.token, with_weights=options.load_format != "dummy")
        step(f"reading configuration and tokenizer of {self.files.name}")
        self._model = ResolvedModel(self.files, options)
        self.vocab_size, self.max_model_len = token_limits(self.files.name, self._model.config, options.max_model_len)
        self.tokenizer = _tokenizer(self.files, tokenizer, asked)
        self.eos_token_ids = eos_token_ids(self.files.config, self.files.generation_config, self.tokenizer)
        for setting in unsupported_defaults(self.files.generation_config):
            logger.warning("%s: generation_config.json asks for %s, which is not supported yet and not applied", self.files.name, setting)
        self._encoder = Encoder(self.name, self.tokenizer, self.max_model_len, functools.cache(self._model.tokenizing_bytes))
        own, tokens = (self.tokenizer.chat_template, self.tokenizer.special_tokens) if self.tokenizer is not None else (None, {})
        self._templates = Templates(
            self.files.name, own, tokens, given=chat_template, kwargs=chat_template_kwargs, max_chars=self._max_prompt_chars
        )
        self._choices = Choices(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            seed=options.seed,
            max_logprobs=options.max_logprobs,
        )
        self._own_defaults = asked.own_defaults
        self._num_requests = 0
        self._open = EngineSession(self._model, options, self.max_model_len)
        self._turns = Turns()
        self._finalizer = weakref.finalize(self, _close, self._turns, self._open, self._templates, wait=False)

    @property
    def name(self) -> str:
        """The name of the model, as the user wrote it."""
        return self.files.name

    @property
    def options(self) -> EngineOptions:
        """What was asked for; smaller after `shrink`."""
        return self._open.options

    # -- vLLM's calls -------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs are in the order of the prompts, each with its `n` answers.

        Args:
            prompts: One or several of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.  Several may be a list, a
                generator, an array, a column of a table; ids may be a list, an array or a tensor.
            sampling_params: One for all, one for each, or None for `get_default_sampling_params()`.
            use_tqdm: Draw a progress bar on stderr; what is not a boolean is called to make one, as tqdm is.
            **keywords: What else vLLM has, with values that ask for nothing.

        Raises:
            OptionError: Sampling_params of another number than the prompts, or a keyword that cannot be honoured.
            RequestError: A prompt or its parameters cannot be served; nothing has run then.  (A request that fails alone while
                running has finish_reason "error" and the error's code as stop_reason.)
            CapacityError: The work does not fit the budgets.
        """
        check_call("generate", keywords, ("use_tqdm", *GenerateKeywords.__annotations__))
        with self._turns.call():
            return self._generate(prompts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]] | Iterable[Iterable[Mapping[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        **keywords: Unpack[ChatKeywords],
    ) -> list[RequestOutput]:
        """Answer one or several conversations; outputs are in their order, with the rendered prompts.

        Args:
            messages: {"role", "content"} objects, or several lists of these; the content is text or a list of text parts.
            sampling_params, use_tqdm, **keywords: As for `generate`.
            chat_template: For this call, in place of the model's.
            add_generation_prompt: End the prompt with the header of an answer.
            continue_final_message: Leave the last message open, for the model to continue (without a generation prompt).
            chat_template_kwargs: More variables for the template.

        Raises:
            RequestError: A conversation is malformed or refused by the template, or the model has none; nothing has run then.
            OptionError: As for `generate`.
        """
        check_call("chat", keywords, (*_CHAT_KEYWORDS, *ChatKeywords.__annotations__))
        self._turns.check()
        chats = make_chats(
            as_conversations(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )
        texts = self._templates.prompts(chats, chat_template)
        ids = self._encoder.all("conversation", texts, add_special_tokens=False)
        prompts = [{"prompt": text, "prompt_token_ids": each} for text, each in zip(texts, ids, strict=True)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The Hugging Face tokenizer.

        Raises:
            ModelError: The model has none.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.files.name} has no tokenizer")
        return self.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults under the values of generation_config.json (without them for `generation_config="vllm"`)."""
        return default_sampling_params(self.files.generation_config if self._own_defaults else {})

    # -- what jobs and benchmarks are made of ----------------------------------------------------------------------------------------

    def check_model(self) -> None:
        """Refuse a model whose files cannot be served now, and not when there is work for it; no weights are read.

        Raises:
            ModelError: Naming what is wrong.
        """
        self._model.check()

    def fingerprint(self) -> dict[str, Any]:
        """What of this model changes its answers, as JSON values by name: a job refuses to go on with another one.

        Raises:
            FlexGenError: As `check_model`.
        """
        return fingerprint(self._model, self._choices, self.chat_template, self.options.load_format)

    def encode(self, texts: str | Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text (rendered chats have their special tokens already).

        Raises:
            RequestError: For the first text that has none (see `encode_each`); the message has its index.
        """
        return self._encoder.all("text", as_texts(texts), add_special_tokens=add_special_tokens)

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Token ids of each text, or why it has none: it is no Unicode text, longer than the context or the host budget allow, the
        tokenizer fails on it, or the model has none.  Texts are pulled as they are needed; errors among them are handed on.
        """
        return self._encoder.each(texts, add_special_tokens=add_special_tokens)

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """The prompt of each conversation by the model's template, or why it has none; rendered as they are asked for.

        Args:
            chats: The conversations.
            now: The time that templates see, in seconds since 1970, for prompts that a later run must find again; None is the clock's.
        """
        self._turns.check()
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
            RequestError: The prompt or a parameter cannot be served (`context_length_exceeded` where there is no room for an answer).
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
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Results as they finish.

        From the first result to the end of the iterator, the engine is its own: other calls that need it are refused, in this thread and in
        others, and closing the LLM closes the iterator.

        Args:
            requests: Pulled lazily.
            workload: Tells their lengths beforehand; what an earlier run generated counts as prompt.
            prefixes: What their prompts have in common.
            on_progress: Told now and then how the run goes.
            on_pass: Called after every pass with what the unfinished answers are so far; they are gathered while it iterates.

        Raises:
            FlexGenError: Another iterator is not at its end; or, at any result, the LLM is closed.
        """
        _check_workload("stream", workload)
        run = self._run(requests, workload, prefixes=prefixes, on_progress=on_progress, on_pass=on_pass)
        return self._turns.iterate(run)

    def completions(
        self, results: Iterable[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> list[CompletionOutput]:
        """The answers to one prompt as vLLM shows them, in the order of their indices; their text is decoded behind the prompt's."""
        return self._choices.completions(results, params, prompt_token_ids)

    def plan(self, workload: Workload) -> Plan:
        """What `open` would do with this work (see `plan_job`)."""
        _check_workload("plan", workload)
        return plan_job(self._model, self.options, workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this work, as `stream` would, and tell its plan."""
        _check_workload("open", workload)
        with self._turns.call():
            return self._open.serving(workload).plan

    def shrink(self) -> int | None:
        """After memory ran out: have the next engine keep half as many sequences alive as the last one.

        Returns:
            How many; None if it was one already.
        """
        with self._turns.call():
            return self._open.shrink()

    def report(self) -> RunReport:
        """How the last run went.

        Raises:
            FlexGenError: Nothing has run yet.
        """
        if self._open.engine is None:
            raise FlexGenError("nothing has run yet, so there is nothing to report")
        return self._open.engine.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes, after a call of another thread; a closed LLM cannot generate again.

        In a forked process nothing happens: all of it is its parent's.
        """
        _close(self._turns, self._open, self._templates, wait=True)

    def __reduce__(self) -> NoReturn:
        raise FlexGenError("an LLM holds memory, files and threads, so it cannot be pickled or copied: make one in each process")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------------------------

    def _generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
    ) -> list[RequestOutput]:
        batch = texts_and_ids(prompts)
        params = as_params(self.get_default_sampling_params() if sampling_params is None else sampling_params, len(batch))
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
        run = self._run(requests, workload, prefixes=NO_PREFIXES if census is None else census.common())
        results = {result.index: result for result in _with_bar(run, len(requests), use_tqdm)}
        return [
            RequestOutput(
                request_id=str(of_prompt[0].index),
                prompt=text,
                prompt_token_ids=of_prompt[0].prompt_token_ids,
                outputs=self._choices.shown(
                    [results[request.index] for request in of_prompt], prompt_params, of_prompt[0].prompt_token_ids
                ),
            )
            for of_prompt, (text, _), prompt_params in zip(choices, batch, params, strict=True)
        ]

    def _run(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> Generator[TokenResult]:
        """The results of the engine, whose turn it must be; `how` as for `stream`."""
        engine = self._open.serving(workload)
        try:
            yield from engine.generate(requests, num_requests=len(workload), **how)
        except BaseException:
            self._open.close()  # what was alive in it is of no use to a later call
            raise

    @property
    def _max_prompt_chars(self) -> int | None:
        """What has more characters does not fit the context."""
        return self.tokenizer.max_chars(self.max_model_len) if self.tokenizer is not None else None

    def _token_requests(self, batch: list[tuple[str | None, list[int] | None]], params: list[SamplingParams]) -> list[list[TokenRequest]]:
        """The requests of each prompt."""
        encoded = self.encode_each([text for text, ids in batch if text is not None and ids is None])
        choices: list[list[TokenRequest]] = []
        index = self._num_requests
        for place, (_, ids) in enumerate(batch):
            with naming("prompt", place):
                found = ids if ids is not None else ids_or_raise(next(encoded))
                choices.append(self.token_requests(index, found, params[place]))
            index += len(choices[-1])
        self._num_requests = index
        return choices


def _check_workload(call: str, workload: object) -> None:
    if not isinstance(workload, Workload):
        raise OptionError(f"{call} takes a Workload, the lengths of requests; prompts and SamplingParams are for generate")


def _tokenizer(files: ModelFiles, other: str | os.PathLike[str] | None, asked: ModelKeywords) -> Tokenizer | None:
    """The model's own tokenizer or another one, if there is one."""
    if asked.skip_tokenizer_init:
        return None
    revision = asked.tokenizer_revision
    if other is None and revision is not None and revision != asked.options.revision:
        raise OptionError(f"tokenizer_revision={revision!r} needs a tokenizer= of its own")
    if other is not None:
        return Tokenizer.load(resolve_tokenizer(other, revision=revision, token=asked.token))
    return Tokenizer.load(files.folder) if files.has_tokenizer else None


def _close(turns: Turns, engine: EngineSession, templates: Templates, *, wait: bool) -> None:
    """What is left to do when an LLM is closed or forgotten.

    Args:
        wait: For a call of another thread; at the end of the process, the system takes what such a call has.
    """
    with turns.end(wait=wait) as mine:
        if mine:
            templates.close()
            engine.close()


def _with_bar(results: Iterator[TokenResult], count: int, use_tqdm: bool | Callable[..., Any]) -> Iterator[TokenResult]:
    if not use_tqdm:
        return results
    from tqdm.auto import tqdm  # a dependency of transformers and of the hub library

    make = use_tqdm if callable(use_tqdm) else tqdm
    return iter(make(results, total=count, desc="Processed prompts", unit="request"))
