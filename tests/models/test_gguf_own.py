"""Models in GGUF that transformers' loader does not know, in files as llama.cpp's converter lays them out, written by the package gguf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.checkpoint.gguf import GGUFHeaders
from flexgen.checkpoint.parameters import parameter_sources
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.hub.config import read_config
from flexgen.hub.gguf_model import read_gguf
from flexgen.hub.resolve import resolve_model
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.policy import Fractions
from tests.models import parity
from tests.models.tiny_configs import tiny_config

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Kind  # noqa: E402

VOCAB = 128
PERMUTED = ("granite", "smollm3")  # queries and keys, as in files of llama
ON_DISK, IN_MEMORY = Fractions(disk=1.0), Fractions(host=1.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is made of metadata is kept."""
    monkeypatch.setattr("flexgen.hub.gguf_folder.cache_home", lambda: tmp_path / "kept")


class File:
    """A file that is written tensor by tensor; the model gets the numbers that are stored."""

    def __init__(self, path: Path, architecture: str, config: Any) -> None:
        self.path, self.writer = path, gguf.GGUFWriter(path, architecture)
        writer = self.writer
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        if (head_dim := getattr(config, "head_dim", None)) is not None:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim or config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(VOCAB)
        if (experts := getattr(config, "num_local_experts", None)) is not None:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config.num_experts_per_tok)

    def tensor(self, name: str, numbers: torch.Tensor, kind: Kind = Kind.F32) -> torch.Tensor:
        """Store a tensor as it is given, and return the numbers that are read."""
        data = gguf.quants.quantize(np.ascontiguousarray(numbers.numpy()), kind)
        self.writer.add_tensor(name, data, raw_dtype=kind)
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, kind)).reshape(numbers.shape))

    def close(self) -> None:
        if "tokenizer.ggml.model" not in self.writer.kv_data[0]:
            self.writer.add_tokenizer_model("no_vocab")
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def gpt_oss(path: Path, config: Any, *, scaled: bool = True, leave_out: str = "") -> Any:
    """A random gpt-oss as conversion/gpt_oss.py stores it, with experts in MXFP4, and the model of the stored numbers."""
    model, file = parity.build(config), File(path, "gpt-oss", config)
    file.writer.add_sliding_window(config.sliding_window)
    file.writer.add_expert_feed_forward_length(config.intermediate_size)
    if scaled:
        file.writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        file.writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        file.writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    state = dict(model.state_dict())
    for name, numbers in list(state.items()):
        if "experts" in name:
            continue
        bare, _, field = name.rpartition(".")
        stored = f"{names.get_name(name)}.weight" if name.endswith("sinks") else f"{names.get_name(bare)}.{field}"
        if stored != leave_out:
            state[name] = file.tensor(stored, numbers, Kind.Q8_0 if numbers.ndim == 2 and "mlp.router" not in name else Kind.F32)
    for layer in range(config.num_hidden_layers):
        experts, block = f"model.layers.{layer}.mlp.experts", f"blk.{layer}.ffn"

        def put(projection: str, weight: torch.Tensor, bias: torch.Tensor, block: str = block) -> tuple[torch.Tensor, torch.Tensor]:
            rows = file.tensor(f"{block}_{projection}_exps.weight", weight.transpose(1, 2), Kind.MXFP4)  # outputs are rows
            return rows.transpose(1, 2), file.tensor(f"{block}_{projection}_exps.bias", bias)

        weight, bias = state[f"{experts}.gate_up_proj"], state[f"{experts}.gate_up_proj_bias"]
        gate, up = put("gate", weight[..., ::2], bias[..., ::2]), put("up", weight[..., 1::2], bias[..., 1::2])
        both = [torch.stack(pair, dim=-1).flatten(-2) for pair in zip(gate, up, strict=True)]
        state[f"{experts}.gate_up_proj"], state[f"{experts}.gate_up_proj_bias"] = both
        down = put("down", state[f"{experts}.down_proj"], state[f"{experts}.down_proj_bias"])
        state[f"{experts}.down_proj"], state[f"{experts}.down_proj_bias"] = down
    file.close()
    model.load_state_dict(state)
    return model


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of queries or keys as files of llama have them: the halves of a head alternate."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def mixtral(path: Path, config: Any) -> Any:
    """A random Mixtral as conversion/llama.py stores it, and the model of the stored numbers."""
    model, file = parity.build(config), File(path, "llama", config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = dict(model.state_dict())
    for name, numbers in list(state.items()):
        bare, _, field = name.rpartition(".")
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}.ffn"
            halves = zip(("gate", "up"), numbers.chunk(2, dim=1), (Kind.Q4_0, Kind.Q8_0), strict=True)
            state[name] = torch.cat([file.tensor(f"{block}_{each}_exps.weight", half, kind) for each, half, kind in halves], dim=1)
        elif name.endswith("experts.down_proj"):
            state[name] = file.tensor(f"{names.get_name(name)}.weight", numbers, Kind.Q5_1)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            state[name] = unpermuted(file.tensor(f"{names.get_name(bare)}.weight", permuted(numbers, heads), Kind.Q8_0), heads)
        else:
            state[name] = file.tensor(f"{names.get_name(bare)}.{field}", numbers, Kind.F16 if numbers.ndim == 2 else Kind.F32)
    file.close()
    model.load_state_dict(state)
    return model


