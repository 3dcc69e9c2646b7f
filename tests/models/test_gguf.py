"""Models in GGUF: every parameter as transformers' own loader makes it, and the answers of the engine, which reads the files in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import Stored, gguf_bytes, plain, random_blocks, write_split

from flexgen import LLM, SamplingParams
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.gguf import GGUFHeaders
from flexgen.checkpoint.meta import building
from flexgen.checkpoint.parameters import parameter_sources
from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.config import read_config
from flexgen.hub.gguf_model import read_gguf
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.options import EngineOptions
from flexgen.plan.policy import Fractions
from flexgen.request import TokenRequest
from flexgen.session.lookup import spec_of
from models import parity

pytest.importorskip("gguf")  # transformers asks it for the names of tensors

ARCHITECTURES = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "falcon", "gpt2", "bloom", "starcoder2", "stablelm",
    "nemotron", "minimax-m2",
)  # fmt: skip
OF: Mapping[str, Mapping[str, Any]] = {"minimax-m2": {"attention.key_length": 128}}  # heads of another size than hidden states make
ALWAYS_TIED = ("bloom", "falcon", "gemma2")
VOCAB = 128
SHAPE: Mapping[str, Any] = {
    "block_count": 2, "context_length": 128, "embedding_length": 256, "feed_forward_length": 256, "attention.head_count": 4,
    "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 1e4,
    "vocab_size": VOCAB, "rope.dimension_count": 64, "attention.key_length": 64, "expert_count": 4, "expert_used_count": 2,
    "expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 512, "attention.sliding_window": 6,
}  # fmt: skip
KINDS = ("Q4_K", "Q8_0", "F16", "Q6_K", "Q4_0", "F32", "Q5_1", "Q3_K")
SCALES = {"Q4_K": 2e-4, "Q6_K": 1e-4, "Q3_K": 2e-4, "Q8_0": 4e-4, "Q4_0": 6e-3, "Q5_1": 2e-3}  # numbers of about a twentieth
PROMPTS = (5, 9, 23)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is made of metadata is kept."""
    monkeypatch.setattr("flexgen.hub.gguf_folder.cache_home", lambda: tmp_path / "kept")
    return tmp_path / "kept" / "gguf"


def metadata_of(architecture: str, **more: Any) -> dict[str, Any]:
    if architecture in ("falcon", "bloom", "gpt2"):
        more = {"attention.head_count_kv": 1 if architecture == "falcon" else 4, **more}
    about = {f"{architecture}.{key}": value for key, value in {**SHAPE, **more}.items()}
    tokens = {
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(VOCAB)],
    }
    return {"general.architecture": architecture, **about, **tokens}


def config_of(path: Path) -> Any:
    return read_config(resolve_model(path))


def random_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with building(config):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def names_of(model: Any, architecture: str) -> Mapping[str, str]:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    return get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict()))


