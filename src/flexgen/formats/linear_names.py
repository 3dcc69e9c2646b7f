"""Which tensors of a model are the weights that quantizing tools store in low-bit formats, told by their names and shapes.

Needed only to say what a repository would hold; what a repository holds is found in its headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from flexgen.formats.base import NamedTensor

_IN_LAYER = re.compile(r"(^|\.)\w+\.\d+\.")
_ROUTER = re.compile(r"(^|[._])(gate|router)$|(^|\.)(gate|routers?)\.\w+$")
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)(\.|$)")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio)")
_EXPERTS = (".experts.gate_up_proj", ".experts.up_proj", ".experts.down_proj")


def module_of(tensor: NamedTensor) -> str | None:
    """Return the name of the linear layer or embedding that a tensor is the weight of; None if it is another tensor."""
    module, _, parameter = tensor.name.rpartition(".")
    return module if parameter == "weight" and len(tensor.shape) == 2 else None


def is_embedding(module: str) -> bool:
    """Return whether a module of this name is an embedding."""
    return _EMBEDDING.search(module) is not None


def is_router(module: str) -> bool:
    """Return whether a module of this name chooses experts, or opens a gate by few outputs."""
    return _ROUTER.search(module) is not None


def is_linear_of_layer(module: str) -> bool:
    """Return whether a module of this name is a linear layer within a decoder layer that tools quantize: no router, no other tower."""
    return bool(_IN_LAYER.search(module)) and not (is_router(module) or is_embedding(module) or _TOWER.search(module))


def is_encoded(tensor: NamedTensor) -> bool:
    """Return whether a tensor that `save_pretrained` would write is the weight of such a linear layer, or of several experts."""
    if len(tensor.shape) == 3:
        return tensor.name.endswith(_EXPERTS)
    module = module_of(tensor)
    return module is not None and is_linear_of_layer(module)


def contains_any(module: str, parts: Iterable[object]) -> bool:
    """Return whether the name contains one of these words."""
    return any(isinstance(part, str) and part in module for part in parts)
