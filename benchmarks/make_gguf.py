"""Write a GGUF of a Llama shape with random bf16 weights and no vocabulary, for timing llama.cpp on the shape that flexgen runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from shapes import Shape

NOISE_VALUES = 1 << 22


def write_gguf(shape: Shape, path: Path) -> None:
    """Write `shape` to `path`; an interrupted write leaves no file of that name.

    Raises:
        ValueError: for a model type that is not "llama".
    """
    if shape.model_type != "llama":
        raise ValueError(f"{shape.name}: llama.cpp has no {shape.model_type} models")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_header(writer, shape)
    tensors = list(_tensors(shape))
    for name, dims, dtype in tensors:
        stored = (*dims[:-1], 2 * dims[-1]) if dtype == "bf16" else dims  # bf16 travels as bytes
        writer.add_tensor_info(
            name,
            stored,
            np.dtype(np.uint8 if dtype == "bf16" else np.float32),
            int(np.prod(dims)) * (2 if dtype == "bf16" else 4),
            raw_dtype=gguf.GGMLQuantizationType.BF16 if dtype == "bf16" else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = _bf16_noise()
    for _, dims, dtype in tensors:
        writer.write_tensor_data(np.resize(noise, int(np.prod(dims))).view(np.uint8) if dtype == "bf16" else np.ones(dims, np.float32))
    writer.close()
    partial.rename(path)


def _add_header(writer: gguf.GGUFWriter, shape: Shape) -> None:
    config = shape.config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, dims, dtype) in file order; the head is tied to the embedding."""
    config = shape.config
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    yield "token_embd.weight", (config["vocab_size"], hidden), "bf16"
    for layer in range(config["num_hidden_layers"]):
        for name, dims in {
            "attn_q": (query, hidden),
            "attn_k": (key, hidden),
            "attn_v": (key, hidden),
            "attn_output": (hidden, query),
            "ffn_gate": (intermediate, hidden),
            "ffn_up": (intermediate, hidden),
            "ffn_down": (hidden, intermediate),
        }.items():
            yield f"blk.{layer}.{name}.weight", dims, "bf16"
        yield f"blk.{layer}.attn_norm.weight", (hidden,), "f32"
        yield f"blk.{layer}.ffn_norm.weight", (hidden,), "f32"
    yield "output_norm.weight", (hidden,), "f32"


def _bf16_noise() -> np.ndarray:
    """Normal values of deviation 0.02, as the upper halves of float32."""
    values = np.random.default_rng(0).standard_normal(NOISE_VALUES, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
