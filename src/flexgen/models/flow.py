"""Finds where the decoder layers of a model can be divided: where one tensor of hidden states is all that flows from one to the next.

The forward runs without weights once more, and tensors carry marks (marks.py).  Hidden states that a layer is given derive from this layer
alone, because a stage that begins there gets them.  Whatever else is used behind the layer that it derives from (the embedding, another
layer's keys, a stream kept beside) would be missing in a stage that begins between the two, so that none may.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flexgen.models.layers import DecoderLayers, LayerCall, TokensForm, layer_number
from flexgen.models.marks import BEFORE, Marks, tensors_among
from flexgen.models.tracing import ModelTrace
from flexgen.models.weightless import ParameterReads, WeightlessForward, call_model, run_without_weights
from flexgen.passes.calls import AttentionCall

FLOW_IDS = (7, 5, 7, 5, 7)  # so many that no dimension is as large by chance
# Functions of torch that give the numbers of a tensor to Python.
_READ_NUMBERS = frozenset(
    ("item", "tolist", "numpy", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__")
)


def decoder_layers(model: Any, trace: ModelTrace) -> DecoderLayers:
    """Return the decoder layers of a model, with the places at which they can be divided.

    Args:
        model: A fresh skeleton; it is left unchanged.
        trace: Its trace.

    Raises:
        UnsupportedModelError: The forward needs something that the engine does not offer.
    """
    found = _find(model, trace)
    if found.undivided is not None:
        return found
    watch = _LayerWatch(model, found)

    def run() -> None:
        with _NumberReads(watch), watch.marks:
            call_model(model, torch.tensor([FLOW_IDS]))

    hooks = [hook for layer in range(found.num_layers) for hook in watch.hooks(model.get_submodule(f"{found.prefix}.{layer}"), layer)]
    try:
        run_without_weights(model, watch, _MarkedForward(run, watch))
    finally:
        for hook in hooks:
            hook.remove()
    return watch.result()


def _find(model: Any, trace: ModelTrace) -> DecoderLayers:
    """Return the layers as the trace shows them: the elements of the outermost list within which all attention happens."""
    model_type: str = model.config.model_type
    modules = dict(model.named_modules())
    of_kv: dict[int, int] = {}
    prefixes: set[str] = set()
    for index, running in trace.attention_in.items():
        layer = next((name for name in running if isinstance(modules[name.rpartition(".")[0]], nn.ModuleList)), None)
        if layer is None:
            return DecoderLayers(model_type=model_type, undivided="its attention is not in a list of layers")
        prefix, _, number = layer.rpartition(".")
        prefixes.add(prefix)
        of_kv[index] = int(number)
    if len(prefixes) != 1:
        return DecoderLayers(model_type=model_type, undivided="its layers are not in one list")
    prefix = prefixes.pop()
    return DecoderLayers(model_type=model_type, prefix=prefix, num_layers=len(model.get_submodule(prefix)), of_kv=of_kv)


class _LayerWatch:
    """The watch of the second forward: follows which layer runs, and collects what forbids to divide the model.

    Args:
        model: The skeleton.
        found: The layers as the trace shows them.

    Attributes:
        marks: The marks of tensors.
    """

    def __init__(self, model: nn.Module, found: DecoderLayers) -> None:
        self._found, self._model_type = found, found.model_type
        self.marks = Marks(self._uses)
        self._running: list[str] = []
        self._owners: dict[int, str] = {}  # id of a matrix's placeholder -> its module
        self._matrices: set[str] = set()
        self._calls: dict[int, LayerCall] = {}
        self._before: dict[str, TokensForm] = {}
        self._behind: dict[str, int] = {}  # module with matrices in no layer -> the layer behind which it is used first
        self._hidden: TokensForm | None = None
        self._refused: dict[int, str] = {}
        self._undivided: str | None = None

    # -- the watch ------------------------------------------------------------------------------------------------------------------

    def owns(self, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        if parameter.ndim >= 2:
            self._matrices.add(name)
            self._owners[id(parameter)] = name
        elif self._layer_of(name) is not None:
            self._owners[id(parameter)] = name

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running.append(name)
        if self._layer_of(name) is None or name.removeprefix(f"{self._found.prefix}.").count("."):  # not a layer itself
            self._visit(name)

    def leave(self, name: str, output: Any) -> None:
        self._running.pop()
        if name not in self._before or self.marks.layer != BEFORE or output is None:
            return
        if not isinstance(output, torch.Tensor):
            self._forbid(f"{name} returns more than a tensor")
            return
        form = TokensForm.of(output, len(FLOW_IDS))
        if self._before[name].shape and self._before[name] != form:
            self._forbid(f"{name} is used in several ways before the layers")
        self._before[name] = form
        self.marks.set(output, BEFORE)

    def read(self, tensor: object) -> None:
        owner = self._owners.get(id(tensor))
        if owner is None or owner in self._running:
            return
        self._visit(owner)
        if owner in self._before:
            self._forbid(f"the weights of {owner} are read before the layers")

    def choose(self, name: str, chosen: int, of: int) -> None:
        """Experts are of no concern."""

    # -- layers ---------------------------------------------------------------------------------------------------------------------

    def hooks(self, module: nn.Module, layer: int) -> Iterator[Any]:
        """Install the hooks of a layer, and yield what removes them."""
        yield module.register_forward_pre_hook(functools.partial(self._enter_layer, layer), with_kwargs=True)
        yield module.register_forward_hook(functools.partial(self._leave_layer, layer))

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.marks.inside or layer <= self.marks.layer:
            self._forbid("its layers do not follow each other once")
            return None
        given = [*enumerate(args), *kwargs.items()]
        place = next((place for place, each in given if isinstance(each, torch.Tensor) and self.marks.of(each) is not None), None)
        if place is None:
            self._forbid(f"layer {layer} is given no tensor of hidden states")
            return None
        hidden: torch.Tensor = args[place] if isinstance(place, int) else kwargs[place]
        form = TokensForm.of(hidden, len(FLOW_IDS))
        self._hidden = self._hidden or form
        if form != self._hidden or form.shape.count(None) != 1:
            self._refused[layer] = f"layer {layer} of {self._model_type!r} is given hidden states of another shape"
        self._calls[layer] = LayerCall(argument=place)
        fresh = self.marks.enter(layer, hidden)
        if isinstance(place, int):
            return (*args[:place], fresh, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: fresh}

    def _leave_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.marks.inside = False
        if layer not in self._calls or isinstance(output, torch.Tensor):
            return
        outputs = list(output) if isinstance(output, tuple) else []
        for place, each in enumerate(outputs):
            if isinstance(each, torch.Tensor) and TokensForm.of(each, len(FLOW_IDS)) == self._hidden:
                self._calls[layer] = replace(self._calls[layer], num_outputs=len(outputs), output=place)
                return
        self._forbid(f"layer {layer} returns no tensor of hidden states")

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return attention of zeros that derives from the call's keys and values, too."""
        owner = self._found.of_kv[call.layer]
        used = [owner, *(mark for each in (call.key, call.value) if (mark := self.marks.of(each)) is not None)]
        if min(used) < self.marks.layer:
            what = f"the keys of layer {owner}" if owner < self.marks.layer else _made_by(min(used))
            self._refuse(min(used), f"{self._user()} uses {what}", instead=True)
        out = call.new_output().zero_()
        self.marks.set(out, min(*used, self.marks.layer))
        return out

    # -- what forbids to divide the model -------------------------------------------------------------------------------------------

    def reads_numbers(self, tensor: torch.Tensor) -> None:
        """Take note that Python reads a tensor's numbers: outside of layers, all that follows may depend on them."""
        mark = self.marks.of(tensor)
        if mark is None:
            return
        if self.marks.inside:
            self._uses(mark)
        else:
            reason = f"the way that {self._model_type!r} goes on depends on numbers of {_made_by(mark)}"
            self._refuse(mark, reason, self._found.num_layers)

    def _layer_of(self, name: str) -> int | None:
        return layer_number(self._found.prefix, name)

    def _visit(self, name: str) -> None:
        """Take note that a module is used: matrices and the modules of layers must be where they are needed."""
        if (layer := self._layer_of(name)) is not None:
            if not (self.marks.inside and layer == self.marks.layer):
                self._forbid(f"{name} is used outside of its layer")
        elif name in self._matrices:
            if self.marks.inside:
                self._forbid(f"{name}, which belongs to no layer, is used by layer {self.marks.layer}")
            elif self.marks.layer == BEFORE:
                self._before.setdefault(name, TokensForm(shape=(), dtype=torch.float32))
            else:
                self._behind.setdefault(name, self.marks.layer)

    def _uses(self, mark: int) -> None:
        if mark < self.marks.layer:
            self._refuse(mark, f"{self._user()} uses {_made_by(mark)}")

    def _user(self) -> str:
        where = "" if self.marks.inside else "what follows "
        return f"{where}layer {self.marks.layer} of {self._model_type!r}"

    def _refuse(self, mark: int, reason: str, stop: int | None = None, *, instead: bool = False) -> None:
        """Allow no stage to begin behind `mark`, up to the running layer or before `stop`."""
        for layer in range(mark + 1, self.marks.layer + 1 if stop is None else stop):
            if instead or layer not in self._refused:
                self._refused[layer] = reason

    def _forbid(self, reason: str) -> None:
        self._undivided = self._undivided or reason

    def result(self) -> DecoderLayers:
        """Return what was found."""
        last = max(self._calls, default=BEFORE)
        for name, layer in self._behind.items():
            if layer < last or name in self._before:
                self._forbid(f"{name}, which belongs to no layer, is used between the layers")
        if self._hidden is None or self._undivided is not None:
            return DecoderLayers(model_type=self._model_type, undivided=self._undivided or "no layer was entered")
        for layer in range(last):
            if layer not in self._calls:
                self._refused.setdefault(layer, f"layer {layer} of {self._model_type!r} is not one that text passes through")
        refused = {layer: reason for layer, reason in sorted(self._refused.items()) if 0 < layer <= last}
        found = replace(self._found, num_layers=last + 1, refused=refused)
        return replace(found, calls=self._calls, before=self._before, hidden=self._hidden)


def _made_by(mark: int) -> str:
    return "what is computed before the layers" if mark == BEFORE else f"what layer {mark} computes beside its hidden states"


class _NumberReads(ParameterReads):
    """Reports the numbers that Python reads as well."""

    def __init__(self, watch: _LayerWatch) -> None:
        super().__init__(watch)
        self._layers = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in _READ_NUMBERS:
            for tensor in tensors_among(args):
                self._layers.reads_numbers(tensor)
        return super().__torch_function__(func, types, args, kwargs)


class _MarkedForward(WeightlessForward):
    """Answers the model's requests with zeros that are marked."""

    def __init__(self, run: Any, watch: _LayerWatch) -> None:
        super().__init__(run, FLOW_IDS)
        self._watch = watch

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return self._watch.attend(call)
