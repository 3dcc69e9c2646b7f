"""Requests to generate, as evaluations state them, as lines of a job; and the texts of their records.

What is sampled, where it ends and how it is cut are those of lm-evaluation-harness's `hf` backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgen.errors import OptionError
from flexgen.evaluation.answers import Line, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "seed")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "use_cache": (True, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a request to generate asks for, besides its prompt.

    Attributes:
        until: The texts that end an answer and are cut off it.
        max_tokens: The most tokens to generate.
        temperature: The number by which logits are divided; 0 is greedy.
        sampling: Other sampling parameters, by flexgen's names.
    """

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    sampling: Mapping[str, Any]

    @classmethod
    def of(cls, until: Sequence[str], max_tokens: int, kwargs: Mapping[str, Any]) -> Generation:
        """Return what keywords of transformers' `generate` ask for.

        Args:
            until: The texts that end an answer, that of the end of the text included.
            max_tokens: The most tokens to generate.
            kwargs: The other keywords.

        Raises:
            OptionError: A keyword asks for something that flexgen does not do; the message names it.
        """
        sampling = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        for name, value in kwargs.items():
            if name in ("do_sample", "temperature", *_SAMPLING) or value is None:
                continue
            if name == "max_length":
                raise OptionError("max_length counts prompt and answer together: give max_gen_toks")
            if value not in _NEUTRAL.get(name, ()):
                raise OptionError(f"generation argument {name}={value!r} is not supported")
        temperature = float(kwargs.get("temperature") or 0.0)
        greedy = kwargs.get("do_sample") is False or not temperature
        return cls(until=tuple(until), max_tokens=max_tokens, temperature=0.0 if greedy else temperature, sampling=sampling)

    def line(self, prompt: Sequence[int], max_length: int) -> Line:
        """Return the line that generates after a prompt, of which what does not fit is cut off at the beginning.

        Args:
            prompt: The tokens of the prompt, at least one.
            max_length: The most tokens of prompt and answer together.

        Raises:
            OptionError: The answer alone fills the context.
        """
        room = max_length - self.max_tokens
        if room <= 0:
            raise OptionError(f"max_gen_toks={self.max_tokens} leaves no room for a prompt in a context of {max_length}")
        return {
            "prompt": list(prompt[-room:]),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stop": sorted({each for each in self.until if each}),  # lm-eval cuts nothing off at an empty text
            "skip_special_tokens": False,  # a special token may be one of the texts that end an answer
            **self.sampling,
        }

    def text(self, record: Record, tokenizer: PreTrainedTokenizerBase, think_end_token: str | int | None = None) -> str:
        """Return the text of an answer, cut at the first of the texts that end it.

        It is decoded without the prompt and without special tokens, as lm-eval does, so that tokenizers of the SentencePiece kind strip a
        space at its beginning.

        Args:
            record: The record of the answer.
            tokenizer: The Hugging Face tokenizer.
            think_end_token: What ends the thinking that precedes an answer, as a text or a token; the answer begins after the last one.
        """
        tokens: list[int] = record["token_ids"]
        if isinstance(think_end_token, int) and think_end_token in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think_end_token) :]
        decoded = tokenizer.decode(tokens, skip_special_tokens=True)
        text = decoded if isinstance(decoded, str) else "".join(decoded)
        if think_end_token is not None:
            text = (text.split(think_end_token)[-1] if isinstance(think_end_token, str) else text).lstrip()
        for each in self.until:
            text = text.split(each)[0] if each else text
        return text