def tensors_for(model: Any, architecture: str, tied: bool, kinds: Sequence[str] = KINDS) -> dict[str, Stored]:
    """A tensor for each name, in the shapes and with the offsets that llama.cpp stores, as random blocks of all types."""
    state, found = model.state_dict(), dict[str, Stored]()
    for number, (name, target) in enumerate(sorted(names_of(model, architecture).items())):
        shape = tuple(state[target].shape) if target in state else None
        if shape is None or (tied and name == "output.weight"):
            continue
        if name.endswith("_exps"):
            name += ".weight"
            shape = (shape[0], shape[1] // (1 if "down" in name else 2), shape[2])
        if architecture == "gpt2" and any(part in name for part in ("attn_qkv.w", "ffn_down.w", "ffn_up.w", "attn_output.w")):
            shape = shape[::-1]
        if "ffn_gate_inp_shexp" in name:
            shape = shape[1:]
        kind = kinds[number % len(kinds)] if len(shape) > 1 else "F32"
        if kind.startswith("F"):
            numbers = np.random.default_rng(number).normal(len(shape) == 1 and "weight" in name, 0.05, shape)
            found[name] = plain(numbers.astype({"F32": np.float32, "F16": np.float16}[kind]))
        else:
            found[name] = random_blocks(kind, shape, number, SCALES[kind])
    return found


def write_model(
    folder: Path, architecture: str, *, tied: bool = False, num_parts: int = 1, kinds: Sequence[str] = KINDS, **more: Any
) -> tuple[Path, Any]:
    """A random model in GGUF, and the model that transformers' loader makes of it."""
    metadata, path = metadata_of(architecture, **OF.get(architecture, {}), **more), folder / "model.gguf"
    placeholder = {"token_embd.weight" if tied else "output.weight": plain(np.zeros(1, np.float32))}
    path.write_bytes(gguf_bytes(metadata, placeholder))
    model = random_model(config_of(path))
    tensors = tensors_for(model, architecture, tied, kinds)
    path.write_bytes(gguf_bytes(metadata, tensors))
    state = loaded_by_transformers(path, model)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    if num_parts > 1:
        path.unlink()
        path = write_split(folder, "model", metadata, tensors, num_parts)[1]
    return path, model


def loaded_by_transformers(path: Path, model: Any) -> dict[str, torch.Tensor]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


def decoded(path: Path) -> Headers:
    return GGUFHeaders(read_gguf(path)).decoded(None, torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_that_of_transformers(tmp_path: Path, architecture: str) -> None:
    path, model = write_model(tmp_path, architecture, tied=architecture in ALWAYS_TIED)
    wanted = model.state_dict()
    found = parameter_sources(random_model(config_of(path)), decoded(path))
    assert not found.unexpected
    assert set(found.names()) >= {name for name, _ in model.named_parameters()}
    for name in found.names():
        out = torch.full(found[name].shape, torch.nan)
        found[name].read(out)
        assert torch.equal(out, wanted[name]), name
        if found[name].sliceable and len(out) > 5:  # rows can be read by themselves
            part = torch.full((3, *out.shape[1:]), torch.nan)
            found[name].rows(2, 5).read(part)
            assert torch.equal(part, wanted[name][2:5]), name


def test_a_part_of_large_heads_is_rotated(tmp_path: Path) -> None:
    """MiniMax-M2 rotates half of each head, which is larger than the hidden state by the heads."""
    path, _ = write_model(tmp_path, "minimax-m2")
    config = config_of(path)
    assert (config.head_dim, config.rope_parameters["partial_rotary_factor"]) == (128, 0.5)


def assembled(path: Path) -> AssembledModel:
    files = resolve_model(path)
    assert files.gguf is not None
    headers = GGUFHeaders(files.gguf)
    return assemble_model(files.folder, read_config(files), torch.float32, unit_bytes=200_000, headers=headers)


def requests() -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(1)
    return [
        TokenRequest(index=index, prompt_token_ids=tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()), max_tokens=8)
        for index, length in enumerate(PROMPTS)
    ]


ON_DISK, IN_MEMORY = Fractions(disk=1.0), Fractions(host=1.0)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {"tied": True}), ("llama", {"num_parts": 3}), ("gemma2", {"tied": True}), ("qwen3moe", {})],
    ids=["llama tied", "llama in parts", "gemma2", "qwen3moe"],
)
def test_answers_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, options: dict[str, Any]
) -> None:
    path, model = write_model(tmp_path, architecture, **options)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    wanted = parity.expected(model, requests())
    for device, homes in [("cpu", ON_DISK), ("cpu", IN_MEMORY), ("sim", ON_DISK)]:
        chosen = parity.policy(device, weights=homes, kv=Fractions(host=1.0), ring_bytes=4_000_000)
        got = parity.answered(assembled(path), chosen, requests(), monkeypatch)
        parity.assert_equal(got, wanted)


def test_stored_bytes_are_what_is_planned_for_and_read(tmp_path: Path) -> None:
    """Rows of the embedding are gathered in blocks, and a unit's bytes are those of the file."""
    path, _ = write_model(tmp_path, "llama", tied=True, kinds=("Q8_0", "Q4_K"))
    spec = spec_of(str(path), EngineOptions(dtype="float32"), device="cpu")
    model = assembled(path)
    tensors = {tensor.name: tensor for _, tensor in read_gguf(path).tensors}
    table = tensors["token_embd.weight"]
    assert spec.number_format == "gguf"
    assert spec.embedding_row_bytes == table.nbytes // VOCAB
    assert [each.module for each in model.tables] == ["model.embed_tokens"]
    matrices = sum(tensor.nbytes for tensor in tensors.values() if len(tensor.shape) > 1)
    streamed = sum(each.nbytes for layout in model.layouts for tensor in layout.tensors for each in tensor.source.ranges)
    assert matrices < streamed < 2 * matrices, "ranges of queries and keys reach over the rows of the other half"
    assert sum(layout.stored_bytes for layout in model.layouts) <= matrices + 2 * 4096 * len(model.layouts)
    assert sum(layout.carried_bytes for layout in model.layouts) <= matrices + 256 * 20 * len(model.layouts), (
        "what overlaps is carried once"
    )


