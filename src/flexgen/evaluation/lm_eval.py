"""The model for lm-evaluation-harness: `simple_evaluate(model=FlexGenLM("MODEL"), tasks=[...])`.

lm-eval hands over all requests of a kind at once.  They become the lines of one durable job: what fits is batched, common beginnings are
computed once, and an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen.chat import Templates, make_chats
from flexgen.errors import OptionError, RequestError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding, Pair
from flexgen.evaluation.generation import Generation
from flexgen.evaluation.perplexity import rolling_loglikelihoods
from flexgen.evaluation.scoring import score
from flexgen.jobs.interrupt import StopRequest
from flexgen.llm import LLM
from flexgen.report.progress import Progress

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise OptionError(f"lm-evaluation-harness is not installed ({error}): pip install 'flexgen-engine[eval]'") from error

_MAX_GEN_TOKS = 256  # lm-eval's default


class FlexGenLM(TemplateLM):
    """A flexgen model as lm-eval sees it.  Scores, greedy flags and texts are those of lm-eval's `hf` backend.

    It is a context manager; `close` frees an LLM that it has made itself.

    Args:
        pretrained: A Hugging Face folder, a hub id, or an LLM that is open and stays open.
        state: The folder in which requests and their results are kept, so that the same evaluation goes on after an interruption and
            scores nothing twice; None keeps nothing.
        add_bos_token: Whether prompts begin with the beginning-of-sequence token; None for the tokenizer's own rule.
        prefix_token_id: The token that stands in place of an empty context; None for the tokenizer's first or last token of a text.
        max_gen_toks: The most tokens of answers to requests that name no number.
        chat_template_args: Variables for the chat template.
        enable_thinking: A variable that some chat templates know; needs `think_end_token`, and tasks that generate.
        think_end_token: The text or the token after which the answer of a model that thinks begins.
        use_tqdm: Whether to show a bar of progress.
        on_progress: A callback that is called with the progress of each job, in place of the bar.
        stop: A request to stop, which another thread may make; then `Stopped` is raised, and what was done is kept.
        batch_size: Changes nothing, because the planner chooses batches.
        max_batch_size: Changes nothing.
        **options: The keywords of LLM, where this makes one.

    Raises:
        OptionError: Keywords contradict each other, or see `LLM`.
        ModelError: The model has no tokenizer, or see `LLM`.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | LLM,
        *,
        state: str | os.PathLike[str] | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        use_tqdm: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
        stop: StopRequest | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size
        if enable_thinking and think_end_token is None:
            raise OptionError("enable_thinking needs think_end_token, the text or the token that ends the thinking")
        if isinstance(pretrained, LLM) and options:
            raise OptionError(f"{min(options)} is an option of the model, which is open already")
        with contextlib.ExitStack() as stack:
            self.llm = pretrained if isinstance(pretrained, LLM) else stack.enter_context(LLM(pretrained, **options))
            self.tokenizer = self.llm.get_tokenizer()
            self._encoding = Encoding(self.tokenizer, add_bos_token=add_bos_token, prefix_token_id=prefix_token_id)
            thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
            self._templates = stack.enter_context(_templates(self.llm, {**(chat_template_args or {}), **thinking}))
            self._stack = stack.pop_all()
        self._answers = Answers(llm=self.llm, state=None if state is None else Path(state), on_progress=on_progress, stop=stop)
        self._use_tqdm = use_tqdm and on_progress is None
        self._enable_thinking, self._max_gen_toks = enable_thinking, max_gen_toks
        text = isinstance(think_end_token, str) and not think_end_token.isdigit()
        self._think_end_token = think_end_token if text or think_end_token is None else int(think_end_token)

    # -- what lm-eval asks a model --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands in place of an empty context."""
        return self._encoding.prefix_token_id

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.llm.max_model_len

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of answers to requests that name no number."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which lm-eval tells caches of requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; see `Encoding.encode`."""
        return self._encoding.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation after its context, and whether greedy sampling would give it."""
        if self._enable_thinking:
            raise OptionError("enable_thinking is for tasks that generate: a task asks for scores of continuations")
        texts: list[Any] = [request.args for request in requests]
        return self._scores(texts, self._encoding.pairs(texts), disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [text for text, _, _ in requests]
        return self._scores(texts, [(context, continuation) for _, context, continuation in requests], disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of each whole text, in windows of the context."""
        texts: list[str] = [request.args[0] for request in requests]
        with self._shown("scoring texts", disable_tqdm) as answers:
            found = rolling_loglikelihoods(answers, self._encoding, [self._encoding.encode(text) for text in texts])
        for text, loglikelihood in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), loglikelihood)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that each prompt is continued with, up to the first of the texts that end it."""
        given: list[Any] = [request.args for request in requests]
        asked = [(prompt, self._generation(kwargs)) for prompt, kwargs in given]
        lines = [generation.line(self._encoding.prompt(prompt), self.max_length) for prompt, generation in asked]
        with self._shown("generating", disable_tqdm) as answers:
            records = answers.of("generate_until", lines)
        texts = [each.text(record, self.tokenizer, self._think_end_token) for (_, each), record in zip(asked, records, strict=True)]
        for each, text in zip(given, texts, strict=True):
            self.cache_hook.add_partial("generate_until", each, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt; where the template refuses messages of the system, it is rendered without them.

        Raises:
            OptionError: The template refuses the conversation, or the model has none.
        """
        rendered = self._render(chat_history, add_generation_prompt)
        others = [message for message in chat_history if message["role"] != "system"]
        if isinstance(rendered, RequestError) and len(others) < len(chat_history):
            rendered = self._render(others, add_generation_prompt)
        if isinstance(rendered, RequestError):
            raise OptionError(f"a chat cannot become a prompt: {rendered}") from rendered
        return rendered

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside results."""
        known = self.llm.model.fingerprint()
        return {
            "model_dtype": known["dtype"],
            "model_revision": self.llm.options.revision or "",
            "model_sha": self.llm.files.commit or "",
            "flexgen_version": importlib.metadata.version("flexgen-engine"),
        }

    # -- resources ------------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model, if this made it, and the process that renders chats."""
        self._stack.close()

    def __enter__(self) -> FlexGenLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __str__(self) -> str:
        return "flexgen"  # lm-eval's command prints the model above the table of results

    # -- inside ---------------------------------------------------------------------------------------------------------------------------

    def _scores(self, texts: Sequence[tuple[str, str]], pairs: Sequence[Pair], *, disable_tqdm: bool) -> list[tuple[float, bool]]:
        with self._shown("scoring", disable_tqdm) as answers:
            found = [(each.logprob, each.is_greedy) for each in score(answers, "loglikelihood", pairs)]
        for text, each in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, each)
        return found

    def _generation(self, kwargs: dict[str, Any]) -> Generation:
        known: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, self._max_gen_toks))
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(known.pop("until"), eos=end if isinstance(end, str) else "".join(end))
        return Generation.of(until, known.pop("max_gen_toks"), known)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str | RequestError:
        chats = make_chats(messages, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        return next(iter(self._templates.render(chats)))

    @contextlib.contextmanager
    def _shown(self, what: str, disable_tqdm: bool) -> Iterator[Answers]:
        """Yield what answers lines, with a bar of progress while the context is open."""
        if disable_tqdm or not self._use_tqdm:
            yield self._answers
            return
        from tqdm.auto import tqdm

        with tqdm(desc=what, unit="request") as bar:

            def show(progress: Progress) -> None:
                bar.total = progress.num_requests
                bar.update(progress.num_requests_done - bar.n)

            yield self._answers.with_progress(show)


register_model("flexgen")(FlexGenLM)  # not as a decorator, which would hide the class from type checkers


@contextlib.contextmanager
def _templates(llm: LLM, kwargs: Mapping[str, Any]) -> Iterator[Templates]:
    """Yield the model's templates with other variables, and without a bound on prompts, which are cut at their beginning here."""
    assert llm.tokenizer is not None
    templates = Templates(llm.name, llm.chat_template, llm.tokenizer.special_tokens, kwargs=kwargs)
    try:
        yield templates
    finally:
        templates.close()
