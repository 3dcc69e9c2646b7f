"""Texts, tokens and answers of a model: what becomes of them without an engine.  Knows nothing of plans and runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen.base.structured import StructuredOutputsParams
from flexgen.chat import Templates, ToolUse
from flexgen.errors import RequestError
from flexgen.outputs import RequestOutput
from flexgen.request import SamplingParams, TokenRequest, TokenResult
from flexgen.session.model import ResolvedModel
from flexgen.text.answers import RequestTranslator
from flexgen.text.defaults import eos_token_ids
from flexgen.text.encoding import Encoder
from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer
from flexgen.text.tools import Tools


class ModelTexts:
    """What turns prompts into the engine's requests, and its results into answers.

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
        templates: The templates of chats, which the owner closes.
        guides: The maker of guides, which the owner closes.
        translator: The translator between prompts, requests, results and outputs.

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
        self.guides = Guides(tokenizer, self.vocab_size, self.eos_token_ids)
        self.translator = RequestTranslator(
            tokenizer=tokenizer, vocab_size=self.vocab_size, max_model_len=self.max_model_len, eos_token_ids=self.eos_token_ids,
            seed=options.seed, max_logprobs=options.max_logprobs, guides=self.guides,
        )  # fmt: skip
        model_type = str(files.config.get("model_type"))
        self._tools = Tools(files.name, model_type, tokenizer, self.templates, self.guides, self.eos_token_ids)

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
        return self.guides.accepts(constraint, answer)

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
