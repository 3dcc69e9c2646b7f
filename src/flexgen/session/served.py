"""A model that takes requests: texts become tokens, tokens results, and results texts, over at most one open engine.

Jobs, evaluations and `LLM` ask this.  Knows nothing of files of requests.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen.base.structured import StructuredOutputsParams
from flexgen.chat import Chat, Templates, ToolUse
from flexgen.errors import FlexGenError, OptionError, RequestError
from flexgen.options import EngineOptions
from flexgen.outputs import RequestOutput
from flexgen.plan.formats import Formats
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.report.steady import SteadyReport
from flexgen.request import PartialAnswer, SamplingParams, TokenRequest, TokenResult
from flexgen.session.fingerprint import fingerprint
from flexgen.session.model import ResolvedModel
from flexgen.session.session import EngineSession
from flexgen.session.turns import Turns
from flexgen.text.answers import RequestTranslator
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from flexgen.text.defaults import eos_token_ids
from flexgen.text.encoding import Encoder
from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer
from flexgen.text.tools import Tools


class ServedModel:
    """A model that takes requests.

    The engine is opened by the first work, because the plan depends on it, and closed with this, or when this is garbage collected.

    Args:
        resolved: The files of the model, and the options.
        tokenizer: The tokenizer; None where there is none, so that prompts are token ids and answers have no text.
        chat_template: What replaces the tokenizer's own template, see `LLM`.
        chat_template_kwargs: Variables for the template of every chat.

    Attributes:
        tokenizer: The tokenizer.
        vocab_size: The size of the vocabulary; token ids lie below it.
        max_model_len: The most tokens that a prompt and its answer may have together.
        eos_token_ids: The tokens that end an answer unless its parameters ignore them.
        encoder: The encoder of texts.
        templates: The templates of chats.
        translator: The translator between prompts, requests, results and outputs.
        turns: The turns of callers, one of which `run` needs.

    Raises:
        OptionError: The template cannot be used.
    """

    def __init__(
        self,
        resolved: ResolvedModel,
        tokenizer: Tokenizer | None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        files, options = resolved.files, resolved.options
        self.tokenizer = tokenizer
        self.vocab_size, self.max_model_len = resolved.token_limits
        self.eos_token_ids = eos_token_ids(files.config, files.generation_config, tokenizer)
        self.encoder = Encoder(files.name, tokenizer, self.max_model_len, functools.cache(resolved.tokenizing_bytes))
        own, special = (tokenizer.chat_template, tokenizer.special_tokens) if tokenizer is not None else (None, {})
        most = tokenizer.max_chars(self.max_model_len) if tokenizer is not None else None  # characters of a text that can fit the context
        self.templates = Templates(files.name, own, special, given=chat_template, kwargs=chat_template_kwargs, max_chars=most)
        self._guides = Guides(tokenizer, self.vocab_size, self.eos_token_ids)
        self.translator = RequestTranslator(
            tokenizer=tokenizer, vocab_size=self.vocab_size, max_model_len=self.max_model_len, eos_token_ids=self.eos_token_ids,
            seed=options.seed, max_logprobs=options.max_logprobs, guides=self._guides,
        )  # fmt: skip
        model_type = str(files.config.get("model_type"))
        self._tools = Tools(files.name, model_type, tokenizer, self.templates, self._guides, self.eos_token_ids)
        self.turns = Turns()
        self._engine = EngineSession(resolved)
        self._finalizer = weakref.finalize(self, _close, self.turns, self._engine, self.templates, self._guides, wait=False)

    @property
    def name(self) -> str:
        """The name of the model, as the user wrote it."""
        return self._engine.model.files.name

    @property
    def options(self) -> EngineOptions:
        """The options that were asked for; `shrink` lowers `max_num_seqs`, and formats to choose among become those that are chosen."""
        return self._engine.options

    def check(self) -> None:
        """Check that the model's files can be served, so that this does not fail only when there is work; no weights are read.

        Raises:
            ModelError: The model cannot be served; the message says why.
        """
        self._engine.model.check()

    def fingerprint(self) -> dict[str, Any]:
        """Return the properties of the model that change its answers, as JSON values by name.

        A job refuses to go on with another fingerprint.  As long as formats are to be chosen, it is that of the model as it is.

        Raises:
            FlexGenError: See `check`.
        """
        return fingerprint(self._engine.model, self.translator, self.templates.text)

    def resume(self, begun: Mapping[str, Any]) -> str:
        """Serve in the formats of a job that was begun before, where the options leave formats to choose.

        Args:
            begun: The fingerprint that the job was begun with.

        Returns:
            The formats in words; empty where there was nothing to choose.

        Raises:
            OptionError: The options do not allow these formats.
            FlexGenError: The weights cannot be converted.
        """
        if self.options.allow_formats is None:
            return ""
        formats = Formats(begun.get("weight_format", "auto"), begun.get("kv_format", "auto"))
        self._engine.keep_formats(formats)
        return str(formats)

    # -- prompts and answers ------------------------------------------------------------------------------------------------------------

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation by the model's template, or the error that prevents it.

        Prompts are rendered as the iterator is advanced.

        Args:
            chats: The conversations.
            now: The time that templates see, in seconds since 1970, given where a later run must render the same prompts; None for the
                current time.
        """
        self.turns.check()
        return self.templates.render(chats, now=now)

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Yield the token ids of each text, or the error that prevents them.

        A text fails if it is not valid Unicode, is longer than the context or the host budget allow, or the tokenizer fails on it or is
        missing.

        Args:
            texts: The texts, pulled as they are needed; errors among them are yielded as they are.
            add_special_tokens: Whether to add the special tokens of the tokenizer, which rendered chats have already.
        """
        return self.encoder.each(texts, add_special_tokens=add_special_tokens)

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
        return self.translator.requests(index, prompt_token_ids, params)

    def choice_requests(self, index: int, prompt_token_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        """Return the engine's requests that score choices after a prompt; that of choice i has the index `index + 1 + i`.

        Raises:
            RequestError: The prompt or a choice cannot be served.
        """
        return self.translator.choice_requests(index, prompt_token_ids, choices)

    def output(
        self,
        results: Iterable[TokenResult],
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        prompt: str | None = None,
        tools: ToolUse | None = None,
    ) -> RequestOutput:
        """Return the answers to one prompt as vLLM's output, in the order of their indices.

        Args:
            results: The results of the engine's requests for the prompt.
            params: The sampling parameters.
            prompt_token_ids: The prompt, after which the text of the answers is decoded.
            prompt: The text of the prompt, if it was given as text.
            tools: The tools of the request; each answer then has the message that its text stands for, if that can be parsed.

        Raises:
            RequestError: A complete answer has no call of a tool, although one is required.
        """
        output = self.translator.output(results, params, prompt_token_ids, prompt)
        return output if tools is None else self._tools.with_messages(output, tools)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt that was given as token ids, special tokens included."""
        return self.translator.text_of(token_ids)

    # -- the engine -----------------------------------------------------------------------------------------------------------------------

    def prefix_census(self) -> PrefixCensus | None:
        """Return an object that finds the common prefixes of requests before they are streamed; None if prefix sharing is off."""
        return PrefixCensus(PAGE_TOKENS) if self.options.prefix_sharing else None

    def plan(self, workload: Workload) -> Plan:
        """Return the plan that `open` would make for this workload, without opening the engine (see `plan_job` and `choose_formats`)."""
        _check_workload("plan", workload)
        return self._engine.plan(workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this workload, as `stream` would, and return its plan."""
        _check_workload("open", workload)
        with self.turns.call():
            return self._engine.serving(workload).plan

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
        and closing the model closes the iterator.

        Args:
            requests: The requests, pulled lazily.
            workload: The lengths of the requests; tokens that an earlier run generated count as prompt.
            prefixes: The common prefixes of the prompts.
            on_progress: A callback that is called with the progress of the run, also within passes, but not for every step.
            on_pass: A callback that is called after every pass with the unfinished answers, which are gathered while it iterates.

        Raises:
            FlexGenError: Another iterator is not at its end; or, at any result, the model is closed.
        """
        _check_workload("stream", workload)
        return self.turns.iterate(self.run(requests, workload, prefixes=prefixes, on_progress=on_progress, on_pass=on_pass))

    def run(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> Generator[TokenResult]:
        """Yield the results of the engine, whose turn is the caller's.  `how` has the other arguments of `stream`."""
        engine = self._engine.serving(workload)
        try:
            yield from engine.generate(requests, num_requests=len(workload), **how)
        except BaseException:
            self._engine.close()  # its live sequences are of no use to a later call
            raise

    def steady(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> SteadyReport:
        """Measure passes in the middle of a job; arguments and errors are those of `PlannedEngine.steady`."""
        _check_workload("steady", workload)
        with self.turns.call():
            engine = self._engine.serving(workload)
            try:
                return engine.steady(requests, seed=self.options.seed, **how)
            except BaseException:
                self._engine.close()  # its live sequences are of no use to a later call
                raise

    def shrink(self) -> int | None:
        """Have the next engine keep half as many sequences alive as the last one, after memory ran out.

        Returns:
            The new number of sequences; None if it was 1 already.
        """
        with self.turns.call():
            return self._engine.shrink()

    def report(self) -> RunReport:
        """Return the report of the last run.

        Raises:
            FlexGenError: Nothing has run yet.
        """
        if self._engine.engine is None:
            raise FlexGenError("nothing has run yet, so there is nothing to report")
        return self._engine.engine.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes, after the call of another thread that is at work.

        In a forked process nothing happens, because all of it belongs to the parent.
        """
        _close(self.turns, self._engine, self.templates, self._guides, wait=True)


def _check_workload(call: str, workload: object) -> None:
    if not isinstance(workload, Workload):
        raise OptionError(f"{call} takes a Workload, the lengths of requests; prompts and SamplingParams are for generate")


def _close(turns: Turns, engine: EngineSession, templates: Templates, guides: Guides, *, wait: bool) -> None:
    """Release the resources of a model that is closed or garbage collected.

    Args:
        turns: The turns of the model.
        engine: The engine of the model.
        templates: The templates of the model.
        guides: The maker of guides of the model.
        wait: Whether to wait for a call of another thread; if not, the operating system frees its resources at the end of the process.
    """
    with turns.end(wait=wait) as mine:
        if mine:
            templates.close()
            guides.close()
            engine.end()
