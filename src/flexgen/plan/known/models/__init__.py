"""Models that are known without their weights: public configs in their shipped number formats, as ModelSpec JSON.

`benchmarks/catalogue.py` writes the files from the numbers in ../configs.json; nothing here needs torch.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Any

from flexgen.errors import OptionError
from flexgen.plan.model import ModelSpec

_SUFFIX = ".json"
# Hub ids, in lower case, of models whose config has the same numbers as another's -> the catalogue's name of that other model.
_SAME_NUMBERS = {
    "meta-llama/meta-llama-3-8b-instruct": "llama-3-8b",
    "meta-llama/meta-llama-3-70b-instruct": "llama-3-70b",
    "meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b",
    "meta-llama/llama-3.1-70b-instruct": "llama-3.1-70b",
    "meta-llama/llama-3.3-70b-instruct": "llama-3.1-70b",
    "meta-llama/llama-3.1-405b-instruct": "llama-3.1-405b",
    "meta-llama/llama-3.2-1b-instruct": "llama-3.2-1b",
    "meta-llama/llama-3.2-3b-instruct": "llama-3.2-3b",
    "mistralai/mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
    "deepseek-ai/deepseek-r1": "deepseek-v3",
}


def catalogue_names() -> list[str]:
    """Return the names of the shipped models, in alphabetical order."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in resources.files(__name__).iterdir() if file.name.endswith(_SUFFIX))


def catalogue_name(model: str) -> str | None:
    """Return the catalogue's name of a model, found by that name or by a hub id in any letter case; None where there is none."""
    wanted, names = model.lower(), catalogue_names()
    if wanted in names or "/" not in wanted:
        return wanted if wanted in names else None
    return _SAME_NUMBERS.get(wanted) or next((name for name in names if _hub_id(name).lower() == wanted), None)


def _hub_id(name: str) -> str:
    """Return the name that the shipped file states: the model's hub id, if it has one. Only the first line is read."""
    with (resources.files(__name__) / f"{name}{_SUFFIX}").open(encoding="utf-8") as file:
        return str(json.loads(file.readline().rstrip(",\n") + "}")["name"])


def catalogue_spec(name: str) -> ModelSpec:
    """Return a shipped model, computed in the dtype that its weights have (bfloat16 where they are in a low-bit format).

    Raises:
        OptionError: The catalogue has no model of this name; the message lists the known names, similar ones first.
    """
    if name not in catalogue_names():
        raise OptionError(f"{name!r} is not in the catalogue; known: {', '.join(similar_names(name))}")
    return ModelSpec.from_json((resources.files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))


def catalogue_fields(name: str) -> dict[str, Any]:
    """Return the public config of a shipped model.

    The keys are `source` (hub id, or what the numbers were taken from), `dtype` (of the plain weights), `model_type` and `config` (the
    values that differ from the defaults of transformers' config class, or decide a size).
    """
    text = (resources.files("flexgen.plan.known") / "configs.json").read_text(encoding="utf-8")
    return json.loads(text)[name]


def similar_names(name: str) -> list[str]:
    """Return the names of the shipped models, those that resemble `name` first."""
    names = catalogue_names()
    close = difflib.get_close_matches(name.lower(), names, n=3)
    return [*close, *(each for each in names if each not in close)]
