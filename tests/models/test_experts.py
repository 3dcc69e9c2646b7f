"""Experts that arrive in parts: the sums that transformers' loop gives, in each of the three ways, and no waiting for a device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.sim_tensor import timeline
from flexgen.kernels.grouped import Window
from flexgen.models import expert_sums, experts
from flexgen.models.assemble import AssembledModel
from flexgen.models.coroutine import ForwardCoroutine
from flexgen.models.experts import FEW_ROWS, experts_forward, scored_experts_forward
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.weightless import is_experts
from flexgen.plan.policy import Fractions, Policy
from tests.kernels.live_bytes import LiveBytes
from tests.kernels.plain_grouped import PlainGroupedKernels
from tests.models.parity import Answers, answered, assert_equal, build, describe, expected, policy, requests_for, save
from tests.models.tiny_configs import tiny_config

NUM_EXPERTS, HIDDEN, INTERMEDIATE, CHOICES = 7, 24, 20, 3
CUTS = [[], [3], [1, 2, 6]]  # experts that begin another part
OPTIONS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
FAMILIES = {  # and the module that holds routers and experts
    "mixtral": "MixtralSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "gpt_oss": "GptOssMLP",
    "deepseek_v3": "DeepseekV3MoE",
    "llama4_text": "Llama4TextMoe",
}
ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(params=["listed", "every row", pytest.param("grouped", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device for each way: the host, one without kernels, and one with Triton's, interpreted where there is none."""
    if request.param == "listed":
        yield torch.device("cpu")
    elif request.param == "every row":
        backend = SimulatedDevice(1 << 20)
        yield backend.device
        backend.close()
    else:
        yield with_triton(monkeypatch)


