"""Pipeline stages compute what the whole model computes, to the last bit; a model that cannot be divided somewhere is refused there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from flexgen.checkpoint.meta import LOOSEST_LIMITS
from flexgen.errors import EngineError, UnsupportedModelError
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.models.flow import decoder_layers
from flexgen.models.layers import DecoderLayers
from flexgen.models.skeleton import build_skeleton
from flexgen.models.tracing import trace_model
from flexgen.passes.geometry import by_geometry
from flexgen.plan.policy import Fractions, Policy
from tests.formats.test_encoded_experts import MULTIPLIED, write
from tests.models.parity import UNIT_BYTES, build, policy, save
from tests.models.staged import logits_of, logits_of_stages, stages_of
from tests.models.test_parity import SUPPORTED, VARIANTS, ring_bytes
from tests.models.tiny_configs import tiny_config
from tests.quantize.reading import made

# Words of the reason why no stage may begin at a layer; where it is None, of the reason why the model cannot be divided at all.
SHARED_KEYS: dict[int | None, str] = {
    1: "layer 2 of '.*' uses the keys of layer 0",
    2: "layer 3 of '.*' uses the keys of layer 1",
    3: "layer 3 of '.*' uses the keys of layer 1",
}
REFUSED: dict[str, dict[int | None, str]] = {
    "gemma3n_text": SHARED_KEYS,
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "gemma4_unified": SHARED_KEYS,
    "gemma4": {None: "the weights of model.language_model.embed_tokens are read before the layers"},
    "hrm_text": {None: "its layers are not in one list"},
}
DIVIDED = [name for name in (*SUPPORTED, *VARIANTS) if name not in REFUSED]
STREAMED = Fractions(disk=1.0)  # at one home, so that a unit lies alike in memory: sums of products depend on that in their last bits


def config_of(name: str) -> PreTrainedConfig:
    model_type, changes = VARIANTS.get(name, (name, {}))
    return tiny_config(model_type, **changes)


def found_in(config: PreTrainedConfig) -> DecoderLayers:
    model = build_skeleton(config, torch.float32, LOOSEST_LIMITS)
    return decoder_layers(model, trace_model(model))


class Saved:
    """A model in a folder, whole and in stages."""

    def __init__(self, folder: Path, config: PreTrainedConfig, **how: Any) -> None:
        self._folder, self._config = folder, config
        self._how = {"dtype": torch.float32, "unit_bytes": UNIT_BYTES} | how
        self.whole = self.assembled(None)

    def assembled(self, layers: range | None) -> AssembledModel:
        return assemble_model(self._folder, copy.deepcopy(self._config), layers=layers, **self._how)

    def stages(self, *cuts: int) -> list[AssembledModel]:
        return [self.assembled(layers) for layers in stages_of(self.whole.num_layers, cuts)]

    def policy(self, device: str = "cpu", weights: Fractions = STREAMED, kv: Fractions | None = None) -> Policy:
        return policy(device, weights=weights, kv=kv or Fractions(host=1.0), ring_bytes=ring_bytes(self.whole))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Saved]:
    def make(name: str, **how: Any) -> Saved:
        save(build(config_of(name)), tmp_path)
        return Saved(tmp_path, config_of(name), **how)

    return make


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


# Experts; tied heads; windows and sinks; latents; two KV layers in a layer; positions and projections around the layers; chunks;
# frequencies by length; layers that text does not enter; tuples.
@pytest.mark.matrix(8, always=["llama-tied", "gpt_oss", "deepseek_v3", "longcat_flash", "opt", "llama4_text", "phi3"])
@pytest.mark.parametrize("name", DIVIDED)
def test_stages_compute_what_the_whole_model_computes(name: str, saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks and next tokens, in two stages and in three, with weights that stream."""
    model = saved(name)
    points = model.whole.cut_points
    entered = [0, 2, 3] if name == "mllama" else [*range(model.whole.num_layers)]
    assert list(points) == entered[1:]
    chosen = model.policy()
    wanted = logits_of(model.whole, chosen)
    assert_equal(logits_of_stages(model.stages(points[len(points) // 2]), chosen, monkeypatch), wanted)
    if len(points) > 1:
        assert_equal(logits_of_stages(model.stages(points[0], points[-1]), chosen, monkeypatch), wanted)


def test_every_cut_of_a_model_with_two_kinds_of_layers(saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("gpt_oss")
    wanted = logits_of(model.whole, model.policy())
    for cut in model.whole.cut_points:
        assert_equal(logits_of_stages(model.stages(cut), model.policy(), monkeypatch), wanted)
    assert_equal(logits_of_stages(model.stages(1, 2, 3), model.policy(), monkeypatch), wanted)


@pytest.mark.parametrize("name", ["opt", "gpt_oss", "llama-longrope"])
def test_stages_on_a_device(name: str, saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(name)
    chosen = model.policy("sim", Fractions(host=1.0), Fractions(device=1.0))
    assert_equal(logits_of_stages(model.stages(1, 3), chosen, monkeypatch), logits_of(model.whole, chosen))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_stages_that_compute_in_int8(name: str, saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(name, cpu_compute="int8")
    stages = model.stages(1, 2)
    assert all(stage.spec.int8_flops_per_token > 0 for stage in stages)
    assert_equal(logits_of_stages(stages, model.policy(), monkeypatch), logits_of(model.whole, model.policy()))


@pytest.mark.parametrize("home", ["encoded", "disk"])
def test_stages_with_weights_in_four_bits(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in the format of gpt-oss, and linear layers that flexgen converted."""
    from flexgen.hub.config import read_config
    from flexgen.hub.resolve import resolve_model
    from flexgen.quantize.convert import convert
    from flexgen.quantize.settings import QuantizeSettings

    config = write(MULTIPLIED["gpt_oss in MXFP4"], tmp_path)
    _, files = made(tmp_path / "in", "llama")
    convert(files, tmp_path / "int4", QuantizeSettings(), num_threads=1)
    models = [Saved(tmp_path / "encoded", config), Saved(tmp_path / "int4", read_config(resolve_model(tmp_path / "int4")))]
    for model in models:
        assert model.whole.encodings
        chosen, cut = model.policy(weights=Fractions(**{home: 1.0})), model.whole.cut_points[-1]
        assert_equal(logits_of_stages(model.stages(cut), chosen, monkeypatch), logits_of(model.whole, chosen))


# -- what a stage holds -------------------------------------------------------------------------------------------------------------

Piece = tuple[str, str, tuple[tuple[object, ...], ...]]


def pieces(model: AssembledModel) -> list[Piece]:
    """The tensors of the units, and which stored bytes they are made of."""
    return [
        (tensor.module, tensor.parameter, tuple(map(tuple, tensor.source.ranges))) for layout in model.layouts for tensor in layout.tensors
    ]


@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2", "qwen3_moe", "longcat_flash", "gemma3_text"])
def test_units_are_divided_without_rest(name: str, saved: Callable[..., Saved]) -> None:
    model = saved(name)
    whole, points = model.whole, model.whole.cut_points
    stages = model.stages(points[0], points[-1]) if len(points) > 1 else model.stages(points[0])
    assert [piece for stage in stages for piece in pieces(stage)] == pieces(whole)
    assert [table.module for stage in stages for table in stage.tables] == [table.module for table in whole.tables]
    assert stages[0].tables, "the embedding is in the first stage, tied to the head or not"
    assert [unit.head for stage in stages for unit in stage.spec.units] == [unit.head for unit in whole.spec.units]
    assert any(unit.head for unit in stages[-1].spec.units)
    assert [each.layer for stage in stages for each in stage.layers] == [each.layer for each in whole.layers]
    for stage in stages:
        assert [layout.index for layout in stage.layouts] == [*range(len(stage.layouts))]
        assert (stage.num_layers, stage.cut_points) == (whole.num_layers, points)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "deepseek_v3", "gemma3_text"])
def test_of_what_is_not_its_own_a_stage_holds_vectors_alone(name: str, saved: Callable[..., Saved]) -> None:
    """Tables of positions are in the first stage alone, and together the stages hold what the whole model does."""
    model = saved(name)
    layers = stages_of(model.whole.num_layers, (1, 3))
    held: set[tuple[str, str]] = set()
    for own, stage in zip(layers, map(model.assembled, layers), strict=True):
        assert stage.stage is not None
        for tensor in stage.residents.tensors:
            held.add((tensor.module, tensor.parameter))
            number = stage.stage.decoder.layer_of(tensor.module)
            assert number in own if number is not None else len(tensor.shape) < 2 or stage.stage.is_first or stage.stage.is_last
            if "position" in tensor.module or tensor.module.endswith("wpe"):
                assert stage.stage.is_first
    assert held == {(tensor.module, tensor.parameter) for tensor in model.whole.residents.tensors}


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "longcat_flash", "llama"])
def test_the_plan_counts_what_a_stage_has(name: str, saved: Callable[..., Saved]) -> None:
    model = saved(name)
    whole = model.whole.spec
    for stage in model.stages(1):
        assert stage.stage is not None
        for unit, layout in zip(stage.spec.units, stage.layouts, strict=True):
            assert (unit.name, unit.disk_bytes, unit.decoded_bytes) == (layout.name, layout.stored_bytes, layout.decoded_bytes)
        groups = by_geometry(stage.layers)
        assert [group.window for group in stage.spec.kv_groups] == [geometry.reach for geometry in groups]
        for group, members in zip(stage.spec.kv_groups, groups.values(), strict=True):
            assert group.layers == tuple(stage.stage.decoder.of_kv[each.layer] for each in members)
        assert bool(stage.spec.embedding_row_bytes) == stage.stage.is_first
    assert sum(group.num_layers for group in whole.kv_groups) == len(model.whole.layers)
    layers = {"gpt_oss": [(0, 2), (1, 3)], "gemma3_text": [(0, 2), (1, 3)], "longcat_flash": [(0, 0, 1, 1)], "llama": [(0, 1, 2, 3)]}
    assert [group.layers for group in whole.kv_groups] == layers[name]


def test_a_tied_embedding_is_counted_in_the_stage_that_has_no_head(saved: Callable[..., Saved]) -> None:
    first, last = saved("llama-tied").stages(2)
    table = first.tables[0]
    assert first.spec.embedding_bytes == table.num_rows * table.row_elements * 4
    assert last.spec.embedding_bytes == 0


# -- where a model is not divided ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_need_more_than_hidden_states(name: str, saved: Callable[..., Saved]) -> None:
    model = saved(name)
    assert model.whole.cut_points == ()
    for cut, reason in REFUSED[name].items():
        place = 2 if cut is None else cut
        for layers in (range(place), range(place, 4)):
            with pytest.raises(UnsupportedModelError, match=rf"stages: .*{reason}; .*use one stage"):
                model.assembled(layers)


def test_other_cuts_of_a_model_with_shared_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 4 and 5 use the keys of 2 and 3: nothing forbids to cut before these."""
    config = tiny_config("gemma4_unified_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    save(build(config), tmp_path)
    model = Saved(tmp_path, config)
    assert model.whole.cut_points == (1, 2)
    with pytest.raises(UnsupportedModelError, match="layer 5 of 'gemma4_unified_text' uses the keys of layer 3; cut elsewhere"):
        model.assembled(range(4, 6))
    assert_equal(logits_of_stages(model.stages(1, 2), model.policy(), monkeypatch), logits_of(model.whole, model.policy()))


def test_embeddings_of_each_layer() -> None:
    """Every layer gets numbers of its own that follow from the token ids by weights before the layers."""
    layers = found_in(tiny_config("gemma4_text", num_kv_shared_layers=0))
    assert layers.cut_points == ()
    for cut in (1, 2, 3):
        with pytest.raises(UnsupportedModelError, match=f"layer {cut} of 'gemma4_text' uses what is computed before the layers"):
            layers.check(range(cut, 4))


@pytest.mark.parametrize("layers", [range(3, 9), range(0), range(2, 1), range(0, 4, 2), range(-1, 2)])
def test_layers_that_are_not_there(layers: range, saved: Callable[..., Saved]) -> None:
    with pytest.raises(EngineError, match="stages: layers"):
        saved("llama").assembled(layers)


KEPT: dict[str, Any] = {}
MEMORY = torch.zeros(2, 1, 8, 64)


def kept_and_added(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 2 adds what layer 0 computed, by way of an object that both know."""
    if index == 0:
        KEPT["stream"] = out
    return out + KEPT["stream"] if index == 2 else out


def written_and_read(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 1 writes into memory that was there before, and layer 2 reads it through another view."""
    if index == 1:
        MEMORY[0, :, : out.shape[1]].copy_(out)
    return out + MEMORY[0, :, : out.shape[1]] if index == 2 else out


def indices_reused(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 3 sorts by what layer 2 found, which is no floating-point tensor."""
    if index == 2:
        KEPT["order"] = out.argsort(dim=-1)
    return out.gather(-1, KEPT["order"]) if index == 3 else out


def table_reused(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 0 makes a table of positions alone that all layers use: a stage without layer 0 would not have it."""
    if index == 0:
        KEPT["table"] = torch.arange(out.shape[1])[:, None] / 8
    return out + KEPT["table"]


def layer_borrowed(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 2 computes with the MLP of layer 1."""
    if index == 1:
        KEPT["mlp"] = layer.mlp
    return out + KEPT["mlp"](out) if index == 2 else out


def norm_borrowed(index: int, layer: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Layer 2 multiplies by the vector of a norm of layer 0."""
    if index == 0:
        KEPT["norm"] = layer.input_layernorm
    return out * KEPT["norm"].weight if index == 2 else out


@pytest.mark.parametrize(
    ("does", "points", "reason"),
    [
        (kept_and_added, (3,), "layer 2 of 'llama' uses what layer 0 computes beside its hidden states"),
        (written_and_read, (1, 3), "layer 2 of 'llama' uses what layer 1 computes beside"),
        (indices_reused, (1, 2), "layer 3 of 'llama' uses what layer 2 computes beside"),
        (table_reused, (), "layer 1 of 'llama' uses what layer 0 computes beside"),
        (layer_borrowed, (), r"model.layers.1.mlp\S* is used outside of its layer"),
        (norm_borrowed, (), r"model.layers.0.input_layernorm is used outside of its layer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_flows_beside_the_hidden_states(does: Any, points: tuple[int, ...], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaDecoderLayer.forward

    def forward(layer: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out: Any = original(layer, hidden, *args, **kwargs)
        return does(layer.self_attn.layer_idx, layer, hidden, out)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    layers = found_in(tiny_config("llama"))
    KEPT.clear()
    assert layers.cut_points == points
    refused = next(cut for cut in (1, 2, 3) if cut not in points)
    with pytest.raises(UnsupportedModelError, match=reason):
        layers.check(range(refused))


def embedding_added_at_the_end(model: Any, inputs: dict[str, Any], out: Any) -> None:
    out.last_hidden_state = out.last_hidden_state + model.embed_tokens.kept


def number_decides(model: Any, inputs: dict[str, Any], out: Any) -> None:
    if model.embed_tokens.kept.sum().item() > 1:
        out.last_hidden_state = out.last_hidden_state * 2


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (embedding_added_at_the_end, "what follows layer 3 of 'llama' uses what is computed before the layers"),
        (number_decides, "what follows layer 3 of 'llama' uses what is computed before the layers|depends on numbers of"),
    ],
)
def test_what_follows_the_layers_needs_more(does: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaModel.forward

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        hook = model.embed_tokens.register_forward_hook(lambda module, args, output: setattr(module, "kept", output))
        out: Any = original(model, *args, **kwargs)
        hook.remove()
        does(model, kwargs, out)
        del model.embed_tokens.kept
        return out

    monkeypatch.setattr(LlamaModel, "forward", forward)
    layers = found_in(tiny_config("llama"))
    assert layers.cut_points == ()
    with pytest.raises(UnsupportedModelError, match=reason):
        layers.check(range(2))


def test_a_skeleton_is_left_as_it_was() -> None:
    model = build_skeleton(tiny_config("gemma3_text"), torch.float32, LOOSEST_LIMITS)
    layers = decoder_layers(model, trace_model(model))
    assert layers.cut_points == (1, 2, 3)
    assert (layers.prefix, layers.num_layers) == ("model.layers", 4)
    assert layers.hidden.shape == (1, None, 64)
    assert [*layers.before] == ["model.embed_tokens"]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
