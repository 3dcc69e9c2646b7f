"""The class LLM, which puts the parts together (model files, tokenizer, plan, engine) under vLLM's names.

Knows nothing of files of requests (jobs/) or terminals (cli/).
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack

from flexgen.api.vllm_keywords import ModelKeywords, check_call, read_keywords
from flexgen.api.vllm_types import ChatKeywords, GenerateKeywords, LLMKeywords
from flexgen.base.steps import step
from flexgen.base.structured import StructuredOutputsParams
from flexgen.chat import Chat, Templates, ToolUse, make_chats, parse_tools
from flexgen.errors import FlexGenError, ModelError, OptionError, RequestError
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model, resolve_tokenizer
from flexgen.options import EngineOptions
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.request import ClassificationRequestOutput, PartialAnswer, RequestOutput, SamplingParams, TokenRequest, TokenResult
from flexgen.session.batch import Batch, choice_batch, completion_batch
from flexgen.session.fingerprint import fingerprint
from flexgen.session.model import ResolvedModel
from flexgen.session.session import EngineSession, plan_job
from flexgen.session.turns import Turns
from flexgen.tables.in_memory import MapKeywords, make_task, map_frame
from flexgen.text.answers import RequestTranslator
from flexgen.text.choices import Choice
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from flexgen.text.defaults import default_sampling_params, token_limits, unsupported_defaults
from flexgen.text.encoding import Encoder
from flexgen.text.guides import Guides
from flexgen.text.prompts import Prompt, as_conversations, as_texts
from flexgen.text.tokenizer import Tokenizer, eos_token_ids
from flexgen.text.tools import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_Output = TypeVar("_Output")
_Table = TypeVar("_Table")
_CHAT_KEYWORDS = ("chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "use_tqdm")


class LLM:
    """A model, ready to answer batches of prompts.

    The engine is opened by the first call that generates, because the plan depends on the work, and stays open for later calls.

    Threads may share an LLM: calls that use the engine wait for each other, but are refused while an iterator of `stream` is not at its
    end.  Processes may not share one: calls in a process that was forked after the first call are refused (use the start method
    "spawn").

    After `close`, calls that use the engine or the chat templates raise FlexGenError.

    Args:
        model: A Hugging Face folder or hub id, or files that are already resolved.
        tokenizer: The folder or hub id of another tokenizer than the model's.
        chat_template: A Jinja template, a file that holds one, or the name of one of the model's; None for the model's default.
        chat_template_kwargs: Variables for the template of every chat; a chat may override them.
        **keywords: The fields of `EngineOptions`, by name, and vLLM's arguments (docs/vllm.md).  Of these some have a meaning here, most
            change nothing and are named in a warning, and values that cannot be honoured are refused.

    Attributes:
        files: The model's files, resolved.
        tokenizer: The tokenizer; None where there is none, so that prompts are token ids and answers have no text.
        vocab_size: The size of the vocabulary; token ids lie below it.
        max_model_len: The most tokens that a prompt and its answer may have together.
        eos_token_ids: The tokens that end an answer unless its parameters ignore them.

    Raises:
        OptionError: An option is unknown or cannot be honoured; the message names it.
        ModelError: The model cannot be found or is not supported.
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
        self._guides = Guides(self.tokenizer, self.vocab_size, self.eos_token_ids)
        self._translator = RequestTranslator(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            seed=options.seed,
            max_logprobs=options.max_logprobs,
            guides=self._guides,
        )
        model_type = str(self.files.config.get("model_type"))
        self._tools = Tools(self.name, model_type, self.tokenizer, self._templates, self._guides, self.eos_token_ids)
        self._own_defaults = asked.own_defaults
        self._num_requests = 0
        self._open = EngineSession(self._model, options, self.max_model_len)
        self._turns = Turns()
        self._finalizer = weakref.finalize(self, _close, self._turns, self._open, self._templates, self._guides, wait=False)

    @property
    def name(self) -> str:
        """The name of the model, as the user wrote it."""
        return self.files.name

    @property
    def options(self) -> EngineOptions:
        """The options that were asked for; `shrink` lowers `max_num_seqs`."""
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
        """Continue every prompt, and return outputs in the order of the prompts, each with `n` answers.

        Args:
            prompts: One or several prompts, each a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.  Several may be a
                list, a generator, an array or a column of a table; ids may be a list, an array or a tensor.
            sampling_params: One value for all prompts, or one for each; None for `get_default_sampling_params()`.
            use_tqdm: Whether to draw a progress bar on stderr; a callable is called in place of tqdm.
            **keywords: Other keywords of vLLM, with values that have no effect.

        Raises:
            OptionError: There are not as many sampling_params as prompts, or a keyword cannot be honoured.
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
        tools: Iterable[Mapping[str, Any]] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        **keywords: Unpack[ChatKeywords],
    ) -> list[RequestOutput]:
        """Answer one or several conversations, and return outputs in their order, with the rendered prompts.

        Args:
            messages: A list of {"role", "content"} objects, or several such lists; the content is text or a list of text parts.
            sampling_params: See `generate`.
            chat_template: The template for this call, in place of the model's.
            add_generation_prompt: Whether to end the prompt with the header of an answer.
            continue_final_message: Whether to leave the last message open for the model to continue (without a generation prompt).
            chat_template_kwargs: More variables for the template.
            tools: Tools that the template shows to the model; calls of them stay text, as in vLLM.
            use_tqdm: See `generate`.
            **keywords: See `generate`.

        Raises:
            RequestError: A conversation is malformed or refused by the template, or the model has no template; nothing has run then.
            OptionError: See `generate`.
        """
        check_call("chat", keywords, (*_CHAT_KEYWORDS, *ChatKeywords.__annotations__))
        self._turns.check()
        chats = make_chats(
            as_conversations(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            tools=parse_tools(tools if tools is None else list(tools)),
        )
        texts = self._templates.prompts(chats, chat_template)
        ids = self._encoder.all("conversation", texts, add_special_tokens=False)
        prompts = [{"prompt": text, "prompt_token_ids": each} for text, each in zip(texts, ids, strict=True)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        choices: Iterable[Choice] | Iterable[Iterable[Choice]],
        *,
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> list[ClassificationRequestOutput]:
        """Score what may follow each prompt, such as labels, and return outputs in the order of the prompts.

        Args:
            prompts: See `generate`.
            choices: The choices of all prompts, or a list of choices for each prompt: texts after prompts that are texts, otherwise token
                ids.  A choice begins where the prompt ends; spaces at the end of a prompt belong to the choice.
            use_tqdm: See `generate`.

        Raises:
            OptionError: There are not as many lists of choices as prompts, or an item is not a choice.
            RequestError: A prompt or a choice cannot be scored; the message has the index of the prompt, and nothing has run then.  (A
                prompt that fails alone while running has its error in its output.)
            CapacityError: The work does not fit the budgets.
        """
        with self._turns.call():
            batch = choice_batch(prompts, choices, encoder=self._encoder, translator=self._translator, first_index=self._num_requests)
            self._num_requests = batch.next_index
            return self._answered(batch, use_tqdm)

    def map(
        self,
        table: _Table,
        prompt: str,
        *,
        examples: Any = None,
        chat: bool | None = None,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        **keywords: Unpack[MapKeywords],
    ) -> _Table:
        """Ask about every row of a table, and return the table with columns for the answers and errors (docs/tables.md).

        A row that cannot be answered has the reason in the column of errors, and stops no other.

        Args:
            table: A DataFrame of pandas or polars, or a Table of pyarrow.
            prompt: The template of the prompt, with `{name}` for the value of a column, or Jinja.
            examples: Labelled examples: a table of the same kind or a list of dicts, with the column of the answer too.
            chat: Whether prompts are messages; None for messages where the model has a chat template.
            sampling_params: The sampling parameters of generated answers; None is greedy, with at most 128 tokens, and up to the end of the
                line after prompts that are text.
            use_tqdm: See `generate`.
            **keywords: What may be answered, and what the columns are called: `system`, `template`, `choices`, `schema`, `regex`,
                `probabilities`, `raw`, `answer_column`, `error_column`.

        Raises:
            OptionError: A column is missing or would be overwritten, the keywords contradict each other, or no answer can follow the schema
                or the pattern.
            CapacityError: The work does not fit the budgets.
        """
        task = make_task(prompt, keywords)
        return map_frame(self, table, task, examples=examples, chat=chat, params=sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the Hugging Face tokenizer.

        Raises:
            ModelError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.files.name} has no tokenizer")
        return self.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """Return vLLM's defaults, overridden by generation_config.json unless `generation_config="vllm"` was given."""
        return default_sampling_params(self.files.generation_config if self._own_defaults else {})

    # -- calls for jobs and benchmarks -----------------------------------------------------------------------------------------------

    def check_model(self) -> None:
        """Check that the model's files can be served, so that this does not fail only when there is work; no weights are read.

        Raises:
            ModelError: The model cannot be served; the message says why.
        """
        self._model.check()

    def fingerprint(self) -> dict[str, Any]:
        """Return the properties of the model that change its answers, as JSON values by name.

        A job refuses to go on with another fingerprint.

        Raises:
            FlexGenError: See `check_model`.
        """
        return fingerprint(self._model, self._translator, self.chat_template, self.options.load_format)

    def encode(self, texts: str | Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: One or several texts.
            add_special_tokens: Whether to add the special tokens of the tokenizer, which rendered chats have already.

        Raises:
            RequestError: A text cannot be encoded (see `encode_each`); the message has its index.
        """
        return self._encoder.all("text", as_texts(texts), add_special_tokens=add_special_tokens)

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Yield the token ids of each text, or the error that prevents them.

        A text fails if it is not valid Unicode, is longer than the context or the host budget allow, or the tokenizer fails on it or is
        missing.

        Args:
            texts: The texts, pulled as they are needed; errors among them are yielded as they are.
            add_special_tokens: See `encode`.
        """
        return self._encoder.each(texts, add_special_tokens=add_special_tokens)

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation by the model's template, or the error that prevents it.

        Prompts are rendered as the iterator is advanced.

        Args:
            chats: The conversations.
            now: The time that templates see, in seconds since 1970, given where a later run must render the same prompts; None for the
                current time.
        """
        self._turns.check()
        return self._templates.render(chats, now=now)

    @property
    def chat_template(self) -> str | None:
        """The text of the template that renders chats; None where the model has none, as base models do."""
        return self._templates.text

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """Return the engine's requests for the `n` answers to one prompt.

        `max_tokens` is cut to the context that the prompt leaves, as in vLLM.  If the parameters have a seed, the first answer uses it;
        all other seeds are derived.

        Args:
            index: The index of the first request; those of the others follow.
            prompt_token_ids: The prompt.
            params: The sampling parameters.

        Raises:
            RequestError: The prompt or a parameter cannot be served (`context_length_exceeded` where there is no room for an answer).
        """
        return self._translator.requests(index, prompt_token_ids, params)

    def choice_requests(self, index: int, prompt_token_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        """Return the engine's requests that score choices after a prompt; that of choice i has the index `index + 1 + i`.

        Raises:
            RequestError: The prompt or a choice cannot be served.
        """
        return self._translator.choice_requests(index, prompt_token_ids, choices)

    def prefix_census(self) -> PrefixCensus | None:
        """Return an object that finds the common prefixes of requests before they are streamed; None if prefix sharing is off."""
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
        """Answer requests, and yield the results as they finish.

        From the first result to the end of the iterator, the iterator owns the engine: other calls that need it are refused in all threads,
        and closing the LLM closes the iterator.

        Args:
            requests: The requests, pulled lazily.
            workload: The lengths of the requests; tokens that an earlier run generated count as prompt.
            prefixes: The common prefixes of the prompts.
            on_progress: A callback that is called with the progress of the run, also within passes, but not for every step.
            on_pass: A callback that is called after every pass with the unfinished answers, which are gathered while it iterates.

        Raises:
            FlexGenError: Another iterator is not at its end; or, at any result, the LLM is closed.
        """
        _check_workload("stream", workload)
        run = self._run(requests, workload, prefixes=prefixes, on_progress=on_progress, on_pass=on_pass)
        return self._turns.iterate(run)

    def output(
        self, results: Iterable[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int], prompt: str | None = None
    ) -> RequestOutput:
        """Return the answers to one prompt as vLLM's output, in the order of their indices.

        Args:
            results: The results of the engine's requests for the prompt.
            params: The sampling parameters.
            prompt_token_ids: The prompt, after which the text of the answers is decoded.
            prompt: The text of the prompt, if it was given as text.
        """
        return self._translator.output(results, params, prompt_token_ids, prompt)

    def tool_params(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        """Return the sampling parameters of a request with tools, which constrain its answer to calls where they are required.

        Raises:
            RequestError: The model's calls cannot be parsed, or not be required, or the parameters have a constraint of their own.
        """
        return self._tools.params(params, tools)

    def accepts(self, constraint: StructuredOutputsParams, answer: str) -> bool:
        """Return whether a text is a whole answer that a constraint allows.

        Raises:
            RequestError: No answer can be kept to the constraint.
        """
        return self._guides.accepts(constraint, answer)

    def with_tool_calls(self, output: RequestOutput, tools: ToolUse) -> RequestOutput:
        """Return the answers to a request with tools, each with the message that its text stands for, if that can be parsed.

        Raises:
            RequestError: A complete answer has no call, although one is required.
        """
        return self._tools.with_messages(output, tools)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt that was given as token ids, special tokens included."""
        return self._translator.text_of(token_ids)

    def plan(self, workload: Workload) -> Plan:
        """Return the plan that `open` would make for this workload, without opening the engine (see `plan_job`)."""
        _check_workload("plan", workload)
        return plan_job(self._model, self.options, workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this workload, as `stream` would, and return its plan."""
        _check_workload("open", workload)
        with self._turns.call():
            return self._open.serving(workload).plan

    def shrink(self) -> int | None:
        """Have the next engine keep half as many sequences alive as the last one, after memory ran out.

        Returns:
            The new number of sequences; None if it was 1 already.
        """
        with self._turns.call():
            return self._open.shrink()

    def report(self) -> RunReport:
        """Return the report of the last run.

        Raises:
            FlexGenError: Nothing has run yet.
        """
        if self._open.engine is None:
            raise FlexGenError("nothing has run yet, so there is nothing to report")
        return self._open.engine.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes.  A closed LLM cannot generate again.

        If another thread is within a call, this waits for its end.  In a forked process nothing happens, because all of it belongs to the
        parent.
        """
        _close(self._turns, self._open, self._templates, self._guides, wait=True)

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
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        batch = completion_batch(prompts, params, encoder=self._encoder, translator=self._translator, first_index=self._num_requests)
        self._num_requests = batch.next_index
        return self._answered(batch, use_tqdm)

    def _answered(self, batch: Batch[_Output], use_tqdm: bool | Callable[..., Any]) -> list[_Output]:
        if not batch.requests:
            return []
        census = self.prefix_census()
        workload = batch.workload(census)
        run = self._run(batch.requests, workload, prefixes=NO_PREFIXES if census is None else census.common())
        return batch.outputs({result.index: result for result in _with_bar(run, len(workload), use_tqdm)})

    def _run(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> Generator[TokenResult]:
        """Yield the results of the engine, which the caller must own.  `how` has the other arguments of `stream`."""
        engine = self._open.serving(workload)
        try:
            yield from engine.generate(requests, num_requests=len(workload), **how)
        except BaseException:
            self._open.close()  # its live sequences are of no use to a later call
            raise

    @property
    def _max_prompt_chars(self) -> int | None:
        """The most characters of a text that can fit the context; None without a tokenizer."""
        return self.tokenizer.max_chars(self.max_model_len) if self.tokenizer is not None else None


def _check_workload(call: str, workload: object) -> None:
    if not isinstance(workload, Workload):
        raise OptionError(f"{call} takes a Workload, the lengths of requests; prompts and SamplingParams are for generate")


def _tokenizer(files: ModelFiles, other: str | os.PathLike[str] | None, asked: ModelKeywords) -> Tokenizer | None:
    """Load the model's own tokenizer or another one; return None if there is none or `skip_tokenizer_init` is set."""
    if asked.skip_tokenizer_init:
        return None
    revision = asked.tokenizer_revision
    if other is None and revision is not None and revision != asked.options.revision:
        raise OptionError(f"tokenizer_revision={revision!r} needs a tokenizer= of its own")
    if other is not None:
        return Tokenizer.load(resolve_tokenizer(other, revision=revision, token=asked.token))
    return Tokenizer.load(files.folder) if files.has_tokenizer else None


def _close(turns: Turns, engine: EngineSession, templates: Templates, guides: Guides, *, wait: bool) -> None:
    """Release the resources of an LLM that is closed or garbage collected.

    Args:
        turns: The turns of the LLM.
        engine: The engine of the LLM.
        templates: The templates of the LLM.
        guides: The maker of guides of the LLM.
        wait: Whether to wait for a call of another thread; if not, the operating system frees its resources at the end of the process.
    """
    with turns.end(wait=wait) as mine:
        if mine:
            templates.close()
            guides.close()
            engine.close()


def _with_bar(results: Iterator[TokenResult], count: int, use_tqdm: bool | Callable[..., Any]) -> Iterator[TokenResult]:
    if not use_tqdm:
        return results
    from tqdm.auto import tqdm  # a dependency of transformers and of the hub library

    make = use_tqdm if callable(use_tqdm) else tqdm
    return iter(make(results, total=count, desc="Processed prompts", unit="request"))