def with_triton(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    triton = pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("torch sees no CUDA device, and TRITON_INTERPRET is not set")
    from flexgen.kernels.triton.experts import TritonGroupedKernels

    monkeypatch.setattr(experts, "grouped_kernels", lambda device: TritonGroupedKernels())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Arriving(ForwardCoroutine):
    """A forward to which parts arrive: the rows of one are bound at a time."""

    def __init__(self, run: Callable[[], Any], parts: list[Part], tensors: dict[str, Tensor]) -> None:
        super().__init__(run)
        self.parts, self.tensors = parts, tensors

    def enter_unit(self, unit: int) -> None:
        for part in self.parts:
            part.tensors.clear()
        part = self.parts[unit]
        part.tensors.update({name: tensor[part.start : part.stop] for name, tensor in self.tensors.items()})


def parts_of(tensors: dict[str, Tensor], cuts: list[int], kind: str = "experts") -> list[Part]:
    rows = len(tensors["down_proj"])
    use = ParameterUse(
        module="experts", parameters=tuple(tensors), decoded_bytes=1, kind=kind, rows=rows, flops_per_token=1.0, head=False,
        entered_with="experts",
    )  # fmt: skip
    return [Part(use=use, unit=unit, start=a, stop=b) for unit, (a, b) in enumerate(zip([0, *cuts], [*cuts, rows], strict=True))]


def layer(*, numbers: Callable[..., Tensor] | None = None, **options: bool) -> tuple[Any, dict[str, Tensor]]:
    """A module of experts with these options, and its parameters."""
    generator = torch.Generator().manual_seed(0)
    numbers = numbers or (lambda *shape: torch.randn(shape, generator=generator))
    module: Any = SimpleNamespace(num_experts=NUM_EXPERTS, **dict.fromkeys(OPTIONS, False) | options)
    module.act_fn = torch.relu
    module._apply_gate = lambda gate_up: torch.relu(gate_up[..., ::2]) * gate_up[..., 1::2]
    module.post_expert_norm = lambda out: out / (1 + out.abs().amax(dim=-1, keepdim=True))
    up, width = ("gate_up_proj", 2 * INTERMEDIATE) if module.has_gate else ("up_proj", INTERMEDIATE)
    tensors = {}
    for name, inputs, outputs in ((up, HIDDEN, width), ("down_proj", INTERMEDIATE, HIDDEN)):
        tensors[name] = numbers(NUM_EXPERTS, *((inputs, outputs) if module.is_transposed else (outputs, inputs)))
        if module.has_bias:
            tensors[f"{name}_bias"] = numbers(NUM_EXPERTS, outputs)
    return module, tensors


def found(module: Any, tensors: dict[str, Tensor], cuts: list[int], device: torch.device, *given: Tensor) -> Tensor:
    """What comes out of the experts where they arrive in parts."""
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    module.flexgen_parts = parts_of(tensors, cuts)
    there = [each.to(device) for each in given]
    return Arriving(lambda: experts_forward(module, *there), module.flexgen_parts, tensors).switch().cpu()


def added_in_order(module: Any, tensors: dict[str, Tensor], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The outputs of each row's experts, added one expert after the other as transformers' loop does."""
    total = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, choice in sorted(zip(chosen[row].tolist(), range(chosen.shape[1]), strict=True)):
            if expert >= NUM_EXPERTS:
                continue
            out = x[row : row + 1]
            for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                out = out @ (tensors[name][expert] if module.is_transposed else tensors[name][expert].T)
                out = out + tensors[f"{name}_bias"][expert] if module.has_bias else out
                if name != "down_proj":
                    out = module._apply_gate(out) if module.has_gate else module.act_fn(out)
            out = module.post_expert_norm(out) if module.has_post_expert_norm else out
            total[row] += out[0] * weights[row, choice]
    return total


def routing(rows: int, num_experts: int = NUM_EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the experts that each chose, and their weights."""
    generator = torch.Generator().manual_seed(rows)
    scores = torch.rand(rows, num_experts, generator=generator).topk(CHOICES)
    return torch.randn(rows, HIDDEN, generator=generator), scores.indices, scores.values


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("option", ["plain", *OPTIONS, "all"])
def test_same_sums_as_one_by_one(option: str, cuts: list[int], device: torch.device) -> None:
    module, tensors = layer(**dict.fromkeys(OPTIONS if option == "all" else [option] if option in OPTIONS else [], True))
    given = routing(33)
    wanted = added_in_order(module, {name: each.double() for name, each in tensors.items()}, given[0].double(), given[1], given[2].double())
    got = found(module, tensors, cuts, device, *given)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_outputs_are_added_in_the_order_of_experts(cuts: list[int], device: torch.device) -> None:
    """To the last bit: products are exact, being those of small integers and powers of two, and sums are rounded."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    module, tensors = layer(has_gate=True, numbers=integers)
    x, (_, chosen, _) = integers(40, HIDDEN), routing(40)
    weights = torch.exp2(-torch.randint(0, 24, chosen.shape, generator=generator).float())
    wanted = added_in_order(module, tensors, x, chosen, weights)
    backwards = added_in_order(module, {name: each.flip(0) for name, each in tensors.items()}, x, NUM_EXPERTS - 1 - chosen, weights)
    assert not torch.equal(wanted, backwards), "sums that do not depend on the order"
    assert torch.equal(found(module, tensors, cuts, device, x, chosen, weights), wanted)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_choice_of_no_expert_is_left_out(rows: int, device: torch.device) -> None:
    module, tensors = layer(has_gate=True)
    x, chosen, weights = routing(rows, NUM_EXPERTS + 1)
    chosen[0, 0] = NUM_EXPERTS
    wanted = added_in_order(module, tensors, x, chosen, weights)
    torch.testing.assert_close(found(module, tensors, [3], device, x, chosen, weights), wanted, rtol=1e-4, atol=1e-3)


def test_whole_experts_are_not_split(device: torch.device) -> None:
    """Their module's own parameters are used."""
    module, tensors = layer(has_gate=True, has_bias=True)
    given = routing(9)
    module.named_parameters = lambda recurse: iter({name: each.to(device) for name, each in tensors.items()}.items())
    got = experts_forward(module, *(each.to(device) for each in given)).cpu()
    torch.testing.assert_close(got, added_in_order(module, tensors, *given), rtol=1e-4, atol=1e-3)


def test_windows_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = with_triton(monkeypatch)
    module, tensors = layer(has_gate=True, has_post_expert_norm=True)
    given = routing(33)
    whole = found(module, tensors, [3], device, *given)
    monkeypatch.setattr(expert_sums, "EXPERTS_BYTES", 10 * 4 * expert_sums.pair_numbers(2 * INTERMEDIATE, HIDDEN, normed=True))
    torch.testing.assert_close(found(module, tensors, [3], device, *given), whole)


class NoKernels(PlainGroupedKernels):
    """Makes results without computing them, so that nothing else takes memory."""

    def product(self, x: Tensor, weight: Any, bias: Tensor | None, pairs: Any, window: Window, *, gathers: bool) -> Tensor:
        self.num_decoded += 1
        return x.new_empty(window.num_rows, weight.shape[2])

    def add(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_temporary_tensors_are_bounded(model_type: str, normed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a plan reserves: a window's products, what the module's own gate makes of them, and a norm, if there is one."""
    module: Any = next(each for each in build(tiny_config(model_type)).modules() if is_experts(each)).to(dtype)
    hidden, outputs = module.gate_up_proj.shape[1:] if module.is_transposed else module.gate_up_proj.mT.shape[1:]
    expert = expert_sums.ExpertLayer(
        num_experts=module.num_experts, first="gate_up_proj", is_transposed=module.is_transposed, has_bias=False,
        gate=module._apply_gate, norm=MixtralRMSNorm(hidden).to(dtype) if normed else None,
    )  # fmt: skip
    bound, kernels, rows = 20 * dtype.itemsize * expert_sums.pair_numbers(outputs, hidden, normed=normed), NoKernels(), 60
    monkeypatch.setattr(expert_sums, "EXPERTS_BYTES", bound)
    chosen = torch.rand(rows, module.num_experts).topk(2).indices
    sums = expert_sums.GroupedRows(expert, kernels, torch.zeros(rows, hidden, dtype=dtype), chosen, torch.ones(rows, 2, dtype=dtype))
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    with torch.inference_mode(), LiveBytes() as live:
        sums.add(tensors, 0)
    assert kernels.num_decoded == 2 * 6, "windows of 20 rows"
    assert bound / 3 < live.peak <= bound


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("cuts", [[], [1, 4]], ids=str)
def test_scored_experts(cuts: list[int], choices: int, device: torch.device) -> None:
    """Llama 4's own forward passes every token to every expert."""
    torch.manual_seed(0)
    module: Any = Llama4TextMoe(tiny_config("llama4_text", num_experts_per_tok=choices, num_local_experts=6)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, 20, module.hidden_dim)
    with torch.no_grad():
        wanted = module(hidden)
        moved = module.to(device)
        tensors = {name: parameter.detach() for name, parameter in moved.experts.named_parameters()}
        parts = parts_of(tensors, cuts, "scored_experts")
        got = Arriving(lambda: scored_experts_forward(moved, parts, hidden.to(device)), parts, tensors).switch()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(("rows", "waits"), [(1, 0), (FEW_ROWS, 0), (FEW_ROWS + 1, 1)])
def test_a_device_without_kernels_waits_once_where_rows_are_many(rows: int, waits: int) -> None:
    module, tensors = layer(has_gate=True)
    given = routing(rows)
    backend = SimulatedDevice(1 << 20)
    tensors = {name: each.to(backend.device) for name, each in tensors.items()}
    there = [each.to(backend.device) for each in given]
    module.flexgen_parts = parts_of(tensors, [2, 3])
    before = backend.synchronisations
    got = Arriving(lambda: experts_forward(module, *there), module.flexgen_parts, tensors).switch()
    assert backend.synchronisations - before == waits
    torch.testing.assert_close(got.cpu(), found(module, tensors, [], torch.device("cpu"), *given), rtol=1e-4, atol=1e-3)
    backend.close()


def test_sorting_does_not_wait() -> None:
    backend = SimulatedDevice(1 << 20)
    chosen = routing(50)[1].to(backend.device)
    before = backend.synchronisations
    pairs = expert_sums.sorted_pairs(chosen, NUM_EXPERTS)
    assert backend.synchronisations == before
    assert pairs.order.device == pairs.places.device == pairs.offsets.device == backend.device
    backend.close()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_do_not_wait_for_their_experts(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No synchronisation of a run happens inside of the experts or their routers, and answers are transformers'."""
    reference = build(tiny_config(model_type))
    save(reference, tmp_path)
    waits = Waits(model_type, monkeypatch)
    got = waits.of(lambda model, chosen: answered(model, chosen, requests_for(128), monkeypatch), tmp_path)
    assert_equal(got, expected(reference, requests_for(128)))
    assert waits.layers
    assert not waits.found


def test_waiting_for_experts_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build(tiny_config("mixtral")), tmp_path)
    monkeypatch.setattr(experts, "FEW_ROWS", 0)
    waits = Waits("mixtral", monkeypatch)
    waits.of(lambda model, chosen: answered(model, chosen, requests_for(128), monkeypatch), tmp_path)
    assert waits.found == waits.layers > 0


class Waits:
    """Counts the layers of experts that a run goes through, and the synchronisations inside of them."""

    def __init__(self, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers, self.found, self._model_type = 0, 0, model_type
        self._inside = {f"{FAMILIES[model_type]}.forward", "experts_forward", "scored_experts_forward"}
        make = experts.empty_sums

        def counted(*given: Any) -> Any:
            self.layers += 1
            return make(*given)

        monkeypatch.setattr(experts, "empty_sums", counted)

    def of(self, run: Callable[[AssembledModel, Policy], Answers], folder: Path) -> Answers:
        """What a run on the simulated device gives, with weights at all homes."""
        model = describe(folder, tiny_config(self._model_type))
        largest = max(max(layout.stored_bytes, layout.decoded_bytes) for layout in model.layouts)
        weights = Fractions(device=0.2, host=0.3, disk=0.5)
        timeline.observers.append(self._waited)
        try:
            return run(model, policy("sim", weights=weights, kv=Fractions(device=1.0), ring_bytes=2 * largest))
        finally:
            timeline.observers.remove(self._waited)

    def _waited(self) -> None:
        frame = sys._getframe(1)  # of this coroutine only: others wait inside of theirs
        while frame is not None:
            if frame.f_code.co_qualname in self._inside:
                self.found += 1
                return
            frame = frame.f_back


class Counting(PlainGroupedKernels):
    """Records how many rows the windows of first products have."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Any, window: Any, *, gathers: bool) -> Tensor:
        if gathers:
            self.rows.append(window.num_rows)
        return super().product(x, weight, bias, pairs, window, gathers=gathers)


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_many_rows_are_counted_before_they_are_computed(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then windows have room for no more than there are, and results are the same to the bit."""
    module, tensors = layer(has_gate=True, is_transposed=True)
    given, rows = routing(40), 40
    outputs: list[Tensor] = []
    windows: list[list[int]] = []
    monkeypatch.setattr(expert_sums, "EXPERTS_BYTES", at_once * 4 * expert_sums.pair_numbers(2 * INTERMEDIATE, HIDDEN, normed=False))
    for uncounted in (rows, rows - 1):
        kernels = Counting()
        monkeypatch.setattr(experts, "grouped_kernels", lambda device, kernels=kernels: kernels)
        monkeypatch.setattr(expert_sums, "UNCOUNTED_ROWS", uncounted)
        outputs.append(found(module, tensors, [2, 3], torch.device("cpu"), *given))
        windows.append(kernels.rows)
    assert torch.equal(*outputs)
    assert sum(windows[1]) == rows * CHOICES
    assert sum(windows[0]) > sum(windows[1])
    assert max(map(max, windows)) <= at_once
