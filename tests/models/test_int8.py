"""Whole models whose linear layers are computed in int8, against transformers with the same rounding, at every home.

Everything else is computed in float64, the softmax of the reference included, which eager attention takes in float32.  A difference in the
last digits of float32 now and then lands on the other side of the border between two codes, which is a step of one code then.
"""

from __future__ import annotations

import dataclasses
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from flexgen.errors import OptionError, UnsupportedModelError
from flexgen.formats.linear_names import is_linear_of_layer
from flexgen.kernels.int8.products import Int8Products, RoundedRows, check_exact
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.models.skeleton import BoundModel
from flexgen.plan.machine import int8_name
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest
from tests.kernels.test_int8 import plainly_rounded
from tests.models.parity import Answers, answered, build, generated, in_float64, policy, requests_for, save
from tests.models.tiny_configs import tiny_config

# Biases; gates; experts beside linear layers; latents, whose second projection is read by attention; fused projections; and fused gates.
MODELS = ("opt", "llama", "qwen3_moe", "deepseek_v3", "gpt_neox", "phi3")
OVERRIDES: dict[str, dict[str, object]] = {"deepseek_v3": {"first_k_dense_replace": 4}}  # its router computes in float32
NOT_ROUNDED = "kv_b_proj"
NUM_TOKENS = 4
NEAR = 1e-6  # logits below 16 are rounded to float32
SMALL_UNITS, LARGE_UNITS = 6_000, 4 << 20


def placed(weights: dict[str, float], micro_batch_tokens: int = 12, **changed: Any) -> Policy:
    found = policy(weights=Fractions(**weights), kv=Fractions(host=1), ring_bytes=4 << 20, micro_batch_tokens=micro_batch_tokens)
    return dataclasses.replace(found, dtype="float64", **changed)


