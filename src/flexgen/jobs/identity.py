"""The identity of a job: settings that change answers, so that all runs must share them, and versions whose change is only a warning.

Budgets, placement, schedule, threads and the machine are not part of it, because they cannot change answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from flexgen.base.scalars import in_json
from flexgen.jobs.model import JobModel
from flexgen.request import SamplingParams

_PACKAGES = ("flexgen-engine", "torch", "transformers", "tokenizers", "llguidance")


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
        """Return the identity that `to_json` has written."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value that has changed."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} {in_json(self.old)}, now it is {in_json(self.new)}"


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
