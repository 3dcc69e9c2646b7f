"""The class LLM, which puts the parts together (model files, tokenizer, plan, engine) under vLLM's names.

Knows nothing of files of requests (jobs/) or terminals (cli/).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack

from flexgen.api.vllm_keywords import check_call, read_keywords
from flexgen.api.vllm_types import ChatKeywords, GenerateKeywords, LLMKeywords
from flexgen.base.recorder import check_trace
from flexgen.base.steps import step
from flexgen.chat import make_chats, parse_tools
from flexgen.errors import FlexGenError, ModelError
from flexgen.hub.model_files import ModelFiles
from flexgen.options import EngineOptions
from flexgen.outputs import ClassificationRequestOutput, RequestOutput
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.request import PartialAnswer, SamplingParams, TokenRequest, TokenResult
from flexgen.session.batch import choice_batch, completion_batch
from flexgen.session.lookup import files_of
from flexgen.session.model import ResolvedModel
from flexgen.session.served import ServedModel
from flexgen.session.weights import in_weight_format
from flexgen.tables.in_memory import FrameMap, MapKeywords, make_task
from flexgen.text.choices import Choice
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes
from flexgen.text.defaults import default_sampling_params, unsupported_defaults
from flexgen.text.prompts import Prompt, as_conversations, as_texts

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
        model: A Hugging Face folder, a GGUF file or a hub id, or files that are already resolved.
        tokenizer: The folder, GGUF file or hub id of another tokenizer than the model's.
        chat_template: A Jinja template, a file that holds one, or the name of one of the model's; None for the model's default.
        chat_template_kwargs: Variables for the template of every chat; a chat may override them.
        **keywords: The fields of `EngineOptions`, by name, and vLLM's arguments (docs/vllm.md).  Of these some have a meaning here, most
            change nothing and are named in a warning, and values that cannot be honoured are refused.

    Attributes:
        model: The model as jobs and evaluations ask it.
        name: The name of the model, as the user wrote it.
        files: The model's files, resolved.
        tokenizer: The tokenizer; None where there is none, so that prompts are token ids and answers have no text.
        vocab_size: The size of the vocabulary; token ids lie below it.
        max_model_len: The most tokens that a prompt and its answer may have together.
        eos_token_ids: The tokens that end an answer unless its parameters ignore them.
        chat_template: The text of the template that renders chats; None where the model has none, as base models do.

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
        check_trace(options.trace)
        if not isinstance(model, ModelFiles):
            model = files_of(model, options, token=asked.token)
        self.files = in_weight_format(model, options)
        step(f"reading configuration and tokenizer of {self.files.name}")
        resolved = ResolvedModel(self.files, options)
        self.vocab_size, self.max_model_len = resolved.token_limits
        self.tokenizer = None
        if not asked.skip_tokenizer_init:
            self.tokenizer = resolved.load_tokenizer(tokenizer, revision=asked.tokenizer_revision, token=asked.token)
        for setting in unsupported_defaults(self.files.generation_config):
            logger.warning("%s: generation_config.json asks for %s, which is not supported yet and not applied", self.files.name, setting)
        self.model = ServedModel(resolved, self.tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        self.name, self.chat_template, self.eos_token_ids = self.files.name, self.model.templates.text, self.model.eos_token_ids
        self._own_defaults = asked.own_defaults
        self._num_requests = 0

    @property
    def options(self) -> EngineOptions:
        """The options that were asked for, of which `max_num_seqs` is lowered when memory runs out in a job."""
        return self.model.options

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
        with self.model.turns.call():
            params = self.get_default_sampling_params() if sampling_params is None else sampling_params
            batch = completion_batch(prompts, params, self.model, first_index=self._num_requests)
            self._num_requests = batch.next_index
            return batch.answer(self.model, use_tqdm)

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
        self.model.turns.check()
        chats = make_chats(
            as_conversations(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            tools=parse_tools(tools if tools is None else list(tools)),
        )
        texts = self.model.templates.prompts(chats, chat_template)
        ids = self.model.encoder.all("conversation", texts, add_special_tokens=False)
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
        with self.model.turns.call():
            batch = choice_batch(prompts, choices, self.model, first_index=self._num_requests)
            self._num_requests = batch.next_index
            return batch.answer(self.model, use_tqdm)

    def map(
        self,
        table: _Table,
        prompt: str | None = None,
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
            table: A DataFrame of pandas or polars, a Table of pyarrow, or a dict of numpy's arrays.
            prompt: The template of the prompt, with `{name}` for the value of a column, or Jinja; None where `messages` names a column of
                conversations.
            examples: Labelled examples: a table of the same kind or a list of dicts, with the column of the answer too.
            chat: Whether prompts are messages; None for messages where the model has a chat template.
            sampling_params: The sampling parameters of generated answers; None is greedy, with at most 128 tokens, and up to the end of the
                line after prompts that are text.
            use_tqdm: See `generate`.
            **keywords: What is asked and may be answered, and what the columns are called: `messages`, `system`, `template`, `choices`,
                `schema`, `regex`, `probabilities`, `raw`, `finish_reason`, `token_counts`, `answer_column`, `error_column`.

        Raises:
            OptionError: A column is missing or would be overwritten, the keywords contradict each other, or no answer can follow the schema
                or the pattern.
            CapacityError: The work does not fit the budgets.
        """
        task = make_task(prompt, keywords)
        return FrameMap(self, task, examples=examples, chat=chat, params=sampling_params)(table, use_tqdm=use_tqdm)

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

    # -- more than vLLM has -------------------------------------------------------------------------------------------------------------

    def encode(self, texts: str | Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: One or several texts.
            add_special_tokens: Whether to add the special tokens of the tokenizer, which rendered chats have already.

        Raises:
            RequestError: A text cannot be encoded (see `ServedModel.encode_each`); the message has its index.
        """
        return self.model.encoder.all("text", as_texts(texts), add_special_tokens=add_special_tokens)

    def plan(self, workload: Workload) -> Plan:
        """Return the plan that `open` would make for this workload, without opening the engine (see `plan_job`)."""
        return self.model.plan(workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this workload, as `stream` would, and return its plan."""
        return self.model.open(workload)

    def stream(
        self,
        requests: Iterable[TokenRequest],
        workload: Workload,
        *,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests, and yield the results as they finish (see `ServedModel.stream`); closing the LLM closes the iterator."""
        return self.model.stream(requests, workload, prefixes=prefixes, on_progress=on_progress, on_pass=on_pass)

    def report(self) -> RunReport:
        """Return the report of the last run.

        Raises:
            FlexGenError: Nothing has run yet.
        """
        return self.model.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes.  A closed LLM cannot generate again.

        If another thread is within a call, this waits for its end.  In a forked process nothing happens, because all of it belongs to the
        parent.
        """
        self.model.close()

    def __reduce__(self) -> NoReturn:
        raise FlexGenError("an LLM holds memory, files and threads, so it cannot be pickled or copied: make one in each process")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
