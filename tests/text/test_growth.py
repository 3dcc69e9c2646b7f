"""What bounds tokenising: texts that no context holds, tokenizers that blow texts up, and tokenizers that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexgen.errors import ModelError, RequestError
from flexgen.text import growth as text_sizes
from flexgen.text.growth import MEMORY_PER_BYTE, check_file
from flexgen.text.tokenizer import Tokenizer

ALPHABET = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
HOSTILE = "a" * 40 + "b"  # the regex below does not get through it
GROWING = normalizers.Sequence([normalizers.Replace(Regex("y"), "yy")] * 30)  # 2^30 of each


def make(*, normalizer: Any = None, pre_tokenizer: Any = None, model: Any = None, longest: int = 8) -> Tokenizer:
    """Bytes, and one token of `longest` characters."""
    fast = tokenizers.Tokenizer(model or models.BPE(vocab={**ALPHABET, "a" * longest: 256}, merges=[]))
    fast.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer is not None:
        fast.normalizer = normalizer
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))


@pytest.fixture
def hostile() -> Tokenizer:
    """Panics: a Rust library's, which is no Exception."""
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    return make(pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


@pytest.fixture
def changed(novels_opt: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """The folder of a tokenizer whose tokenizer.json a test has changed."""

    def change(how: Callable[[dict[str, Any]], None]) -> Path:
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(novels_opt / name, tmp_path)
        value = json.loads((novels_opt / "tokenizer.json").read_text())
        how(value)
        (tmp_path / "tokenizer.json").write_text(json.dumps(value))
        return tmp_path

    return change


# -- a tokenizer that fails -----------------------------------------------------------------------------------------------------------


def test_a_panic_is_the_error_of_its_text(hostile: Tokenizer) -> None:
    good, bad, last = hostile.encode_each(["ab", HOSTILE, "ba"])
    assert (good, last) == ([ALPHABET["a"], ALPHABET["b"]], [ALPHABET["b"], ALPHABET["a"]])
    assert isinstance(bad, RequestError)
    assert (bad.code, bad.param) == ("tokenizer_error", "prompt")
    with pytest.raises(RequestError, match="tokenizer fails"):
        hostile.encode([HOSTILE])


def test_a_panic_on_a_forbidden_word(hostile: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"bad_words.*tokenizer fails") as caught:
        hostile.encode_word(HOSTILE)
    assert caught.value.param == "bad_words"


@pytest.mark.parametrize("error", [OverflowError("int too big"), type("PanicException", (BaseException,), {})("index out of bounds")])
def test_a_failure_to_decode(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **how: object) -> None:
        raise error

    tokenizer = make()
    monkeypatch.setattr(tokenizer.hf, "decode", fail)
    with pytest.raises(RequestError, match=f"fails on these tokens: {error}"):
        tokenizer.decode([1])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2)])
def test_who_wants_to_stop_is_not_held_back(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **how: object) -> None:
        raise error

    tokenizer = make()
    monkeypatch.setattr(tokenizer, "_encode", stop)
    with pytest.raises(type(error)):
        tokenizer.encode(["a"])


def test_a_panic_while_loading(novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*arguments: object, **how: object) -> None:
        raise type("PanicException", (BaseException,), {})("poisoned")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ModelError, match="cannot be loaded: poisoned"):
        Tokenizer.load(novels_opt)


# -- texts that are too long ----------------------------------------------------------------------------------------------------------


def test_what_no_context_holds_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(longest=8)
    asked: list[str] = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda texts, special: asked.extend(texts) or encode(texts, special))
    assert tokenizer.max_chars(10) == 80
    short, too_long, too_many = tokenizer.encode_each(["b" * 11, "a" * 89, "b" * 12], max_tokens=10)
    assert short == [ALPHABET["b"]] * 11, "one more than the context may be predicted"
    for refused in (too_long, too_many):
        assert isinstance(refused, RequestError)
        assert refused.code == "context_length_exceeded"
    assert "a" * 89 not in asked


@pytest.mark.parametrize(
    ("tokenizer", "factor"),
    [
        (lambda: make(), 1),
        (lambda: make(normalizer=normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])), 1),
        (lambda: make(normalizer=normalizers.NFC()), 4),
        (lambda: make(normalizer=normalizers.Replace(Regex(" +"), " ")), 16),
        (lambda: make(normalizer=normalizers.Replace("  ", " ")), 16),
        (lambda: make(normalizer=normalizers.Strip()), 16),
        (lambda: make(normalizer=normalizers.NFKC()), 16),
        (lambda: make(pre_tokenizer=pre_tokenizers.Whitespace()), 16),
        (lambda: make(pre_tokenizer=pre_tokenizers.Split(" ", "removed")), 16),
        (lambda: make(model=models.WordLevel({"aaaaaaaa": 0, "[UNK]": 1}, unk_token="[UNK]")), 16),
    ],
)
def test_characters_that_a_token_may_stand_for(tokenizer: Callable[[], Tokenizer], factor: int) -> None:
    """Where the tokenizer may drop some, many."""
    assert tokenizer().max_chars(1) == 8 * factor