# -- what the metadata says


def test_a_missing_half_of_experts(tmp_path: Path) -> None:
    path, model = write_model(tmp_path, "qwen3moe")
    tensors = tensors_for(model, "qwen3moe", tied=False)
    del tensors["blk.1.ffn_up_exps.weight"]
    path.write_bytes(gguf_bytes(metadata_of("qwen3moe"), tensors))
    with pytest.raises(CheckpointError, match=r"gate_up_proj is stored in the parts gate; gate and up belong together"):
        parameter_sources(model, decoded(path))


def test_a_missing_tensor(tmp_path: Path) -> None:
    path, model = write_model(tmp_path, "llama")
    tensors = tensors_for(model, "llama", tied=False)
    del tensors["blk.1.attn_q.weight"]
    path.write_bytes(gguf_bytes(metadata_of("llama"), tensors))
    with pytest.raises(CheckpointError, match=r"1 parameter of LlamaForCausalLM is missing: model.layers.1.self_attn.q_proj.weight"):
        parameter_sources(model, decoded(path))


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    """A llama with biases or experts, which its metadata does not tell transformers."""
    path, model = write_model(tmp_path, "llama")
    tensors = tensors_for(model, "llama", tied=False)
    path.write_bytes(gguf_bytes(metadata_of("llama"), {**tensors, "blk.0.attn_q.bias": plain(np.ones(256, np.float32))}))
    with pytest.raises(UnsupportedModelError, match=r"1 tensor has no place.*blk\.0\.attn_q\.bias"):
        parameter_sources(model, decoded(path))


def test_architectures_that_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensor = {"token_embd.weight": plain(np.zeros(1, np.float32))}
    path.write_bytes(gguf_bytes(metadata_of("wavtokenizer-dec"), tensor))
    with pytest.raises(UnsupportedModelError, match=r"wavtokenizer-dec.*llama.*qwen3"):
        resolve_model(path)
    path.write_bytes(gguf_bytes(metadata_of("gemma4"), tensor))
    with pytest.raises(UnsupportedModelError, match=r"gemma4 is not supported in GGUF.*share keys"):
        resolve_model(path)
    path.write_bytes(gguf_bytes({"general.architecture": "llama", "llama.block_count": 10**9}, tensor))
    with pytest.raises(CheckpointError, match="num_hidden_layers 1000000000"):
        resolve_model(path)


def rope_of(folder: Path, architecture: str, factors: np.ndarray | None = None, **more: Any) -> Mapping[str, Any]:
    path = folder / "rope.gguf"
    tensors = {"token_embd.weight": plain(np.zeros(1, np.float32))}
    if factors is not None:
        tensors["rope_freqs.weight"] = plain(factors.astype(np.float32))
    path.write_bytes(gguf_bytes(metadata_of(architecture, **more), tensors))
    return config_of(path).rope_parameters


def llama3_factors(theta: float, factor: float, head_dim: int = 64) -> np.ndarray:
    """By transformers' own function, as stored: the plain frequencies over the scaled ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    about = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=head_dim, rope_parameters={"rope_theta": theta, **about})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain_frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return plain_frequencies / scaled.numpy()


def test_scaled_rotary_frequencies(tmp_path: Path) -> None:
    assert rope_of(tmp_path, "llama")["rope_type"] == "default"
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert rope_of(tmp_path, "llama", **scaling).items() >= {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}.items()
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope_of(tmp_path, "qwen2", **scaling).items() >= yarn.items()
    for factor in (8.0, 32.0):
        found = rope_of(tmp_path, "llama", llama3_factors(5e5, factor), **{"rope.freq_base": 5e5})
        assert found.items() >= {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}.items()
    gemma = rope_of(tmp_path, "gemma3", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert (gemma["full_attention"]["rope_type"], gemma["sliding_attention"]["rope_type"]) == ("linear", "default")
    assert rope_of(tmp_path, "llama", np.ones(32))["rope_type"] == "default"


def test_frequencies_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"other than those of Llama 3 \(number 0 is 2"):
        rope_of(tmp_path, "llama", np.linspace(2, 8, 32))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        rope_of(tmp_path, "phi3", **{"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0})
    with pytest.raises(CheckpointError, match="YaRN without"):
        rope_of(tmp_path, "llama", **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})


def test_sizes_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensor = {"token_embd.weight": plain(np.zeros(1, np.float32))}
    path.write_bytes(gguf_bytes(metadata_of("gemma2", final_logit_softcapping=12.5), tensor))
    assert config_of(path).final_logit_softcapping == 12.5
    path.write_bytes(gguf_bytes(metadata_of("qwen2moe"), tensor))
    config = config_of(path)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (256, 512)


# -- tokenizers


def with_tokenizer(architecture: str = "llama") -> dict[str, Any]:
    """A vocabulary of bytes and three special tokens, as files for llama.cpp hold it."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 5]
    tokens = [*letters, "he", "ll", "<s>", "</s>", "<|end|>"]
    special = {"bos": VOCAB - 3, "eos": VOCAB - 2, "eot": VOCAB - 1}
    return {
        **metadata_of(architecture),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (VOCAB - 3) + [3] * 3, "tokenizer.ggml.merges": ["h e", "l l"],
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in special.items()},
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for message in messages %}<|end|>{{ message['content'] }}{% endfor %}",
        "tokenizer.chat_template.tool_use": "tools",
        "general.sampling.temp": 0.5,
    }  # fmt: skip