def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def dense(path: Path, config: Any) -> Any:
    """A random model whose config is flexgen's own, and the model of the stored numbers."""
    model_type = config.model_type
    model, file = parity.build(config), File(path, model_type, config)
    if model_type == "granite":
        file.writer.add_attention_scale(config.attention_multiplier)
        file.writer.add_embedding_scale(config.embedding_multiplier)
        file.writer.add_residual_scale(config.residual_multiplier)
        file.writer.add_logit_scale(config.logits_scaling)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, model_type.upper()), config.num_hidden_layers)
    state = dict(model.state_dict())
    for name, numbers in list(state.items()):
        bare, _, part = name.rpartition(".")
        kind = Kind.Q8_0 if numbers.ndim == 2 else Kind.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(bare.rpartition(".")[2])
        if heads is None or part == "bias" or model_type not in PERMUTED:
            state[name] = file.tensor(f"{names.get_name(bare)}.{part}", numbers, kind)
        else:
            state[name] = unpermuted(file.tensor(f"{names.get_name(bare)}.{part}", permuted(numbers, heads), kind), heads)
    file.close()
    model.load_state_dict(state)
    return model


def config_for(model_type: str) -> Any:
    """Rows of whole blocks; windows of a few tokens."""
    config = tiny_config(model_type)
    config.update({"intermediate_size": 96, "hidden_size": 64, "vocab_size": VOCAB})
    if model_type in ("mixtral", "smollm3"):
        config.update({"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * config.num_hidden_layers})
    return config


WRITERS: Mapping[str, Any] = {
    "gpt_oss": gpt_oss, "mixtral": mixtral, "granite": dense, "olmo2": dense, "seed_oss": dense, "smollm3": dense,
}  # fmt: skip


@pytest.mark.parametrize("model_type", WRITERS)
def test_every_parameter_is_the_stored_one(model_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    wanted = WRITERS[model_type](path, config_for(model_type)).state_dict()
    config = read_config(resolve_model(path))
    assert config.model_type == model_type
    found = parameter_sources(parity.build(config), GGUFHeaders(read_gguf(path)).decoded(None, torch.float32))
    assert not found.unexpected
    assert set(found.names()) == set(wanted)
    for name in found.names():
        out = torch.full(found[name].shape, torch.nan)
        found[name].read(out)
        assert torch.equal(out, wanted[name]), name
        if "experts" in name:
            part = torch.full((3, *out.shape[1:]), torch.nan)
            found[name].rows(2, 5).read(part)
            assert torch.equal(part, wanted[name][2:5]), name


def test_the_config_is_that_of_the_model(tmp_path: Path) -> None:
    """What a class assumes and a file states otherwise is what the file states."""
    stated = config_for("gpt_oss")
    stated.rope_parameters = {**type(stated)().rope_parameters, "factor": 16.0, "original_max_position_embeddings": 32}
    gpt_oss(tmp_path / "model.gguf", stated)
    found, wanted = read_config(resolve_model(tmp_path / "model.gguf")).to_dict(), stated.to_dict()
    for key in (
        "num_local_experts",
        "num_experts_per_tok",
        "head_dim",
        "sliding_window",
        "layer_types",
        "intermediate_size",
        "swiglu_limit",
    ):
        assert found[key] == wanted[key], key
    assert found["rope_parameters"].items() >= {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32}.items()
    assert found["rope_parameters"]["truncate"] is False
    gpt_oss(tmp_path / "plain.gguf", stated, scaled=False)
    assert read_config(resolve_model(tmp_path / "plain.gguf")).rope_parameters["rope_type"] == "default"


def assembled(path: Path) -> AssembledModel:
    files = resolve_model(path)
    assert files.gguf is not None
    return assemble_model(files.folder, read_config(files), torch.float32, unit_bytes=parity.UNIT_BYTES, headers=GGUFHeaders(files.gguf))


@pytest.mark.parametrize("model_type", WRITERS)
def test_answers_are_those_of_transformers(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = tmp_path / "model.gguf", config_for(model_type)
    if model_type == "gpt_oss":
        config.rope_parameters = type(config)().rope_parameters | {"original_max_position_embeddings": 16}
    wanted = parity.expected(WRITERS[model_type](path, config), parity.requests_for(VOCAB))
    places = [("cpu", ON_DISK), ("cpu", IN_MEMORY), ("sim", ON_DISK)]
    for device, homes in places if model_type in ("gpt_oss", "mixtral") else places[:1]:
        model = assembled(path)
        largest = max(max(layout.stored_bytes, layout.carried_bytes) for layout in model.layouts)
        kv = Fractions(host=1.0) if device == "cpu" else Fractions(device=1.0)
        chosen = parity.policy(device, weights=homes, kv=kv, ring_bytes=4 * largest + 8192)
        parity.assert_equal(parity.answered(model, chosen, parity.requests_for(VOCAB), monkeypatch, tmp_path), wanted)


def test_gates_and_up_projections_alternate(tmp_path: Path) -> None:
    """Each half fills every other column, expert by expert, so no column can be cut off."""
    path, config = tmp_path / "model.gguf", config_for("gpt_oss")
    gpt_oss(path, config)
    found = parameter_sources(parity.build(config), GGUFHeaders(read_gguf(path)).decoded(None, torch.float32))
    gate, up = found["model.layers.0.mlp.experts.gate_up_proj"].pieces
    assert [piece.target[-1].indices(2 * config.intermediate_size) for piece in (gate, up)] == [(0, 191, 2), (1, 192, 2)]
    with pytest.raises(ValueError, match="alternates with another tensor"):
        gate.narrow(2, 0, 5)


def test_sinks_are_missing(tmp_path: Path) -> None:
    path, config = tmp_path / "model.gguf", config_for("gpt_oss")
    gpt_oss(path, config, leave_out="blk.0.attn_sinks.weight")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.sinks"):
        parameter_sources(parity.build(config), GGUFHeaders(read_gguf(path)).decoded(None, torch.float32))


@pytest.mark.parametrize(("rule", "known"), [("smaug-bpe", True), ("seed-coder", False)])
def test_the_tokenizer_of_an_architecture_with_a_config_of_its_own(
    rule: str, known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers, which does not know the architecture, sees that of a llama; a rule that it does not know is told."""
    from tokenizers import pre_tokenizers

    from flexgen.text.tokenizer import Tokenizer

    config = config_for("smollm3")
    file = File(tmp_path / "model.gguf", "smollm3", config)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 3]
    file.writer.add_tokenizer_model("gpt2")
    file.writer.add_tokenizer_pre(rule)
    file.writer.add_token_list([*letters, "he", "<s>", "</s>"])
    file.writer.add_token_types([1] * (VOCAB - 2) + [3] * 2)
    file.writer.add_token_merges(["h e"])
    file.writer.add_bos_token_id(VOCAB - 2)
    file.writer.add_eos_token_id(VOCAB - 1)
    file.tensor("token_embd.weight", torch.zeros(VOCAB, 64))
    file.close()
    files = resolve_model(tmp_path / "model.gguf")
    assert files.has_tokenizer
    assert ("splits text by the rule 'seed-coder'" in caplog.text) != known
    assert (files.config["model_type"], files.config["eos_token_id"]) == ("smollm3", VOCAB - 1)
    assert Tokenizer.load(files.folder).encode(["heh"], add_special_tokens=False) == [[VOCAB - 3, letters.index("h")]]


def test_metadata_that_lacks_a_size(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "smollm3")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"its metadata lacks smollm3\.context_length"):
        resolve_model(path)


def test_experts_in_the_layout_of_2023_are_refused(tmp_path: Path) -> None:
    """One tensor for each expert, as the first files of Mixtral have them."""
    config = config_for("mixtral")
    file = File(tmp_path / "model.gguf", "llama", config)
    file.tensor("blk.0.ffn_gate.0.weight", torch.zeros(96, 64))
    file.tensor("token_embd.weight", torch.zeros(VOCAB, 64))
    file.close()
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"blk\.0\.ffn_gate\.0\.weight"):
        parameter_sources(parity.build(config), GGUFHeaders(read_gguf(tmp_path / "model.gguf")).decoded(None, torch.float32))


def test_blocks_of_a_checkpoint_are_those_of_gguf_repacked() -> None:
    """gpt-oss's own blocks hold neighbours in a byte, GGUF's the two halves of 32 numbers: the numbers are the same."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from flexgen.formats.gguf import blocks_of

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, (2, 6, 3), dtype=torch.uint8, generator=generator)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # (experts, outputs, groups, 32)
    repacked = torch.cat([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], dim=-1)
    out = torch.empty(2, 6, 96)
    blocks_of("MXFP4").decode([repacked.reshape(-1)], 0, out)
    assert torch.equal(out.transpose(1, 2), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
