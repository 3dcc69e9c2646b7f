"""The tokenizer wrapper, and which ids end an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_model_folder
from transformers import AutoTokenizer

from flexgen.errors import ModelError, RequestError
from flexgen.text import Tokenizer, check_text, eos_token_ids

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
