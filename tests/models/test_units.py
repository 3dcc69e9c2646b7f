"""How models are cut into units: in the order of use, within a size, split where they can be, and never across layers."""

from __future__ import annotations

import math
import re
import resource

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flexgen.checkpoint.meta import LOOSEST_LIMITS
from flexgen.models.cuts import cut_units, streamed_uses
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.skeleton import build_skeleton
from flexgen.models.tracing import ModelTrace, trace_model
from tests.models.tiny_configs import tiny_config

UNIT_BYTES = 12_000


def traced(config: PreTrainedConfig) -> tuple[ModelTrace, list[list[Part]]]:
    model = build_skeleton(config, torch.float32, LOOSEST_LIMITS)
    trace = trace_model(model)
    uses = streamed_uses(model, trace, 4, trace.embeddings, lambda _: True)
    return trace, cut_units(uses, UNIT_BYTES)


def modules_of(unit: list[Part]) -> list[str]:
    return [part.use.module for part in unit]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3", "gpt2", "llama4_text", "dbrx"])
def test_units_cover_every_row_once_and_in_order(model_type: str) -> None:
    trace, units = traced(tiny_config(model_type))
    order = list(dict.fromkeys(name for unit in units for name in modules_of(unit)))
    assert order == [name for name in trace.order if name in order]
    rows: dict[str, int] = {}
    for unit in units:
        size = 0
        for part in unit:
            assert part.start == rows.get(part.use.module, 0)
            rows[part.use.module] = part.stop
            size += part.use.decoded_bytes * (part.stop - part.start) // part.use.rows
        alone = len(unit) == 1 and (unit[0].use.kind == "whole" or unit[0].stop - unit[0].start == 1)
        assert size <= UNIT_BYTES or alone
    assert rows == {part.use.module: part.use.rows for unit in units for part in unit}


def test_large_layers_are_cut_at_favourable_rows() -> None:
    use = ParameterUse(
        module="lm_head", parameters=("weight",), decoded_bytes=8192 * 3072 * 2, kind="linear", rows=8192, flops_per_token=1.0,
        head=True, entered_with="lm_head",
    )  # fmt: skip
    spans = [(part.start, part.stop) for unit in cut_units([use], 16 << 20) for part in unit]
    assert spans == [(0, 2048), (2048, 4096), (4096, 6144), (6144, 8192)]


def test_units_stay_within_a_layer_and_apart_from_the_head() -> None:
    _, units = traced(tiny_config("llama"))
    for unit in units:
        assert len({tuple(re.findall(r"layers\.(\d+)", name)) for name in modules_of(unit)}) == 1
        assert len({part.use.head for part in unit}) == 1
    assert {part.use.module for unit in units for part in unit if part.use.head} == {"lm_head"}
    assert all(part.use.head for part in units[-1])


def test_what_attention_on_latents_reads_is_not_split() -> None:
    _, units = traced(tiny_config("deepseek_v3"))
    kinds = {part.use.module: part.use.kind for unit in units for part in unit}
    assert {kinds[name] for name in kinds if name.endswith("kv_b_proj")} == {"whole"}
    assert {kinds[name] for name in kinds if name.endswith("experts")} == {"experts"}
    assert {kinds[name] for name in kinds if name.endswith("o_proj")} == {"linear"}


@pytest.mark.parametrize(
    ("model_type", "module", "reader"), [("dbrx", "ffn.experts.mlp", "ffn.experts"), ("longcat_flash", "router.classifier", "router")]
)
def test_weights_read_from_outside_come_with_their_reader(model_type: str, module: str, reader: str) -> None:
    _, units = traced(tiny_config(model_type))
    found = {part.use.module: part.use.entered_with for unit in units for part in unit if part.use.module.endswith(module)}
    assert found
    assert all(entered.endswith(reader) and name.startswith(entered) for name, entered in found.items())


def test_layers_that_are_looped_stay_resident() -> None:
    trace, units = traced(tiny_config("hrm_text"))
    assert any("L_module" in name for name in trace.revisited)
    assert {name for unit in units for name in modules_of(unit)} == {"lm_head"}
    assert len(trace.layers) == 8, "each turn has keys of its own"


def test_towers_are_not_used() -> None:
    trace, _ = traced(tiny_config("gemma3"))
    assert not any("vision_tower" in name for name in trace.used)
    assert "model.language_model.embed_tokens" in trace.embeddings


def test_flops_count_what_runs() -> None:
    """Two operations per weight and token; of experts those that are chosen."""
    config = tiny_config("qwen3_moe")
    _, units = traced(config)
    counted = sum(part.use.flops_per_token * (part.stop - part.start) / part.use.rows for unit in units for part in unit)
    skeleton = build_skeleton(config, torch.float32, LOOSEST_LIMITS)
    expected = 0.0
    for name, parameter in skeleton.named_parameters():
        if parameter.ndim >= 2 and "embed_tokens" not in name:
            share = config.num_experts_per_tok / config.num_experts if "experts" in name else 1.0
            expected += 2 * parameter.numel() * share
    assert math.isclose(counted, expected)


def test_windows_and_chunks_of_layers() -> None:
    for model_type, group in (("gemma3_text", (6, None)), ("llama4_text", (None, 8)), ("phimoe", (6, None))):
        trace, _ = traced(tiny_config(model_type))
        assert group in {(layer.geometry.window, layer.geometry.chunk) for layer in trace.layers}


def test_a_skeleton_is_left_as_it_was() -> None:
    model = build_skeleton(tiny_config("llama"), torch.float32, LOOSEST_LIMITS)
    trace_model(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_skeletons_take_no_memory() -> None:
    """A single parameter of this model, half a trillion in all, is larger than the memory of most machines."""
    config = CONFIG_MAPPING["longcat_flash"]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_skeleton(config, torch.bfloat16, LOOSEST_LIMITS)
    assert max(parameter.nbytes for parameter in model.parameters()) > 30 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert not any(buffer.is_meta for name, buffer in model.named_buffers() if "rotary" in name)