def test_a_token_that_takes_the_spaces_beside_it() -> None:
    tokenizer = make()
    tokenizer.hf.add_special_tokens({"additional_special_tokens": [tokenizers.AddedToken("<end>", rstrip=True)]})
    assert Tokenizer(tokenizer.hf).max_chars(1) == 8 * 16


def test_texts_are_tokenised_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their size, and none is pulled before it is needed."""
    tokenizer = make()
    sizes: list[int] = []
    encode = tokenizer._encode

    def recorded(texts: list[str], special: bool) -> list[list[int]]:
        sizes.append(sum(len(text.encode()) for text in texts))
        return encode(texts, special)

    monkeypatch.setattr(tokenizer, "_encode", recorded)
    pulled = 0

    def texts() -> Any:
        nonlocal pulled
        for _ in range(40):
            pulled += 1
            yield "é" * 10_000

    found = tokenizer.encode_each(texts())
    next(found)
    assert pulled < 20
    assert len(list(found)) == 39
    assert max(sizes) <= 256 << 10
    assert sum(sizes) == 40 * 20_000


def test_a_text_that_takes_too_much_memory() -> None:
    tokenizer = make()
    allowed, refused, last = tokenizer.encode_each(["b" * 300_000, "b" * 300_001, "b"], memory_bytes=300_000 * MEMORY_PER_BYTE)
    assert isinstance(allowed, list)
    assert isinstance(last, list)
    assert isinstance(refused, RequestError)
    assert refused.code == "prompt_too_large"
    assert "300,001 characters" in str(refused)


def test_errors_are_handed_on() -> None:
    error = RequestError("was bad before")
    assert list(make().encode_each([error, "a", error])) == [error, [ALPHABET["a"]], error]


# -- tokenizers that blow texts up ----------------------------------------------------------------------------------------------------


def test_a_text_that_a_normalizer_makes_enormous() -> None:
    tokenizer = make(normalizer=GROWING)
    first, refused = tokenizer.encode_each(["ab", "ay"], memory_bytes=1 << 20)
    assert first == [ALPHABET["a"], ALPHABET["b"]]
    assert isinstance(refused, RequestError)
    assert refused.code == "prompt_too_large"


def test_what_normalizers_make_longer_is_counted() -> None:
    tokenizer = make(normalizer=normalizers.NFKD())
    ligature = "\ufdfa"  # 18 characters, 33 bytes
    allowed, refused = tokenizer.encode_each(["b" * 300_000, ligature * 10_000], memory_bytes=300_000 * MEMORY_PER_BYTE)
    assert isinstance(allowed, list)
    assert isinstance(refused, RequestError)


LONG = "x" * 50_000
CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "normalizer.prepend": lambda value: value.update(normalizer={"type": "Prepend", "prepend": LONG}),
    "normalizer.normalizers.content": lambda value: value.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": LONG}]}
    ),
    "decoder.content": lambda value: value.update(decoder={"type": "Replace", "pattern": {"String": "a"}, "content": LONG}),
    "unk_token": lambda value: (value["model"].update(unk_token=LONG), value["model"]["vocab"].update({LONG: 8191})),
    "end_of_word_suffix": lambda value: value["model"].update(end_of_word_suffix=LONG, merges=[]),
    "post_processor adds 2,000 tokens": lambda value: value["post_processor"]["special_tokens"]["</s>"].update(
        ids=[2] * 2000, tokens=["</s>"] * 2000
    ),
    "is made of": lambda value: value["post_processor"].update(
        single=[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 20_000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_tokenizer_that_would_make_any_text_enormous_is_refused(words: str, changed: Any) -> None:
    with pytest.raises(ModelError, match=words.replace(".", r"\.")):
        Tokenizer.load(changed(CHANGES[words]))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    check_file(path)
    path.write_text("{}" * 100)
    check_file(path)
    monkeypatch.setattr(text_sizes, "_MAX_FILE_BYTES", 199)
    with pytest.raises(ModelError, match=r"tokenizer\.json has 200 B"):
        check_file(path)