def test_a_tokenizer_comes_out_of_the_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path, model = write_model(tmp_path, "llama")
    path.write_bytes(gguf_bytes(with_tokenizer(), tensors_for(model, "llama", tied=False)))
    reference: Any = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    with LLM(path, dtype="float32") as llm:
        assert llm.tokenizer is not None
        for text in ("hello", "<|end|>hell<s>", "  h  e", "", "lll"):
            assert llm.tokenizer.encode([text]) == [reference(text)["input_ids"]]
        assert llm.tokenizer.encode(["hello"])[0][:3] == [VOCAB - 3, VOCAB - 5, VOCAB - 4]
        assert llm.eos_token_ids == {VOCAB - 2, VOCAB - 1}
        assert set(llm.tokenizer.chat_template) == {"default", "tool_use"}  # type: ignore[call-overload]
        (output,) = llm.chat([[{"role": "user", "content": "hell"}]], SamplingParams(temperature=0, max_tokens=4))
        assert output.prompt_token_ids == (VOCAB - 1, VOCAB - 5, VOCAB - 4)
        assert llm.get_default_sampling_params().temperature == 0.5


def test_a_file_without_a_tokenizer_takes_another(tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture, home: Path) -> None:
    path, model = write_model(tmp_path, "llama")
    caplog.clear()
    for _ in range(2):  # the second finds what the first kept
        assert not resolve_model(path).has_tokenizer
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{path}: its tokenizer cannot be used (the file has none): give another as tokenizer="
    ] * 2
    with LLM(path, tokenizer=model_folder, dtype="float32") as llm:
        assert llm.tokenizer is not None
    path.write_bytes(gguf_bytes(with_tokenizer(), tensors_for(model, "llama", tied=False)))
    with LLM(model_folder, tokenizer=path) as llm:
        assert llm.tokenizer is not None
        assert llm.tokenizer.encode(["he"], add_special_tokens=False) == [[VOCAB - 5]]
    kept = list(home.iterdir())
    assert all(not each.name.startswith("new-") and each.stat().st_mode & 0o077 == 0 for each in kept)


def test_a_vocabulary_that_cannot_be_used(tmp_path: Path) -> None:
    path, model = write_model(tmp_path, "llama")
    broken = {**with_tokenizer(), "tokenizer.ggml.model": "unheard of"}
    path.write_bytes(gguf_bytes(broken, tensors_for(model, "llama", tied=False)))
    files: ModelFiles = resolve_model(path)
    assert not files.has_tokenizer
    assert not list(files.folder.glob("tokenizer*"))


def test_random_weights_for_a_file(tmp_path: Path) -> None:
    path, _ = write_model(tmp_path, "llama")
    with LLM(path, dtype="float32", load_format="dummy") as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3))
        assert len(output.outputs[0].token_ids) == 3


def test_the_package_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_model(tmp_path, "llama")
    monkeypatch.setattr("flexgen.hub.gguf_folder.cache_home", lambda: tmp_path / "another")
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda *_: False)
    with pytest.raises(ModelError, match=r"pip install 'flexgen-engine\[gguf\]'"):
        resolve_model(path)
