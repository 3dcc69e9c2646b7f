"""What a job must keep from one run to the next, because it changes answers, and what only deserves a warning.

Budgets, placement, schedule, threads and the machine are in neither: they cannot change answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from flexgen.jobs.model import JobModel
from flexgen.request import SamplingParams

_PACKAGES = ("flexgen-engine", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A job's identity; all values are JSON values.

    Attributes:
        answers: What changes answers, by name.
        versions: What may change them in the last digits.
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
    """What differs.  A name that one side lacks says nothing, because another version of flexgen wrote it; see `Identity.versions`."""
    new = json.loads(json.dumps(dict(new)))
    return [Change(name=name, old=old[name], new=new[name]) for name in new if name in old and old[name] != new[name]]


def identity_of(model: JobModel, defaults: SamplingParams, **settings: object) -> Identity:
    """The identity of a job for this model.

    Args:
        model: The model of the job.
        defaults: The sampling parameters of lines that set none.
        **settings: Others that change answers; JSON values.

    Raises:
        FlexGenError: As `LLM.fingerprint`.
    """
    defaulted = {f"default {name}": value for name, value in dataclasses.asdict(defaults).items()}
    return Identity(answers=model.fingerprint() | settings | defaulted, versions={name: _version(name) for name in _PACKAGES})


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