WHOLE = placed({"host": 1.0}, 4096, prefill_tokens=4096)
POLICIES = {
    "small chunks": placed({"host": 1.0}, 5),
    "disk": placed({"disk": 1.0}),
    "both": placed({"host": 0.5, "disk": 0.5}, 7, compute_threads=2),
    "one at a time": placed({"disk": 1.0}, schedule="row"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its requests, and what transformers answers: exactly, and with the rounding of int8."""

    name: str
    folder: Path
    requests: list[TokenRequest]
    exact: Answers
    rounded: Answers

    def assembled(self, unit_bytes: int = SMALL_UNITS, cpu_compute: str = "int8") -> AssembledModel:
        config = tiny_config(self.name, **OVERRIDES.get(self.name, {}))
        return assemble_model(self.folder, config, torch.float64, unit_bytes=unit_bytes, cpu_compute=cpu_compute)


@pytest.fixture(scope="module", autouse=True)
def exact() -> None:
    """Skip where the engine would refuse the processor."""
    try:
        check_exact()
    except OptionError as error:
        pytest.skip(str(error))


def rounded_linear(weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The arithmetic of a linear layer in int8, with the rounded weight given."""
    codes, x_scales = plainly_rounded(x.reshape(-1, x.shape[-1]))
    out = (codes.long() @ weight.long().t()).float() * (x_scales[:, None] * scales[None])
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def wholly_in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention takes its softmax in float64, too."""
    copied: Any = in_float64(model)
    copied.set_attn_implementation("sdpa")
    return copied


def with_rounding(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64 whose linear layers round as int8 does."""
    copied = wholly_in_float64(model)
    for name, module in copied.named_modules():
        if type(module) is nn.Linear and is_linear_of_layer(name) and not name.endswith(NOT_ROUNDED):
            module.forward = partial(rounded_linear, *plainly_rounded(module.weight.detach()), module.bias)
    return copied


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    model = build(tiny_config(name, **OVERRIDES.get(name, {})))
    save(model, folder)
    requests = [dataclasses.replace(each, max_tokens=NUM_TOKENS) for each in requests_for(model.config.get_text_config().vocab_size)]
    return Case(name, folder, requests, generated(wholly_in_float64(model), requests), generated(with_rounding(model), requests))


def assert_same(got: Answers, wanted: Answers) -> None:
    assert got.tokens == wanted.tokens
    for index, logits in wanted.logits.items():
        torch.testing.assert_close(got.logits[index], logits, rtol=0, atol=NEAR, check_dtype=False)


@pytest.mark.matrix(6, always=["llama-disk", "opt-both"])
@pytest.mark.parametrize("place", POLICIES)
def test_answers_are_those_of_the_same_rounding_at_every_home(case: Case, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(answered(case.assembled(), POLICIES[place], case.requests, monkeypatch), case.rounded)


@pytest.mark.matrix(2)
def test_how_layers_are_cut_does_not_change_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(answered(case.assembled(LARGE_UNITS), WHOLE, case.requests, monkeypatch), case.rounded)


@pytest.mark.parametrize(
    ("unit_bytes", "chosen"),
    [(SMALL_UNITS, WHOLE), (LARGE_UNITS, POLICIES["small chunks"])],
    ids=["weights in parts, one micro-batch", "layers in one piece, many micro-batches"],
)
def test_inputs_are_rounded_once_and_one_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, chosen: Policy) -> None:
    """Four in a layer: that of q, k and v, o, gate and up, and down."""
    config = tiny_config("llama")
    save(build(config), tmp_path)
    model = assemble_model(tmp_path, config, torch.float64, unit_bytes=unit_bytes, cpu_compute="int8")
    counts, codes, rounded, forward = {"forwards": 0, "rounded": 0}, list[Any](), Int8Products.rounded, BoundModel.forward

    def counting(self: Int8Products, x: torch.Tensor) -> RoundedRows:
        counts["rounded"] += 1
        assert not any(each() is not None for each in codes)
        found = rounded(self, x)
        codes.append(weakref.ref(found.codes))
        return found

    def running(self: BoundModel, *inputs: Any) -> torch.Tensor:
        counts["forwards"] += 1
        return forward(self, *inputs)

    monkeypatch.setattr(Int8Products, "rounded", counting)
    monkeypatch.setattr(BoundModel, "forward", running)
    answered(model, chosen, requests_for(config.vocab_size), monkeypatch)
    assert (len(model.layouts) > 8 * config.num_hidden_layers) == (unit_bytes == SMALL_UNITS)
    assert counts["forwards"] > 0
    assert counts["rounded"] == 4 * config.num_hidden_layers * counts["forwards"]


def test_rounding_is_seen_in_every_answer(case: Case) -> None:
    """So that equality with the reference says something; how far outputs may be from exact ones, tests/kernels/test_int8.py says."""
    for index, logits in case.exact.logits.items():
        assert (case.rounded.logits[index][0] - logits[0]).abs().max() > 100 * NEAR  # of the first token, which follows the same prompt


def test_the_plan_knows_what_is_computed_in_int8(case: Case) -> None:
    plain, spec = case.assembled(cpu_compute="auto").spec, case.assembled().spec
    assert plain.int8_flops_per_token == 0
    assert spec.flops_per_token == plain.flops_per_token
    assert 0 < spec.int8_flops_per_token <= spec.flops_per_token
    for unit, before in zip(spec.units, plain.units, strict=True):
        assert unit.disk_bytes == before.disk_bytes
        saved = unit.int8_flops_per_token / 2 * 7  # of 8 bytes of a float64
        assert unit.decoded_bytes == pytest.approx(before.decoded_bytes - saved, abs=4 * 512 + 512)
        assert not (unit.head and unit.int8_flops_per_token)
    assert all(name.endswith(int8_name("")) or name == "float32" for name in spec.decoded_from)
    assert spec.decoded_from[int8_name("float32")] == pytest.approx(spec.int8_flops_per_token / 2, rel=0.3)


def test_routers_and_experts_are_not_rounded(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    save(build(config), tmp_path)
    model = assemble_model(tmp_path, config, torch.float32, cpu_compute="int8")
    rounded = {tensor.module.rpartition(".")[2] for layout in model.layouts for tensor in layout.tensors if tensor.dtype == torch.int8}
    assert rounded == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    save(build(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match="cpu_compute='int8': this model has no linear layer whose rows are stored apart"):
        assemble_model(tmp_path, config, torch.float32, cpu_compute="int8")
