"""flexgen: batch inference for language models that are larger than the memory of the device that runs them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgen.base.structured import StructuredOutputsParams
    from flexgen.errors import (
        CapacityError,
        CheckpointError,
        EngineError,
        FlexGenError,
        JobError,
        ModelError,
        OptionError,
        OutOfMemoryError,
        RequestError,
        StageError,
        StorageError,
        UnsupportedModelError,
    )
    from flexgen.llm import LLM
    from flexgen.options import EngineOptions
    from flexgen.outputs import ClassificationOutput, ClassificationRequestOutput, CompletionOutput, Logprob, RequestOutput
    from flexgen.request import SamplingParams

    __version__: str

__all__ = [
    "LLM", "SamplingParams", "StructuredOutputsParams", "RequestOutput", "CompletionOutput", "Logprob", "ClassificationRequestOutput",
    "ClassificationOutput", "EngineOptions",
    "FlexGenError", "OptionError", "RequestError", "JobError", "ModelError", "UnsupportedModelError", "CheckpointError", "CapacityError",
    "OutOfMemoryError", "StorageError", "StageError", "EngineError",
    "__version__",
]  # fmt: skip

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "request",
    "StructuredOutputsParams": "base.structured",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "ClassificationRequestOutput": "outputs",
    "ClassificationOutput": "outputs",
    "Logprob": "outputs",
    "EngineOptions": "options",
}


def __getattr__(name: str) -> Any:
    """Public names arrive with their first use, so that `import flexgen` loads nothing."""
    if name == "__version__":
        from importlib.metadata import version

        return version("flexgen-engine")
    if name in __all__:
        return getattr(importlib.import_module(f"flexgen.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module 'flexgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
