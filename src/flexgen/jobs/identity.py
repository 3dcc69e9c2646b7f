"""What a job must keep from one run to the next, because it changes answers, and what only deserves a warning.

Budgets, placement, schedule, threads and the machine are in neither: they cannot change answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flexgen.base.sizes import format_size
from flexgen.hub.folder import weight_files
from flexgen.hub.hub import TOKENIZER_FILES, ModelFiles
from flexgen.hub.private_folder import tokenizer_files
from flexgen.llm import LLM
from flexgen.request import SamplingParams

_PACKAGES = ("flexgen-engine", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A job's identity; all values are JSON values.

    Attributes:
        answers: what changes answers, by name.
        versions: what may change them in the last digits.
    """

    answers: Mapping[str, Any]
    versions: Mapping[str, Any]

    def to_json(self) -> str:
        """Both, as one object."""
        return json.dumps({"answers": dict(self.answers), "versions": dict(self.versions)})

    @classmethod
    def from_json(cls, text: str) -> Identity:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value that is not what it was."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} {self.old!r}, now it is {self.new!r}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs.  A name that one side lacks says nothing: another version of flexgen wrote it, which is told apart."""
    new = json.loads(json.dumps(dict(new)))
    return [Change(name=name, old=old[name], new=new[name]) for name in new if name in old and old[name] != new[name]]


def identity_of(llm: LLM, defaults: SamplingParams, **settings: object) -> Identity:
    """The identity of a job for this model.

    Args:
        defaults: of lines that do not say how they are sampled.
        **settings: others that change answers; JSON values.

    Raises:
        ModelError: a file of the model cannot be understood.
        StorageError: a file of the model cannot be read.
    """
    files = llm.files
    answers = {
        "model": _weights(files, llm.options.load_format),
        "config": _digest([json.dumps(files.config, sort_keys=True).encode()]),
        "tokenizer": _tokenizer_digest(llm),
        "chat_template": None if llm.chat_template is None else _digest([llm.chat_template.encode()]),
        "eos_token_ids": sorted(llm.eos_token_ids),
        "dtype": _compute_dtype(llm),
        "load_format": llm.options.load_format,
        "max_model_len": llm.max_model_len,
        "seed": llm.options.seed,
    }
    answers |= settings | {f"default {name}": value for name, value in dataclasses.asdict(defaults).items()}
    return Identity(answers=answers, versions={name: _version(name) for name in _PACKAGES})


def _weights(files: ModelFiles, load_format: str) -> str:
    """The commit of a hub model, else what the folder shows of its weights without reading them."""
    if files.commit is not None:
        return f"{files.name} at {files.commit}"
    if load_format == "dummy":
        return "random weights"
    names = sorted(weight_files(files.folder))
    found = [(files.folder / name).stat() for name in names]
    parts = (f"{name} {each.st_size} {each.st_mtime_ns}".encode() for name, each in zip(names, found, strict=True))
    return f"{len(names)} files, {format_size(sum(each.st_size for each in found))}, {_digest(parts)}"


def _tokenizer_digest(llm: LLM) -> str | None:
    """Of all that the tokenizer is loaded from, less templates; None where there is none."""
    if llm.tokenizer is None:
        return None
    folder = Path(llm.tokenizer.hf.name_or_path)
    found = {name: path for name, path in tokenizer_files(folder).items() if name in TOKENIZER_FILES}
    if folder != llm.files.folder and (folder / "config.json").is_file():  # a tokenizer of its own, found by its model's type
        found["config.json"] = folder / "config.json"
    return _digest(part for name, path in sorted(found.items()) for part in (name.encode(), path.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def _compute_dtype(llm: LLM) -> str:
    """What "auto" means for this model on this machine."""
    if llm.options.dtype != "auto":
        return llm.options.dtype
    from flexgen.hub.config import read_config
    from flexgen.profile.limits import find_limits
    from flexgen.session.setup import compute_dtype

    return str(compute_dtype("auto", read_config(llm.files), find_limits(llm.options).device)).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
