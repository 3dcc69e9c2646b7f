"""Compiled norms and rotations give what transformers' own code gives, to the last bit, or leave it in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flexgen.kernels.threads import KernelThreads
from flexgen.models.fused import Fused
from tests.models.test_parity import REFUSED
from tests.models.tiny_configs import CAUSAL_TYPES, tiny_config, vary_constants

# Modules of four layers: two norms each and one at the end, and more where queries and keys are normed.
EXPECTED = {
    "llama": {"norms": 9, "rotations": 4},
    "qwen3": {"norms": 17, "rotations": 4},
    "gemma2": {"norms": 17, "rotations": 4},
    "gpt_neox": {"rotations": 4},  # of a part of each head
    "phi3": {"norms": 9, "rotations": 4},  # queries, keys and values are one product
    "opt": {},
}


def in_pieces(function: Callable[[int, int], None], count: int) -> None:
    for begin in range(0, count, 7):
        function(begin, min(begin + 7, count))


def build(model_type: str, dtype: torch.dtype, **changes: object) -> Any:
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    vary_constants(model)
    return model


def logits(model: Any, tokens: int) -> Tensor:
    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.matrix(8, always=["llama", "gemma2", "gemma4_text", "phi3", "gpt_neox"])
@pytest.mark.parametrize("model_type", [each for each in CAUSAL_TYPES if each not in REFUSED])
def test_every_model_answers_the_same_bits(model_type: str) -> None:
    model = build(model_type, torch.bfloat16)
    wanted = [logits(model, tokens) for tokens in (1, 23)]
    fused = Fused(model, torch.bfloat16, in_pieces)
    found = [logits(model, tokens) for tokens in (1, 23)]
    fused.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("model_type", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_replaced(model_type: str, dtype: torch.dtype) -> None:
    """Norms depend on the order in which torch adds, which another processor may have otherwise; then they stay."""
    model = build(model_type, dtype)
    wanted, found = EXPECTED[model_type], Fused(model, dtype, in_pieces).counts
    assert found["rotations"] == wanted.get("rotations", 0)
    assert found["norms"] in (0, wanted.get("norms", 0))


class LlamaRMSNorm(nn.Module):
    """A norm by its name and by what it owns, whose forward is another one."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self._compute = nn.Parameter(torch.ones(64, dtype=torch.bfloat16)), 1e-6, compute

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x.float(), self.weight.float()).to(x.dtype)


OTHER_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "centered": lambda x, weight: nn.functional.layer_norm(x, (64,), weight, eps=1e-6),
    "largest": lambda x, weight: weight * x / x.abs().amax(-1, keepdim=True),
    "less": lambda x, weight: (weight - 1) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_other_norms_stay(name: str) -> None:
    norm = LlamaRMSNorm(OTHER_NORMS[name])
    assert not Fused(norm, torch.bfloat16, in_pieces).counts
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_on_several_threads(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    wanted = logits(model, 1100)
    with KernelThreads(2) as threads:
        fused = Fused(model, dtype, threads.over)
        assert torch.equal(logits(model, 1100), wanted)
        fused.close()


def test_inputs_that_do_not_lie_row_by_row_are_left_to_the_module() -> None:
    norm = build("llama", torch.bfloat16).model.norm
    x = torch.randn(64, 5, dtype=torch.bfloat16).t()
    with torch.no_grad():
        wanted = norm(x)
        Fused(norm, torch.bfloat16, in_pieces)
        assert torch.equal(norm(x), wanted)
