"""The tokenizer wrapper, and which ids end an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_model_folder
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, SPECIAL, ids_of, make_tokenizer
from transformers import AutoTokenizer

from flexgen.errors import ModelError, RequestError
from flexgen.text.defaults import eos_token_ids
from flexgen.text.stream import TextStream, decode_behind
from flexgen.text.tokenizer import UNFINISHED, Tokenizer, check_text

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
    """Llama 2's kind: bytes for what it does not know, and a decoder that strips the first space."""
    return make_tokenizer("llama2")


def streamed(tokenizer: Tokenizer, ids: list[int], **how: bool) -> str:
    stream = TextStream(tokenizer, **how)
    return "".join(stream.push(token_id) for token_id in ids)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters=UNFINISHED), max_size=60))
def test_bytes_that_come_one_by_one_make_the_text(llama: Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(llama, *(f"<0x{byte:02X}>" for byte in text.encode()))
    assert streamed(llama, ids) == llama.decode(ids)
    (ids,) = tokenizer.encode([text])
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(pieces=st.lists(st.sampled_from(["▁", "a", "▁a", "stood"]), max_size=40))
def test_spaces_between_words_stay(llama: Tokenizer, pieces: list[str]) -> None:
    ids = ids_of(llama, *pieces)
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


# -- answers behind their prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


def streamed_behind(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool = True) -> str:
    stream = TextStream(tokenizer, prompt, skip_special_tokens=skip)
    return "".join(map(stream.push, ids)) + stream.rest()


@given(data=st.data())
def test_an_answer_is_what_its_ids_add_to_the_prompt(kind: Tokenizer, data: st.DataObject) -> None:
    """The text of all ids less that of the prompt, wherever it begins with that and all of its bytes are text."""
    ids = st.lists(st.integers(0, len(kind.hf) + 3), max_size=14)
    prompt, answer, skip = data.draw(ids), data.draw(ids), data.draw(st.booleans())
    before, whole = (kind.decode(each, skip_special_tokens=skip) for each in (prompt, prompt + answer))
    found = decode_behind(kind, prompt, answer, skip_special_tokens=skip)
    if whole.startswith(before) and UNFINISHED not in whole:
        assert found == whole.removeprefix(before)
        assert streamed_behind(kind, prompt, answer, skip=skip) == found


@given(ids=st.lists(st.integers(0, 8191), max_size=40), prompt=st.text(max_size=20))
def test_what_is_decoded_alone_as_behind_a_prompt_stays_as_it_is(novels: Tokenizer, ids: list[int], prompt: str) -> None:
    """Byte-level decoders; ids that are no text included."""
    (before,) = novels.encode([prompt])
    for skip in (True, False):
        assert decode_behind(novels, before, ids, skip_special_tokens=skip) == novels.decode(ids, skip_special_tokens=skip)


WAVE = ("<0xF0>", "<0x9F>", "<0x8C>", "<0x8A>")


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        (("▁a", ":"), ("▁stood", "▁stood"), " stood stood"),
        (("▁a", "\n"), ("▁▁▁", "▁return"), "    return"),
        (("▁a", "▁"), ("▁", "a"), " a"),
        (("▁a",), ("stood", "▁stood"), "stood stood"),
        (("<s>",), ("▁stood", "▁stood"), "stood stood"),
        ((), ("▁stood", "▁stood"), "stood stood"),
        (("▁a", *["<|assistant|>"] * 40), ("▁stood",), " stood"),
        (("▁a",), (*["</s>"] * 40, "▁stood"), " stood"),
        (("▁a", "<|end|>"), ("▁stood",), " stood"),
        (("▁a",), WAVE, "🌊"),
        (("▁a",), (*WAVE, "▁a"), "🌊 a"),
        (("▁a",), WAVE[:1], UNFINISHED),
        (("<0x0A>",), WAVE[:2], UNFINISHED * 2),
        (("▁a",), (*WAVE, "<0x0A>", *WAVE[:2]), "🌊\n" + UNFINISHED * 2),
        (("▁a",), (*WAVE, "<0xFF>", "a"), "🌊" + UNFINISHED + "a"),
        (WAVE * 5, (*WAVE, "a"), "🌊a"),
        (("▁a", *WAVE[:2]), (*WAVE[2:], "▁a"), "🌊 a"),
        (("<0x0A>", *WAVE[:3]), WAVE[3:], "🌊"),
        (WAVE[:2], ("a",), "a"),
    ],
    ids=str,
)
def test_llama_answers(llama: Tokenizer, prompt: tuple[str, ...], answer: tuple[str, ...], text: str) -> None:
    before, ids = ids_of(llama, *prompt), ids_of(llama, *answer)
    assert decode_behind(llama, before, ids) == text
    assert streamed_behind(llama, before, ids) == text


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "text"),
    [
        ("wordpiece", ["a"], ["##s", "stood"], "s stood"),
        ("wordpiece", ["a"], [".", "the"], ". the"),
        ("bpe-suffix", ["a</w>"], ["stood", "a</w>", ".</w>"], " stooda ."),
        ("metaspace-always", ["a"], ["▁stood", "▁"], " stood "),
        ("metaspace-never", ["a"], ["▁stood", "▁"], " stood "),
        ("byte-level", ["a", "Ġð"], ["Ł", "Į", "Ĭ", "a"], "🌊a"),
    ],
)
def test_answers_of_other_kinds(kind: str, prompt: list[str], answer: list[str], text: str) -> None:
    tokenizer = make_tokenizer(kind)
    before, ids = ids_of(tokenizer, *prompt), ids_of(tokenizer, *answer)
    assert decode_behind(tokenizer, before, ids) == streamed_behind(tokenizer, before, ids) == text


