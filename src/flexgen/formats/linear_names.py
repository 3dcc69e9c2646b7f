"""Which tensors of a model are the weights that quantizing tools store in low-bit formats, told by their names and shapes.

Needed only to say what a repository would hold; what a repository holds is found in its headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from flexgen.formats.base import NamedTensor

_IN_LAYER = re.compile(r"(^|\.)\w+\.\d+\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|routers?\.\w+)$")
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)(\.|$)")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio)")


def module_of(tensor: NamedTensor) -> str | None:
    """Return the name of the linear layer or embedding that a tensor is the weight of; None if it is another tensor."""
    module, _, parameter = tensor.name.rpartition(".")
    return module if parameter == "weight" and len(tensor.shape) == 2 else None


def is_embedding(module: str) -> bool:
    """Return whether a module of this name is an embedding."""
    return _EMBEDDING.search(module) is not None


def is_linear_of_layer(module: str) -> bool:
    """Return whether a module of this name is a linear layer within a decoder layer that tools quantize: no router, no other tower."""
    return bool(_IN_LAYER.search(module)) and not (_ROUTER.search(module) or is_embedding(module) or _TOWER.search(module))


def contains_any(module: str, parts: Iterable[object]) -> bool:
    """Return whether the name contains one of these words."""
    return any(isinstance(part, str) and part in module for part in parts)
