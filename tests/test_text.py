"""The tokenizer wrapper, and which ids end an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_model_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flexgen.errors import ModelError, RequestError
from flexgen.text import UNFINISHED, TextStream, Tokenizer, check_text, eos_token_ids

TEXTS = ["It was a dark and stormy night", "", "naïve café ☕ 日本語 \x00 \n\r\n", "</s>", " two  spaces "]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.mark.parametrize("name", ["novels_opt", "novels_qwen3", "model_folder"])
def test_encodes_as_auto_tokenizer_does(name: str, request: pytest.FixtureRequest) -> None:
    """Special tokens included: the novels' tokenizers begin with one."""
    folder = request.getfixturevalue(name)
    reference = AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.load(folder).encode(TEXTS) == [reference(text)["input_ids"] for text in TEXTS]


def test_encodes_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([]) == []


def test_a_text_beyond_the_tokenizer_s_length_is_whole_and_quiet(novels_opt: Path) -> None:
    assert len(Tokenizer.load(novels_opt).encode(["word " * 5000])[0]) > 5000


@pytest.mark.parametrize("text", TEXTS)
def test_decodes_what_it_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode([text])[0], skip_special_tokens=False) == text


def test_special_tokens_are_skipped_on_demand(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([64, 256, 65]) == "ab"
    assert tokenizer.decode([64, 256, 65], skip_special_tokens=False) == "a</s>b"


def test_unknown_ids_are_left_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([64, 290, 65]) == "ab"


@pytest.fixture(scope="module")
def novels(novels_opt: Path) -> Tokenizer:
    """Of words and their parts; begins texts with a special token."""
    return Tokenizer.load(novels_opt)


def test_special_tokens_are_added_on_demand(novels: Tokenizer) -> None:
    (with_special,), (without,) = novels.encode(["It was"]), novels.encode(["It was"], add_special_tokens=False)
    assert with_special == [2, *without]


def test_a_forbidden_word_has_a_form_behind_a_space(novels: Tokenizer, tokenizer: Tokenizer) -> None:
    """Where that is as long and begins with another token; as vLLM does."""
    forms = [novels.encode_word(word) for word in (" a", "b", "the", "it was", "xylophone")]
    assert [[novels.decode(ids) for ids in each] for each in forms[:2]] == [["a", " a"], ["b", " b"]]
    for first, *later in forms:
        assert all(len(ids) == len(first) and ids[0] != first[0] and novels.decode(ids) == " " + novels.decode(first) for ids in later)
    assert tokenizer.encode_word("ab") == [[64, 65]], "a space is a token of its own"
    with pytest.raises(RequestError, match="bad_words") as caught:
        novels.encode_word("  ")
    assert caught.value.param == "bad_words"


# -- ids that come one by one ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    """A tokenizer as Llama 2's: bytes for what it does not know, and a decoder that strips the first space."""
    import tokenizers
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "a": 257, "\u2581a": 258, "ab": 259}
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))


def streamed(tokenizer: Tokenizer, ids: list[int], **how: bool) -> str:
    stream = TextStream(tokenizer, **how)
    return "".join(stream.push(token_id) for token_id in ids)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters=UNFINISHED), max_size=60))
def test_bytes_that_come_one_by_one_make_the_text(llama: Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    ids = list(text.encode())
    assert streamed(llama, ids) == llama.decode(ids)
    (ids,) = tokenizer.encode([text])
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(ids=st.lists(st.sampled_from([256, 257, 258, 259]), max_size=40))
def test_spaces_between_words_stay(llama: Tokenizer, ids: list[int]) -> None:
    assert streamed(llama, ids) == llama.decode(ids)


@given(ids=st.lists(st.integers(0, 8191), max_size=40))
def test_any_tokens_one_by_one_make_the_text(novels: Tokenizer, ids: list[int]) -> None:
    """Random ids are no valid UTF-8: whole characters only are given out, and nothing is lost but an unfinished end."""
    for skip in (True, False):
        whole = novels.decode(ids, skip_special_tokens=skip)
        given_out = streamed(novels, ids, skip_special_tokens=skip)
        assert whole.startswith(given_out)
        assert set(whole.removeprefix(given_out)) <= {UNFINISHED}


def test_a_character_is_given_out_when_it_is_complete(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    (ids,) = tokenizer.encode(["a☕b"])
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "☕", "b"]


@pytest.mark.parametrize("ids", [[64], [162], [256], [162, 256], [64, 162, 162]], ids=str)
def test_each_token_costs_the_same(tokenizer: Tokenizer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters, bytes that are no text, special tokens that are skipped: few ids are decoded for each."""
    most, decode = 0, tokenizer.decode

    def counting(token_ids: list[int], **how: bool) -> str:
        nonlocal most
        most = max(most, len(token_ids))
        return decode(token_ids, **how)

    monkeypatch.setattr(tokenizer, "decode", counting)
    streamed(tokenizer, ids * 300)
    assert most <= 32


def test_a_lone_surrogate_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        check_text("ab\ud800c")
    with pytest.raises(RequestError):
        tokenizer.encode(["fine", "\udc00"])


def test_a_corrupt_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        Tokenizer.load(folder)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass EvilTokenizer: ...\n")
    settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        Tokenizer.load(folder)
    except ModelError:
        pass  # refused or ignored: both are safe
    assert not canary.exists()


@pytest.mark.parametrize(
    ("config", "generation_config", "wanted"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, {6, 7, 256}),
        ({"eos_token_id": 5}, {}, {5, 256}),
        ({"text_config": {"eos_token_id": 8}}, {}, {8, 256}),
        ({}, {"eos_token_id": None}, {256}),
        ({"eos_token_id": 0}, {}, {0, 256}),
    ],
)
def test_what_ends_an_answer(tokenizer: Tokenizer, config: dict, generation_config: dict, wanted: set[int]) -> None:
    assert eos_token_ids(config, generation_config, tokenizer) == wanted
    assert eos_token_ids(config, generation_config, None) == wanted - {256}


@pytest.mark.parametrize("value", ["2", [1, None], 1.5, True])
def test_a_malformed_eos_is_a_model_error(value: object) -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        eos_token_ids({"eos_token_id": value}, {}, None)
