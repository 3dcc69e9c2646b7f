"""The identity of a job: settings that change answers, so that all runs must share them, and versions whose change is only a warning.

Budgets, placement, schedule, threads and the machine are not part of it, because they cannot change answers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from flexgen.base.scalars import in_json
from flexgen.jobs.folder import JobPaths
from flexgen.jobs.model import JobModel
from flexgen.jobs.spelling import Spelling
from flexgen.request import SamplingParams

_PACKAGES = ("flexgen-engine", "torch", "transformers", "tokenizers", "llguidance")
# Settings that options state, and those that are kept as digests, which say nothing to people, with what they are digests of.
_OPTIONS = (
    "dtype", "cpu_compute", "weight_format", "kv_format", "sparse_attention", "load_format", "max_model_len", "seed", "input_format",
)  # fmt: skip
_DIGESTS = {"config": "config.json", "tokenizer": "tokenizer", "chat_template": "chat template"}
# What tells weights apart and is no name of a commit, see `session.fingerprint`.
_WEIGHT_DIGEST = re.compile(r"^files [0-9a-f]{32}, |(,|, config) [0-9a-f]{16}(?=,|$)")
# Jobs that were begun by earlier versions have the name of the model before what tells its converted weights from others.
_NAME_BEFORE = re.compile(r"^.+ at (?=(files [0-9a-f]{32}|\S+ at \S+, config [0-9a-f]{16}), weights in )")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A job's identity; all values are JSON values.

    Attributes:
        answers: The settings that change answers, by name.
        versions: The versions of packages, by name; another version may change answers in their last digits.
    """

    answers: Mapping[str, Any]
    versions: Mapping[str, Any]

    def to_json(self) -> str:
        """Return both as the text of one JSON object."""
        return json.dumps({"answers": dict(self.answers), "versions": dict(self.versions)})

    @classmethod
    def from_json(cls, text: str) -> Identity:
        """Return the identity that `to_json` has written, here or in an earlier version."""
        identity = cls(**json.loads(text))
        if not isinstance(model := identity.answers.get("model"), str):
            return identity
        return dataclasses.replace(identity, answers={**identity.answers, "model": _NAME_BEFORE.sub("", model)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value that has changed."""

    name: str
    old: Any
    new: Any

    def told(self, spelling: Spelling) -> str:
        """Return the change in words."""
        if self.name in _DIGESTS:
            return _other(_DIGESTS[self.name], self.old, self.new)
        if self.name in _OPTIONS:
            return f"{spelling.option(self.name, self.old)}, now it is {spelling.value(self.new)}"
        old, new = (_WEIGHT_DIGEST.sub("", each) if self.name == "model" else each for each in (self.old, self.new))
        return f"other files of weights ({old})" if old == new else f"{self.name} {in_json(old)}, now it is {in_json(new)}"


def _other(what: str, old: str | None, new: str | None) -> str:
    """Say that something of which there are only digests is not what it was."""
    if old is None:
        return f"no {what}, now there is one"
    return f"another {what}" if new is not None else f"a {what}, now there is none"


def in_words(found: Sequence[Change], spelling: Spelling) -> str:
    """Return changes in words, one after the other."""
    return "; ".join(change.told(spelling) for change in found)


def differing_from(paths: JobPaths, found: Sequence[Change]) -> str:
    """Return the message about a job that was begun otherwise, and what can be done.

    Args:
        paths: The paths of the job.
        found: What has changed, at least one value.
    """
    spelling = paths.spelling
    return (
        f"{paths.name} was begun with {in_words(found, spelling)}: the earlier {'value goes' if len(found) == 1 else 'values go'} on, "
        f"{spelling.accept_changes} goes on with the new {'one' if len(found) == 1 else 'ones'}, {spelling.anew}"
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the values that differ.

    Names that only one side has are left out, because they come from another version of flexgen, which `Identity.versions` records.
    """
    new = json.loads(json.dumps(dict(new)))
    return [Change(name=name, old=old[name], new=new[name]) for name in new if name in old and old[name] != new[name]]


def identity_of(model: JobModel, defaults: SamplingParams, **settings: object) -> Identity:
    """Return the identity of a job for this model.

    Args:
        model: The model of the job.
        defaults: The sampling parameters of lines that set none.
        **settings: Other settings that change answers, as JSON values.

    Raises:
        FlexGenError: See `ServedModel.fingerprint`.
    """
    defaulted = {f"default {name}": value for name, value in dataclasses.asdict(defaults).items()}
    return Identity(answers=model.fingerprint() | settings | defaulted, versions={name: _version(name) for name in _PACKAGES})


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
