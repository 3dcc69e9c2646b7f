"""What a job's identity is made of: whatever changes answers changes it, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import write_model_folder

from flexgen import LLM, SamplingParams
from flexgen.cli.spelling import OF_JOBS
from flexgen.jobs.identity import Identity, changes, identity_of, in_words
from flexgen.jobs.spelling import PYTHON

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model")


def names_changed(before: Identity, after: Identity) -> list[str]:
    return [change.name for change in changes(json.loads(before.to_json())["answers"], after.answers)]


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda folder: edit(folder / "config.json", layer_norm_eps=1e-3), ["config"]),
        (lambda folder: edit(folder / "tokenizer_config.json", padding_side="left"), ["tokenizer"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), ["chat_template"]),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=[1, 2]), ["eos_token_ids"]),
        (lambda folder: os.utime(folder / "model.safetensors", ns=(1, 1)), ["model"]),
        (lambda folder: (folder / "README.md").write_text("words"), []),
    ],
    ids=["config", "tokenizer", "template", "end", "weights", "readme"],
)
def test_files_of_the_model(folder: Path, change: Any, names: list[str]) -> None:
    before = identity_of(LLM(folder).model, DEFAULTS)
    change(folder)
    assert names_changed(before, identity_of(LLM(folder).model, DEFAULTS)) == names


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"seed": 1}, ["seed"]),
        ({"max_model_len": 32}, ["max_model_len"]),
        ({"dtype": "float64"}, ["dtype"]),
        ({"cpu_compute": "int8"}, ["cpu_compute"]),
        ({"sparse_attention": 0.1}, ["sparse_attention"]),
        ({"sparse_attention": 1.0}, []),  # nothing is left out
        ({"dtype": "float32"}, []),  # what "auto" is for this model
        ({"host_mem": "50%", "max_num_seqs": 3, "schedule": "zigzag", "weights": "host=1", "device": "cpu"}, []),
    ],
    ids=str,
)
def test_options(folder: Path, options: dict[str, Any], names: list[str]) -> None:
    before = identity_of(LLM(folder).model, DEFAULTS)
    assert names_changed(before, identity_of(LLM(folder, **options).model, DEFAULTS)) == names


def test_sampling_defaults(folder: Path) -> None:
    llm = LLM(folder)
    other = SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=(3,))
    changed = names_changed(identity_of(llm.model, DEFAULTS), identity_of(llm.model, other))
    assert set(changed) == {"default max_tokens", "default stop_token_ids"}


def test_a_copy_of_the_model_elsewhere_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert names_changed(identity_of(LLM(folder).model, DEFAULTS), identity_of(LLM(tmp_path / "copy").model, DEFAULTS)) == []


@pytest.mark.parametrize("tokenizer", [None, "model"], ids=["its own", "named by itself"])
def test_a_folder_is_the_same_model_under_any_name(
    folder: Path, tmp_path: Path, tokenizer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("model")
    before = identity_of(LLM(folder, tokenizer=tokenizer).model, DEFAULTS)
    for name in ("model", "./model/", "../" + tmp_path.name + "/model", "link"):
        assert names_changed(before, identity_of(LLM(name, tokenizer=tokenizer).model, DEFAULTS)) == []


@pytest.mark.parametrize(("name", "kept"), [
    ("./my model", f"files {'0f' * 16}, weights in int4, groups of 32"),
    ("me/opt", f"me/opt at {'ab' * 20}, config {'0f' * 8}, weights in int4, groups of 32"),
])  # fmt: skip
def test_jobs_of_earlier_versions_go_on_with_converted_weights(name: str, kept: str) -> None:
    """They have the name of the model, as it was given, before what tells its converted weights from others."""
    begun = Identity(answers={"model": f"{name} at {kept}", "seed": 0}, versions={})
    assert Identity.from_json(begun.to_json()).answers == {"model": kept, "seed": 0}
    for model in (kept, "2 files, 3.0 MiB, 0123456789abcdef", f"me/opt at {'ab' * 20}", "random weights"):
        now = Identity(answers={"model": model}, versions={})
        assert Identity.from_json(now.to_json()) == now


def test_there_and_back(folder: Path) -> None:
    identity = identity_of(LLM(folder).model, DEFAULTS)
    again = Identity.from_json(identity.to_json())
    assert not changes(again.answers, identity.answers)
    assert not changes(again.versions, identity.versions)
    assert set(again.versions) >= {"torch", "transformers"}


def test_names_that_one_side_lacks_say_nothing() -> None:
    assert changes({"a": 1, "old": 2}, {"a": 1, "new": 3}) == []
    assert in_words(changes({"a": 1}, {"a": 2}), PYTHON) == "a 1, now it is 2"
    assert in_words(changes({"a": None}, {"a": [True, "é"]}), PYTHON) == 'a null, now it is [true, "é"]'


@pytest.mark.parametrize(("name", "old", "new", "said"), [
    ("weight_format", "int4", "auto", "--weight-format int4, now it is auto"),
    ("sparse_attention", None, 0.1, "--sparse-attention null, now it is 0.1"),
    ("config", "0123456789abcdef", "fedcba9876543210", "another config.json"),
    ("chat_template", None, "fedcba9876543210", "no chat template, now there is one"),
    ("tokenizer", "0123456789abcdef", None, "a tokenizer, now there is none"),
    ("model", "2 files, 3.0 MiB, 0123456789abcdef", "2 files, 3.0 MiB, fedcba9876543210", "other files of weights (2 files, 3.0 MiB)"),
    ("model", "2 files, 3.0 MiB, 0123456789abcdef", "1 files, 3.0 MiB, fedcba9876543210",
     'model "2 files, 3.0 MiB", now it is "1 files, 3.0 MiB"'),
    ("model", f"files {'01' * 16}, weights in int4", f"files {'10' * 16}, weights in int4", "other files of weights (weights in int4)"),
    ("model", f"m at {'ab' * 20}, config {'01' * 8}, weights in int4", f"m at {'ab' * 20}, config {'10' * 8}, weights in int4",
     f"other files of weights (m at {'ab' * 20}, weights in int4)"),
    ("model", f"m at {'ab' * 20}", f"m at {'cd' * 20}", f'model "m at {"ab" * 20}", now it is "m at {"cd" * 20}"'),
])  # fmt: skip
def test_changes_in_words(name: str, old: object, new: object, said: str) -> None:
    """Without digests, which say nothing; the name of a commit does."""
    assert in_words(changes({name: old}, {name: new}), OF_JOBS) == said


def test_options_that_changed_are_written_as_the_caller_writes_them() -> None:
    found = changes(
        {"weight_format": "int4", "sparse_attention": None, "seed": 0}, {"weight_format": "auto", "sparse_attention": 0.1, "seed": 5}
    )
    assert in_words(found, PYTHON) == "weight_format='int4', now it is 'auto'; sparse_attention=None, now it is 0.1; seed=0, now it is 5"
    assert in_words(found, OF_JOBS) == "--weight-format int4, now it is auto; --sparse-attention null, now it is 0.1; --seed 0, now it is 5"
