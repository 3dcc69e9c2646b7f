"""Contexts and continuations to tokens: spaces at the seam, empty contexts, beginning-of-sequence tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexgen.errors import ModelError
from flexgen.evaluation.encoding import Encoding

CASES = [
    ("The old house", " stood"),
    ("The old house ", "stood"),
    ("The old house \n ", "stood upon"),
    ("", "Stood"),
    ("", "</s> stood"),
    ("</s>The old", " house"),
    ("x", "yz"),
]


@pytest.fixture(scope="module")
def novels(novels_opt: Path) -> Any:
    return AutoTokenizer.from_pretrained(novels_opt)


def words_tokenizer(*, adds_bos: bool = False, bos: str | None = "<s>") -> Any:
    """Words of one letter each: "a b" is two tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token="</s>")


def test_spaces_at_the_seam_belong_to_the_continuation(novels: Any) -> None:
    encoding = Encoding(novels)
    assert encoding.pair("The old house ", "stood") == encoding.pair("The old house", " stood")
    context, continuation = encoding.pair("The old house", " stood")
    assert novels.decode(continuation) == " stood"
    assert context + continuation == encoding.encode("The old house stood")


def test_an_empty_context_is_the_prefix_token(novels: Any) -> None:
    encoding = Encoding(novels)
    context, continuation = encoding.pair("", "Stood")
    assert context == [novels.bos_token_id]
    assert novels.decode(continuation) == "Stood"
    context, continuation = encoding.pair("", "</s>Stood")
    assert (context, novels.decode(continuation)) == ([novels.bos_token_id], "Stood")
    assert encoding.pair("  ", "Stood")[0] == [novels.bos_token_id]


def test_the_prefix_token() -> None:
    assert Encoding(words_tokenizer()).prefix_token_id == 1
    assert Encoding(words_tokenizer(bos=None)).prefix_token_id == 2
    assert Encoding(words_tokenizer(), prefix_token_id=5).prefix_token_id == 5
    tokenizer = words_tokenizer(bos=None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="prefix_token_id"):
        Encoding(tokenizer)


def test_beginning_of_sequence_tokens() -> None:
    plain, adding = words_tokenizer(), words_tokenizer(adds_bos=True)
    assert Encoding(adding).encode("a b") == [1, 3, 4]
    assert Encoding(adding).encode("<s> a b") == [1, 3, 4], "it has one already"
    assert Encoding(adding, add_bos_token=False).encode("a b") == [3, 4]
    assert Encoding(plain).encode("a b") == [3, 4]
    assert Encoding(plain, add_bos_token=True).encode("a b") == [1, 3, 4]
    assert Encoding(adding).pair("a", " b") == ([1, 3], [4])
    assert Encoding(adding).pair("", "b") == ([1], [4])
    assert Encoding(adding).prompt("<s> a") == [1, 3]
    assert Encoding(adding, add_bos_token=False).prompt("a") == [3]
    assert Encoding(plain).prompt("") == [1], "a prompt has a token"


def test_contexts_in_a_row_are_encoded_like_others(novels: Any) -> None:
    encoding = Encoding(novels)
    texts = [CASES[0], CASES[0], CASES[1], CASES[5], CASES[0], CASES[3]]
    assert encoding.pairs(texts) == [encoding.pair(*each) for each in texts]


@pytest.mark.parametrize("pair", CASES)
def test_pairs_are_those_of_lm_eval(novels: Any, pair: tuple[str, str]) -> None:
    reason = "lm-evaluation-harness (the extra eval) is not installed"
    template: Any = pytest.importorskip("lm_eval.api.model", reason=reason).TemplateLM
    instance = pytest.importorskip("lm_eval.api.instance", reason=reason).Instance
    encoding = Encoding(novels)
    seen: list[Any] = []

    class Theirs(template):
        prefix_token_id = encoding.prefix_token_id
        eot_token_id = novels.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return encoding.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Any]:
            seen.extend(requests)
            return []

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    Theirs().loglikelihood([instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    assert encoding.pair(*pair) == seen[0][1:]
