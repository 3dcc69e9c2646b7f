"""HELM's requests, without HELM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from flexgen.evaluation.helm_batches import Keyed
from flexgen.evaluation.helm_requests import cache_key

DEFAULTS: dict[str, Any] = {
    "prompt": "", "messages": None, "multimodal_prompt": None, "response_format": None, "temperature": 1.0, "num_completions": 1,
    "max_tokens": 100, "stop_sequences": [], "echo_prompt": False, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "random": None,
}  # fmt: skip


def request(**fields: Any) -> Any:
    return SimpleNamespace(**{**DEFAULTS, **fields})


def keyed(**fields: Any) -> Keyed:
    made = request(**fields)
    return Keyed(request=made, key=cache_key(made, model="m", revision=None, chat=False, seed=0))
