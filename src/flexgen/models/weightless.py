"""Runs the forward of a skeleton without weights: parameters are zeros without memory, linear layers return zeros, and a watch is told.

What is learned from such a forward is the business of those who watch it (tracing.py, flow.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flexgen.errors import UnsupportedModelError
from flexgen.models.attention import PassCache
from flexgen.models.coroutine import ForwardCoroutine
from flexgen.passes.plan import Slice


class Watch(Protocol):
    """What is told what the modules of a skeleton do."""

    def owns(self, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        """Take note of a parameter's placeholder, before the forward begins."""
        ...

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take note that a module begins."""
        ...

    def leave(self, name: str, output: Any) -> None:
        """Take note that the module that began last ends; `output` is None after an error."""
        ...

    def read(self, tensor: object) -> None:
        """Take note of an argument of an operation, which may be a placeholder."""
        ...

    def choose(self, name: str, chosen: int, of: int) -> None:
        """Take note of how many experts of a module a token chooses."""
        ...


class WeightlessForward(ForwardCoroutine):
    """The coroutine of a forward without weights, over one sequence.

    Args:
        run: The function that runs in it.
        token_ids: The tokens of the sequence.
    """

    def __init__(self, run: Any, token_ids: Sequence[int]) -> None:
        super().__init__(run)
        self._token_ids = tuple(token_ids)
        self.position_ids = torch.arange(len(token_ids))[None]

    def slices(self) -> list[Slice]:
        count = len(self._token_ids)
        return [Slice(sequence=0, token_ids=self._token_ids, start=0, prompt_len=count, total=count)]


class ParameterReads(TorchFunctionMode):
    """Reports every tensor that an operation takes to a watch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading a dtype or a shape does not count as use
            for arg in (*args, *(kwargs or {}).values()):
                for each in arg if isinstance(arg, (list, tuple)) else (arg,):
                    self._watch.read(each)
        return func(*args, **(kwargs or {}))


def call_model(model: Any, ids: torch.Tensor) -> Any:
    """Return what the model answers to the tokens of one sequence, (1, tokens), of whose logits the last are wanted."""
    count = ids.shape[1]
    return model(
        input_ids=ids, position_ids=torch.arange(count)[None], past_key_values=PassCache(), use_cache=True,
        logits_to_keep=torch.tensor([count - 1]),
    )  # fmt: skip


def run_without_weights(model: Any, watch: Watch, coroutine: WeightlessForward) -> None:
    """Run a coroutine that calls the model; the skeleton is left as it was.

    Raises:
        UnsupportedModelError: The forward needs something that the engine does not offer.
    """
    with contextlib.ExitStack() as undo:
        for restore in _fake_modules(model, watch):
            undo.callback(restore)
        try:
            with torch.no_grad():
                coroutine.switch()
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedModelError(f"model type {model.config.model_type!r} cannot be traced: {reason}") from error


def _fake_modules(model: nn.Module, watch: Watch) -> Iterator[Callable[[], Any]]:
    """Make every parameter zeros without memory and every large product free; yield functions that undo this."""
    for name, module in model.named_modules():
        pre_hook = lambda module, args, name=name: watch.enter(name, module, args)  # noqa: E731
        yield module.register_forward_pre_hook(pre_hook, prepend=True).remove
        hook = lambda module, args, output, name=name: watch.leave(name, output)  # noqa: E731
        yield module.register_forward_hook(hook, always_call=True).remove
        saved = dict(module._parameters)
        yield lambda module=module, saved=saved: module._parameters.update(saved)
        for own, parameter in saved.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[own] = placeholder = nn.Parameter(zeros, requires_grad=False)
                watch.owns(name, module, placeholder)
        top_k = getattr(model.get_submodule(name.rpartition(".")[0]), "top_k", 1)
        if (fake := _fake_forward(name, module, top_k, watch)) is not None:
            module.forward = fake  # type: ignore[method-assign]
            yield lambda module=module: module.__dict__.pop("forward")


def _fake_forward(name: str, module: Any, top_k: Any, watch: Watch) -> Any:
    """Return a forward of the right output shape that costs nothing, or None if the real one is cheap."""
    if type(module) is nn.Linear:
        return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)
    if is_experts(module):

        def no_experts(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            watch.choose(name, top_k_index.shape[-1], int(module.num_experts))
            return torch.zeros_like(hidden)

        return no_experts
    if is_scored_experts(module):

        def no_scored_experts(hidden: torch.Tensor) -> torch.Tensor:
            watch.choose(name, top_k, int(module.num_experts))
            return torch.zeros_like(hidden)

        return no_scored_experts
    return None


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers dispatches this module's forward to our experts function."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate"))


def is_scored_experts(module: nn.Module) -> bool:
    """Return whether these are Llama 4's experts, which transformers does not dispatch."""
    return type(module).__name__ == "Llama4TextExperts"
