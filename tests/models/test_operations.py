"""How many operations a device would run: counted in a forward that computes nothing, and added for what that leaves out."""

from __future__ import annotations

import pytest
import torch

from flexgen.checkpoint.meta import LOOSEST_LIMITS
from flexgen.models.describe import describe_config
from flexgen.models.operations import EXPERTS_OPERATIONS, GROUP_OPERATIONS, PART_OPERATIONS, OperationCounter, untraced_operations
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.skeleton import build_skeleton
from flexgen.models.tracing import trace_model
from flexgen.plan.machine import LAYER_OPERATIONS
from flexgen.profile import overheads
from tests.models.tiny_configs import tiny_config


def test_views_and_memory_are_no_operations() -> None:
    with OperationCounter() as counter:
        numbers = torch.ones(2, 3)
        numbers.view(6)[2:].unsqueeze(0)
        torch.empty_like(numbers)
        numbers.add_(1)
        torch.nn.functional.linear(numbers, numbers)
        numbers.to(torch.float32)  # which it is already
        numbers.to(torch.float16)
    assert counter.num_operations == 4


def traced_operations(num_layers: int, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16) -> int:
    config = tiny_config(model_type, num_hidden_layers=num_layers)
    return trace_model(build_skeleton(config, dtype, LOOSEST_LIMITS)).num_operations


def test_every_layer_adds_as_many() -> None:
    few, more, most = (traced_operations(number) for number in (1, 2, 3))
    assert most - more == more - few > 20
    wide = traced_operations(3, dtype=torch.float32)
    assert 0 < wide <= most, "nothing is cast"


def test_the_layer_that_is_measured_has_about_so_many() -> None:
    """As many as are counted with this release of transformers; another one may differ by a few."""
    config = overheads._config(64, overheads.NUM_LAYERS)
    spec = describe_config(config, torch.bfloat16, stored=torch.bfloat16, name="measured")
    assert spec.operations / overheads.NUM_LAYERS == pytest.approx(LAYER_OPERATIONS, rel=0.15)


def parts_of(module: str, kind: str, number: int, first: int) -> list[list[Part]]:
    use = ParameterUse(
        module=module, parameters=("weight",), decoded_bytes=number, kind=kind, rows=number, flops_per_token=1.0, head=False,
        entered_with=module,
    )  # fmt: skip
    return [[Part(use=use, unit=first + index, start=index, stop=index + 1)] for index in range(number)]


def test_what_the_trace_leaves_out() -> None:
    """It counts one operation for each layer, as for those that are not cut."""
    assert untraced_operations([*parts_of("a", "linear", 1, 0), *parts_of("b", "whole", 1, 1)]) == 0
    assert untraced_operations(parts_of("a", "linear", 3, 0)) == 3 * PART_OPERATIONS - 1
    units = [*parts_of("a", "experts", 2, 0), *parts_of("b", "experts", 1, 2)]
    assert untraced_operations(units) == 2 * (EXPERTS_OPERATIONS - 1) + 3 * GROUP_OPERATIONS
    together = [[part for unit in parts_of("a", "linear", 1, 0) + parts_of("b", "experts", 1, 0) for part in unit]]
    assert untraced_operations(together) == EXPERTS_OPERATIONS + GROUP_OPERATIONS - 1