def test_special_tokens_that_are_shown_are_a_beginning(llama: Tokenizer) -> None:
    """A space behind one stays where it is part of the text."""
    prompt, ids = ids_of(llama, "<s>"), ids_of(llama, "▁stood", "</s>", "▁a")
    assert decode_behind(llama, prompt, ids, skip_special_tokens=False) == " stood</s> a"
    assert streamed_behind(llama, prompt, ids, skip=False) == " stood</s> a"


def test_a_long_prompt_costs_as_much_as_a_short_one(llama: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    most, decode = 0, llama.hf.decode

    def counting(token_ids: list[int], **how: bool) -> str:
        nonlocal most
        most = max(most, len(token_ids))
        return decode(token_ids, **how)

    monkeypatch.setattr(llama.hf, "decode", counting)
    for piece in ("a", "<0x9F>", "<s>"):
        decode_behind(llama, ids_of(llama, piece) * 10_000, ids_of(llama, "a"))
    assert most <= 10


# -- tokens by themselves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [kind for kind in KINDS if kind != "bpe-suffix"])
def test_tokens_are_called_what_they_add_to_a_text(name: str) -> None:
    """So that the names of an answer's tokens make its text."""
    tokenizer = make_tokenizer(name)
    for token_id in set(range(len(tokenizer.hf))) - set(ids_of(tokenizer, *SPECIAL)):
        text = tokenizer.token_text(token_id)
        if UNFINISHED not in text:
            assert decode_behind(tokenizer, ids_of(tokenizer, "a"), [token_id], skip_special_tokens=False) == text
            assert tokenizer.token_bytes(token_id) == text.encode()


@pytest.mark.parametrize(
    ("kind", "piece", "text", "own"),
    [
        ("llama2", "▁stood", " stood", b" stood"),
        ("llama2", "stood", "stood", b"stood"),
        ("llama2", "▁", " ", b" "),
        ("llama2", "<0x20>", " ", b" "),
        ("llama2", "<0x0A>", "\n", b"\n"),
        ("llama2", "<0xF0>", UNFINISHED, b"\xf0"),
        ("gemma", "<0x9F>", UNFINISHED, b"\x9f"),
        ("llama2", "</s>", "</s>", b"</s>"),
        ("wordpiece", "stood", " stood", b" stood"),
        ("wordpiece", "##stood", "stood", b"stood"),
        ("wordpiece", "</s>", "</s>", b"</s>"),
        ("bpe-suffix", "stood</w>", " stood", b" stood"),
        ("metaspace-first", "▁stood", " stood", b" stood"),
        ("byte-level", "Ġð", " " + UNFINISHED, b" \xf0"),
        ("byte-level", "ŁĮ", UNFINISHED * 2, b"\x9f\x8c"),
    ],
)
def test_texts_and_bytes_of_tokens(kind: str, piece: str, text: str, own: bytes) -> None:
    tokenizer = make_tokenizer(kind)
    (token_id,) = ids_of(tokenizer, piece)
    assert (tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)) == (text, own)


def test_every_byte_of_a_byte_level_vocabulary(novels: Tokenizer) -> None:
    """Whatever a text is, the bytes of its tokens are its own."""
    text = "naïve café ☕ 日本語 🌊 \x00\x7f\xa0\xad\n" + "".join(map(chr, range(0x20, 0x800)))
    (ids,) = novels.encode([text], add_special_tokens=False)
    assert b"".join(map(novels.token_bytes, ids)) == text.encode()


def test_an_id_that_is_no_token_has_no_text(llama: Tokenizer) -> None:
    assert (llama.token_text(len(llama.hf)), llama.token_bytes(len(llama.hf))) == ("", b"")


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
