"""A transformers model on the meta device, and the hooks that suspend its forward where weights are needed.

This module builds the model without weights and binds tensors to it as they arrive.
It knows neither where bytes come from (weights/) nor who runs the coroutines (engine/).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexgen.base.parallel import Parallel
from flexgen.checkpoint.meta import LARGE, LargeTensorsOnMeta, SkeletonLimits, building, parameters_on_meta
from flexgen.errors import EngineError, UnsupportedModelError
from flexgen.kernels.int8.products import Int8Products
from flexgen.models.attention import register_attention
from flexgen.models.coroutine import current_forward
from flexgen.models.experts import register_experts, scored_experts_forward
from flexgen.models.head import Tail, split_linear
from flexgen.models.linear import int8_linear
from flexgen.models.parts import Part
from flexgen.models.rope import check_factors, isolate_sequences, recompute_length
from flexgen.models.scoring import Scorer
from flexgen.models.stage import Stage, StageEnd, install_stage
from flexgen.weights.encoded import EncodedNumbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "flexgen"
EXPERTS = ("experts", "scored_experts")  # the kinds of modules that use the rows of their parts as these arrive


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, limits: SkeletonLimits) -> PreTrainedModel:
    """Return the causal language model of `config` with parameters on the meta device, real buffers, and our attention and experts.

    Raises:
        UnsupportedModelError: transformers has no such causal model, or the model does not accept an attention function.
        CheckpointError: The model is larger than `limits` allow.
    """
    from transformers import AutoModelForCausalLM

    register_attention(IMPLEMENTATION)
    register_experts(IMPLEMENTATION)
    with building(config), parameters_on_meta(limits), LargeTensorsOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    if not model._supports_attention_backend:
        raise UnsupportedModelError(f"model type {config.model_type!r} does not take an attention function of ours")
    for module in model.modules():
        if any(
            buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set for name, buffer in module._buffers.items()
        ):
            raise UnsupportedModelError(
                f"model type {config.model_type!r} computes tables of {LARGE:,} numbers and more, which is not supported"
            )
        if (module_config := getattr(module, "config", None)) is not None:
            module_config._attn_implementation = IMPLEMENTATION
            module_config._experts_implementation = IMPLEMENTATION
    check_factors(model)
    return model.eval()


class BoundModel:
    """A skeleton with its hooks installed, to which units are bound and from which they are unbound.

    Not thread-safe: bind, unbind and the forwards run on one thread.

    Args:
        model: A fresh skeleton.
        units: The parts of each unit.
        gathered: The names of the embeddings whose rows are gathered as they are needed.
        tail: What the model does to the logits after its head, see `split_linear`.
        stage: The pipeline stage whose layers alone are to run; None for all.
    """

    def __init__(
        self, model: PreTrainedModel, units: Iterable[Sequence[Part]], gathered: Sequence[str], tail: Tail | None = None,
        stage: Stage | None = None,
    ) -> None:  # fmt: skip
        isolate_sequences(model, recomputes=recompute_length(model.config) is not None)
        self.model, self._tail, self._stage = model, tail, stage
        self._placeholders: dict[tuple[str, str], nn.Parameter] = {}
        self._parts: dict[tuple[int, str, str], Part] = {}
        self._modules = dict(model.named_modules())
        self._empty = [(name, "weight") for name in gathered]  # parameters without rows
        self._int8 = Int8Products()
        for _, parts in groupby((part for unit in units for part in unit), key=lambda part: part.use.module):
            self._install(list(parts))
        for name in gathered:
            module: Any = self._modules[name]
            module.padding_idx = None  # concerns gradients only, and ids are renumbered
            no_rows = torch.empty(0, module.embedding_dim, dtype=module.weight.dtype)
            module._parameters["weight"] = nn.Parameter(no_rows, requires_grad=False)  # models move ids to its device
            module.register_forward_pre_hook(functools.partial(_gather_rows, name))
        if stage is not None:
            self._empty += install_stage(model, stage)

    def _install(self, parts: Sequence[Part]) -> None:
        """Install the hook of one module, which is entered as its parts arrive."""
        use = parts[0].use
        module: Any = self._modules[use.module]
        is_head = use.head and use.kind == "linear"
        if len(parts) == 1 and use.kind not in EXPERTS and not is_head and not use.in_int8:
            unit = parts[0].unit
            self._modules[use.entered_with].register_forward_pre_hook(lambda *_: current_forward().enter_unit(unit))
            for parameter in use.parameters:
                placeholder = module._parameters[parameter]
                assert placeholder is not None
                self._placeholders[use.module, parameter] = placeholder
            return
        for part in parts:
            for parameter in use.parameters:
                self._parts[part.unit, use.module, parameter] = part
        if use.in_int8:
            module.forward = functools.partial(int8_linear, module, parts, self._int8)
        elif use.kind == "linear":
            module.forward = functools.partial(split_linear, module, parts, self._tail if use.head else None)
        elif use.kind == "experts":
            module.flexgen_parts = parts  # read by experts.py
        elif use.kind == "scored_experts":
            mixture: Any = self._modules[use.module.rpartition(".")[0]]
            mixture.forward = functools.partial(scored_experts_forward, mixture, parts)
        else:
            raise EngineError(f"modules of kind {use.kind!r} cannot be cut")

    def run_loops_on(self, parallel: Parallel) -> None:
        """Run the loops around products in int8 on these threads."""
        self._int8.parallel = parallel

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None:
        """Bind `tensor` as the unit's rows of `module.parameter`."""
        if (part := self._parts.get((unit, module, parameter))) is not None:
            part.tensors[parameter] = tensor
        else:
            self._modules[module]._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)

    def takes_encoded(self, unit: int, module: str, parameter: str, *, columns_first: bool) -> bool:
        """Return whether rows may be bound as they are stored: those of experts whose codes follow each other along the inputs."""
        part = self._parts.get((unit, module, parameter))
        if part is None or part.use.kind not in EXPERTS:
            return False
        experts: Any = self._modules[module]
        return columns_first == (part.use.kind == "scored_experts" or experts.is_transposed)

    def bind_encoded(self, unit: int, module: str, parameter: str, numbers: EncodedNumbers) -> None:
        """Bind `numbers` as the unit's rows of `module.parameter`, which are experts."""
        self._parts[unit, module, parameter].encoded[parameter] = numbers

    def unbind(self, unit: int, module: str, parameter: str) -> None:
        """Unbind the rows, so that a later use fails instead of reading released bytes."""
        if (part := self._parts.get((unit, module, parameter))) is not None:
            bound = part.encoded if parameter in part.encoded else part.tensors
            del bound[parameter]
        else:
            self._modules[module]._parameters[parameter] = self._placeholders[module, parameter]

    def bind_resident(self, module: str, parameter: str, tensor: torch.Tensor) -> None:
        """Bind a small parameter or a persistent buffer permanently."""
        owner = self._modules[module]
        if parameter in owner._buffers:
            owner._buffers[parameter] = tensor
        else:
            owner._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)

    def move_buffers(self, device: torch.device) -> None:
        """Move buffers (rotary frequencies, masks), and the placeholders of embeddings before their first rows, to the computing device."""
        for name, parameter in self._empty:
            weight = self._modules[name]._parameters[parameter]
            assert weight is not None
            self._modules[name]._parameters[parameter] = nn.Parameter(weight.to(device), requires_grad=False)
        for module in self._modules.values():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)

    def hidden_shape(self, num_tokens: int) -> tuple[int, ...]:
        """Return the shape of the hidden states of so many tokens between stages."""
        assert self._stage is not None
        return self._stage.decoder.hidden.shape_of(num_tokens)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The dtype of the hidden states between stages."""
        assert self._stage is not None
        return self._stage.decoder.hidden.dtype

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, cache: Any, scorer: Scorer | None = None
    ) -> torch.Tensor | None:
        """Return the logits, (rows, vocab), of a packed micro-batch; this must be called inside a ForwardCoroutine.

        A stage that is not the last one hands its hidden states to the coroutine, and returns None.

        Args:
            input_ids: The token ids, int64 (1, tokens).
            position_ids: The positions of the tokens in their sequences, int64 (1, tokens).
            rows: The positions within the micro-batch whose logits are computed, int64.
            cache: The cache that takes new keys and values.
            scorer: The scorer of the last of `rows`, whose logits it takes, so that they are not returned.
        """
        forward = current_forward()
        forward.position_ids, forward.scorer = position_ids, scorer
        try:
            output = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=rows)
        except StageEnd:
            return None
        logits = output.logits[0]
        if scorer is not None and len(logits) == len(rows):  # the head could not hand them over part by part
            num_sampled = len(rows) - scorer.num_rows
            logits, scored = logits[:num_sampled], logits[num_sampled:]
            scorer.add(((each, scored[each]) for each in scorer.slices(scored.shape[1], scored.element_size())), 0)
        return logits


def _gather_rows(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Bind only the rows that this micro-batch looks up, and renumber its ids to match."""
    rows, renumbered = current_forward().input_rows(name, args[0])
    module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    return (renumbered, *args[1:])
