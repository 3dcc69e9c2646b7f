"""What transformers may read of a model's folder: nothing outside of it, nothing under a name that a file chose."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import write_model_folder

from flexgen import LLM, SamplingParams
from flexgen.errors import ModelError
from flexgen.hub.config import read_config
from flexgen.hub.private_folder import config_folder, tokenizer_folder
from flexgen.hub.resolve import resolve_model
from flexgen.jobs.identity import identity_of
from flexgen.text.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model")


@pytest.fixture
def outside(folder: Path, tmp_path: Path) -> Path:
    """Another tokenizer, beside the model's folder, in which "a" has another id."""
    path = tmp_path / "tokenizer.9.0.0.json"
    shutil.copy(folder / "tokenizer.json", path)
    shutil.copy(path, tmp_path / "tokenizer.0.0.1.json")
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for copy in (path, tmp_path / "tokenizer.0.0.1.json"):
        copy.write_text(json.dumps(values))
    return path


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "fields",
    [
        {"fast_tokenizer_files": ["../tokenizer.0.0.1.json"]},
        {"tokenizer_file": "../tokenizer.9.0.0.json"},
        {"vocab_file": "../tokenizer.9.0.0.json", "merges_file": "../tokenizer.9.0.0.json"},
        {"init_inputs": ["../tokenizer.9.0.0.json"]},
        {"name_or_path": "..", "_name_or_path": ".."},
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_names_in_a_tokenizers_config_are_not_followed(
    folder: Path, outside: Path, file: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Tokenizer.load(folder).encode(["abc"])
    edit(folder / file, **fields)
    monkeypatch.chdir(folder)  # for names that are relative to where we are
    assert Tokenizer.load(folder).encode(["abc"]) == before


def test_only_vetted_names_are_there(folder: Path, outside: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "evil.py", "adapter_config.json", "tokenizer.9.0.0.json"):
        (folder / name).write_text("{}")
    with tokenizer_folder(folder) as vetted:
        names = {str(path.relative_to(vetted)) for path in vetted.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    assert not vetted.exists()


def test_templates_are_found(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("default")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    assert Tokenizer.load(folder).chat_template == {"default": "default", "tools": "tools"}


def test_a_config_names_no_other_config(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.0.0.1.json").write_text(json.dumps(config | {"ffn_dim": 99}))
    edit(folder / "config.json", configuration_files=["../config.0.0.1.json"], _name_or_path="..", text_config=None)
    assert read_config(resolve_model(folder)).ffn_dim == config["ffn_dim"]
    with config_folder({"model_type": "opt", "auto_map": {}, "num_labels": 10**9, "inner": {"_name_or_path": "x", "size": 1}}) as vetted:
        assert json.loads((vetted / "config.json").read_text()) == {"model_type": "opt", "inner": {"size": 1}}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.txt", "merges.txt", "special_tokens_map.json"]
)
def test_whatever_a_tokenizer_is_loaded_from_is_in_the_identity(folder: Path, name: str) -> None:
    defaults = SamplingParams()
    before = identity_of(LLM(folder).model, defaults).answers["tokenizer"]
    text = (folder / name).read_text() if (folder / name).exists() else "{}" if name.endswith(".json") else ""
    (folder / name).write_text(text + "\n")
    assert identity_of(LLM(folder).model, defaults).answers["tokenizer"] != before


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": ' + "[" * 10**5, '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": [' + "1," * (1 << 19) + "1]}"],
    ids=lambda text: text[:9],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"])
def test_json_that_is_none(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        Tokenizer.load(folder)


def test_a_link_to_another_disk_is_followed(folder: Path, tmp_path: Path) -> None:
    before = Tokenizer.load(folder).encode(["abc"])
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to("../elsewhere.json")
    assert Tokenizer.load(folder).encode(["abc"]) == before


def test_a_pipe_is_no_tokenizer(folder: Path) -> None:
    os.mkfifo(folder / "merges.txt")
    assert Tokenizer.load(folder).encode(["a"])
