"""Models that are known without their weights: public configs in their shipped number formats, as ModelSpec JSON.

`python -m flexgen.models.catalogue` writes the files; nothing here needs torch.
"""

from __future__ import annotations

import difflib
from importlib import resources

from flexgen.errors import OptionError
from flexgen.plan.model import ModelSpec

_SUFFIX = ".json"


def catalogue_names() -> list[str]:
    """Names of the shipped models, in alphabetical order."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in resources.files(__name__).iterdir() if file.name.endswith(_SUFFIX))


def catalogue_spec(name: str) -> ModelSpec:
    """A shipped model, computed in the dtype that its weights have (bfloat16 where they are of a low-bit format).

    Raises:
        OptionError: when there is none of this name; the message lists those there are, similar ones first.
    """
    if name not in catalogue_names():
        raise OptionError(f"{name!r} is not in the catalogue; known: {', '.join(similar_names(name))}")
    return ModelSpec.from_json((resources.files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))


def similar_names(name: str) -> list[str]:
    """Names of the shipped models, those that resemble `name` first."""
    names = catalogue_names()
    close = difflib.get_close_matches(name.lower(), names, n=3)
    return [*close, *(each for each in names if each not in close)]
