"""The engine answers what eager transformers answers, for every model type that it does not refuse by name.

Same tokens, and logits as near as float32 can be (see parity.py), with weights streamed in small units and prompts ragged,
chunked and late.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexgen.checkpoint.files import Checkpoint
from flexgen.engine.blocks import Block
from flexgen.engine.sequence import LiveSequence
from flexgen.errors import UnsupportedModelError
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.policy import Fractions
from tests.models.parity import Expected, answered, assert_equal, build, describe, expected, policy, requests_for, save
from tests.models.tiny_configs import CAUSAL_TYPES, tiny_config

# Type, and words of the reason that its error must give.
REFUSED = {
    "axk2": "indexer",
    "deepseek_v32": "indexer",
    "deepseek_v4": "compressed keys",
    "doge": "mask of its own",
    "dots3_note": "indexer",
    "dots3_note_text": "indexer",
    "gemma3n": "cannot be built",  # a vision tower of packages that are not required
    "gemma4_assistant": "another model",
    "gemma4_unified_assistant": "another model",
    "glm_moe_dsa": "indexer",
    "granitemoehybrid": "recurrent state",
    "hy_v4": "indexer",
    "lfm2": "convolution state",
    "lfm2_moe": "convolution state",
    "lfm3": "convolution state",
    "minimax": "recurrent state",
    "minimax_m3_vl_text": "indexer",
    "recurrent_gemma": "recurrent state",
    "zaya": "convolution state",
}
# What shows only in the trace needs weights of the right shapes; what cannot be built, any.
SAVED_AS = {"doge": "doge", "gemma3n": "llama"}
SUPPORTED = [model_type for model_type in CAUSAL_TYPES if model_type not in REFUSED]

LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16}),
    "llama-longrope": ("llama", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 64}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma3-dynamic": (
        "gemma3_text",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"full_attention": DYNAMIC_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "granite-without-mamba": ("granitemoehybrid", {"layer_types": ["full_attention"] * 4}),
    "dots3-windowed-latents": ("dots3_note_text", {"layer_types": ["sliding_attention"] * 4}),
    "jetmoe-4": ("jetmoe", {"num_experts_per_tok": 4}),
    "diffllama-4": ("diffllama", {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8}),
}
NOT_CAUSAL = {
    "bert": {"is_decoder": False},
    "gemma3_text": {"use_bidirectional_attention": True},
    "gemma4_unified_text": {"use_bidirectional_attention": "all"},
}

# Each stands for a mechanism: grouped heads, experts, sinks, windows, latents, recomputing, chunks, learned positions,
# shared layers, rearranged heads.
REPRESENTATIVES = (
    "llama", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3", "phi3", "llama4_text", "opt", "gemma3n_text", "diffllama",
)  # fmt: skip
PLACES = {
    "cpu-disk": ("cpu", Fractions(host=0.3, disk=0.7), Fractions(disk=1.0)),
    "sim-device": ("sim", Fractions(device=0.2, host=0.3, disk=0.5), Fractions(device=1.0)),
    "sim-host": ("sim", Fractions(device=0.2, host=0.3, disk=0.5), Fractions(host=1.0)),
    "sim-disk": ("sim", Fractions(host=0.4, disk=0.6), Fractions(disk=1.0)),
    "sim-mixed": ("sim", Fractions(device=0.2, host=0.3, disk=0.5), Fractions(device=0.4, host=0.3, disk=0.3)),
}
STREAMED = Fractions(host=0.3, disk=0.7)
IN_MEMORY = Fractions(host=1.0)


def ring_bytes(model: AssembledModel) -> int:
    """Room for two of the largest unit: rings wrap many times a pass."""
    return 2 * max(max(layout.stored_bytes, layout.decoded_bytes) for layout in model.layouts)


# Beside those of REPRESENTATIVES, which are in every run below.
@pytest.mark.matrix(12, always=["llama", "gpt2", "llama-dynamic", "llama-longrope"])
@pytest.mark.parametrize("name", [*SUPPORTED, *VARIANTS])
def test_same_answers_as_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type, **changes)
    reference = build(config)
    save(reference, tmp_path)
    model = describe(tmp_path, config)
    check_spec(model, tmp_path)
    requests = requests_for(model.spec.vocab_size)
    chosen = policy(weights=STREAMED, kv=IN_MEMORY, ring_bytes=ring_bytes(model))
    assert_equal(answered(model, chosen, requests, monkeypatch), expected(reference, requests))


@pytest.mark.slow
def test_every_type_that_declares_an_attention_backend_is_tested() -> None:
    """What is read in the files is what the classes have."""
    classes = {model_type: getattr(transformers, name) for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    assert set(CAUSAL_TYPES) == {each for each, it in classes.items() if getattr(it, "_supports_attention_backend", False)}


def check_spec(model: AssembledModel, folder: Path) -> None:
    """Every stored byte is in exactly one place: a unit, the residents, an embedding, or not needed for text."""
    spec = model.spec
    tensors = [tensor for layout in (*model.layouts, model.residents) for tensor in layout.tensors]
    placed = sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors)
    assert placed + spec.embedding_bytes + model.unused_bytes == Checkpoint(folder).total_bytes == model.total_bytes
    padding = spec.decoded_bytes + spec.resident_bytes - placed
    assert 0 <= padding <= 256 * (len(tensors) + len(model.layouts) + 1)
    assert spec.kv_bytes_per_token == sum(layer.geometry.elements_per_token for layer in model.layers) * 4
    assert len(spec.units) == len(model.layouts) > 1


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type: str, tmp_path: Path) -> None:
    """Before anything is read: the folder is empty."""
    if model_type in SAVED_AS:
        save(build(tiny_config(SAVED_AS[model_type])), tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"'{model_type}'.*{REFUSED[model_type]}"):
        assemble_model(tmp_path, tiny_config(model_type), torch.float32)


@pytest.mark.parametrize("model_type", NOT_CAUSAL)
def test_attention_that_is_not_causal_is_refused(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, **NOT_CAUSAL[model_type])
    save(build(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*not causal"):
        assemble_model(tmp_path, config, torch.float32)


@pytest.fixture(scope="module")
def representative(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Expected]]:
    """A saved model of a type, and what transformers answers with it."""

    @functools.cache
    def made(model_type: str) -> tuple[Path, Expected]:
        folder = tmp_path_factory.mktemp(model_type)
        reference = build(tiny_config(model_type))
        save(reference, folder)
        return folder, expected(reference, requests_for(128))

    return made


# Each mechanism once, on a different place in turn.
@pytest.mark.matrix(5, always=[f"{model}-{place}" for model, place in zip(REPRESENTATIVES, [*PLACES, *PLACES], strict=True)], by="place")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_places_do_not_change_answers(
    model_type: str, place: str, representative: Callable[[str], tuple[Path, Expected]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = representative(model_type)
    device, weights, kv = PLACES[place]
    model = describe(folder, tiny_config(model_type))
    chosen = policy(device, weights=weights, kv=kv, ring_bytes=ring_bytes(model))
    assert_equal(answered(model, chosen, requests_for(128), monkeypatch, tmp_path), wanted)


@pytest.mark.matrix(3, always=["gpt_oss", "deepseek_v3", "gemma3n_text"])
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_attention_on_the_device_to_kv_on_the_host_does_not_change_answers(
    model_type: str, representative: Callable[[str], tuple[Path, Expected]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = representative(model_type)
    model = describe(folder, tiny_config(model_type))
    _, weights, kv = PLACES["sim-host"]
    chosen = policy("sim", weights=weights, kv=kv, ring_bytes=ring_bytes(model), micro_batch_tokens=3)
    chosen = dataclasses.replace(chosen, host_attention=False, kv_ring_bytes=1 << 17)
    assert_equal(answered(model, chosen, requests_for(128), monkeypatch, tmp_path), wanted)


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "phi3", "gemma3_text", "deepseek_v3"])
def test_recomputing_does_not_change_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted sequence gets the frequencies again that its tokens had when they were computed first."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type, **changes)
    reference = build(config)
    save(reference, tmp_path)
    model = describe(tmp_path, config)
    requests = requests_for(128)
    outgrew = Block._outgrew

    def outgrew_or_unlucky(block: Block, sequence: LiveSequence) -> bool:
        return outgrew(block, sequence) or (sequence.num_generated == 9 and sequence.num_preemptions < 2)

    monkeypatch.setattr(Block, "_outgrew", outgrew_or_unlucky)
    chosen = policy(weights=STREAMED, kv=IN_MEMORY, ring_bytes=ring_bytes(model))
    got = answered(model, chosen, requests, monkeypatch)
    assert_equal(got, expected(reference, requests))


def test_text_of_a_multimodal_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold a vision tower and other names than the text model's; neither is a concern of the text."""
    config = tiny_config("mllama")
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32)
    save(whole, tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path, config=copy.deepcopy(config), attn_implementation="eager")
    reference.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    model = describe(tmp_path, config)
    assert sum(layout.stored_bytes for layout in model.layouts) + model.residents.stored_bytes < model.total_bytes / 4
    requests = requests_for(128)
    chosen = policy(weights=STREAMED, kv=IN_MEMORY, ring_bytes=ring_bytes(model))
    assert_equal(answered(model, chosen, requests, monkeypatch), expected(reference.eval(), requests))


def test_latents_are_what_is_cached(tmp_path: Path) -> None:
    """DeepSeek-V3 caches a latent and a rotary key per token, not keys and values of all heads."""
    config = tiny_config("deepseek_v3")
    save(build(config), tmp_path)
    spec = describe(tmp_path, config).spec
    assert spec.kv_bytes_per_token == 4 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers


def test_layers_that_share_keys_cache_them_once(tmp_path: Path) -> None:
    config = tiny_config("gemma3n_text")
    save(build(config), tmp_path)
    model = describe(tmp_path, config)
    assert [layer.layer for layer in model.layers] == [0, 1]
    assert len(model.tables) == 2, "both embeddings of input ids are gathered by rows"
