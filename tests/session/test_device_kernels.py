"""Every program that a pass launches was compiled before: by the interpreter's launches, and by what Triton makes a program of."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from flexgen.engine.engine import Engine
from flexgen.errors import OptionError
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import group_layers
from flexgen.kv.warming import attend_without_memory
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.models.warming import decode_without_memory, multiply_without_memory
from flexgen.plan.policy import Fractions
from flexgen.request import TokenRequest
from flexgen.session import device_kernels
from tests.devices.counting import CountingDevice
from tests.engine.test_device_sampler import mixed
from tests.formats import test_floats_run, test_integer_models
from tests.formats.encoded import with_quantization, write_model
from tests.models.parity import UNIT_BYTES, build, policy, save
from tests.models.tiny_configs import tiny_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra triton)")

PROMPTS = (3, 21)
TOKENS = 3
ATTENTION = {"decode_attention", "merge_parts", "prefill_attention"}
SEALED = {"decode_sealed_attention", "merge_parts", "prefill_attention"}
LATENT = {"decode_latent_attention", "merge_parts", "prefill_attention"}
EXPERTS = {"grouped_product", "add_rows"}


def plain(model_type: str, **changes: Any) -> Callable[[Path], tuple[Path, PreTrainedConfig]]:
    def write(folder: Path) -> tuple[Path, PreTrainedConfig]:
        config = tiny_config(model_type, **changes)
        save(build(config), folder)
        return folder, config

    return write


def of_floats(name: str) -> Callable[[Path], tuple[Path, PreTrainedConfig]]:
    def write(folder: Path) -> tuple[Path, PreTrainedConfig]:
        model_type, changes, quantization, writer, of = test_floats_run.CASES[name]
        config = tiny_config(model_type, **changes)
        save(build(config), folder / "plain")
        write_model(folder / "plain", folder / "encoded", folder / "dense", quantization, writer, of=of)
        return folder / "encoded", with_quantization(config, quantization)

    return write


def of_integers(name: str) -> Callable[[Path], tuple[Path, PreTrainedConfig]]:
    return lambda folder: (folder / "encoded", test_integer_models.write(test_integer_models.CASES[name], folder))


@dataclass(frozen=True)
class Case:
    """A model, the formats that it is computed with, and which kernels it needs."""

    write: Callable[[Path], tuple[Path, PreTrainedConfig]]
    kernels: set[str]
    dtype: torch.dtype = torch.float32
    kv: str = "auto"
    device_share: float = 1.0  # of KV; the rest is in host memory


# Heads of 16 numbers, and of 24 and 12 (of latents), which Triton's alignment tells apart; 16 bits and 32.
CASES = {
    "llama": Case(plain("llama"), ATTENTION),
    "opt in float16, KV on the host": Case(plain("opt"), ATTENTION, torch.float16, device_share=0.5),
    "gemma2 in float16": Case(plain("gemma2"), ATTENTION, torch.float16),
    "uneven heads": Case(plain("llama", head_dim=12), ATTENTION, torch.float16, device_share=0.5),
    "llama in int4 KV": Case(plain("llama"), SEALED, kv="int4"),
    "uneven heads in int8 KV": Case(plain("llama", head_dim=12), SEALED, torch.float16, kv="int8", device_share=0.5),
    "deepseek_v3": Case(plain("deepseek_v3"), LATENT | EXPERTS, torch.float16, device_share=0.5),
    "minicpm3 in k8v4 KV": Case(plain("minicpm3"), LATENT, torch.float16, kv="k8v4"),
    "gpt_oss in MXFP4": Case(of_floats("gpt_oss in MXFP4"), ATTENTION | EXPERTS | {"decode_matrices", "encoded_product"}),
    "deepseek_v3 in FP8": Case(of_floats("deepseek_v3 in FP8"), LATENT | EXPERTS | {"decode_matrices"}),
    "llama in NF4": Case(of_floats("llama in NF4"), ATTENTION | {"decode_matrices"}),
    "llama in int4": Case(of_integers("llama-pack-quantized"), ATTENTION | {"decode_matrices"}),
    "qwen3_moe in GPTQ": Case(of_integers("qwen3_moe-gptq"), ATTENTION | EXPERTS | {"decode_matrices"}),
    "mixtral in AWQ": Case(of_integers("mixtral-awq"), ATTENTION | EXPERTS | {"decode_matrices"}),
    "llama4_text": Case(plain("llama4_text"), ATTENTION | EXPERTS),
}


def requests() -> list[TokenRequest]:
    """Some of which draw, alike prompts of all lengths of tiles."""
    kinds = [each for each in mixed(6) if each.allowed_token_ids is None]
    prompts = [tuple(10 + (7 * index + place) % 90 for place in range(length)) for index, length in enumerate(PROMPTS)]
    return [
        replace(kinds[index % len(kinds)], index=index, prompt_token_ids=prompt, max_tokens=TOKENS) for index, prompt in enumerate(prompts)
    ]  # fmt: skip


def answer(model: AssembledModel, case: Case, folder: Path) -> None:
    """Answer requests on the simulated device, with prompts in several chunks."""
    ring = 4 * max(max(layout.stored_bytes, layout.carried_bytes, layout.decoded_bytes) for layout in model.layouts) + 8192
    kv = Fractions(device=case.device_share, host=1 - case.device_share)
    chosen = policy("sim", weights=Fractions(device=0.4, host=0.3, disk=0.3), kv=kv, ring_bytes=ring, micro_batch_tokens=25)
    name = str(case.dtype).removeprefix("torch.")
    with Engine(model, replace(chosen, dtype=name), backend=CountingDevice(64_000_000), offload_dir=folder) as engine:
        results = list(engine.generate(requests()))
    assert [each.error for each in results] == [None] * len(PROMPTS)


@pytest.mark.matrix(4, always=["llama", "uneven heads in int8 KV", "deepseek_v3", "llama in int4"])
@pytest.mark.parametrize("name", CASES)
def test_every_program_of_a_pass_is_compiled_ahead(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen.kernels.triton.experts import MEAN_ROWS
    from tests.kernels.on_sim import Programs, SimAttention, SimExperts, draw, use_triton

    case = CASES[name]
    monkeypatch.setattr("flexgen.kernels.triton.launch.SPLIT_TOKENS", 16)  # so that short sequences have several parts
    use_triton(monkeypatch)
    folder, config = case.write(tmp_path)
    model = assemble_model(
        folder, copy.deepcopy(config), case.dtype, unit_bytes=UNIT_BYTES, kv_format=kv_format(case.kv, case.dtype)
    )  # fmt: skip
    programs = Programs(monkeypatch)
    attend_without_memory(group_layers(model.layers, 8, model.kv_format), SimAttention(), model.calls)
    decode_without_memory(model)
    multiply_without_memory(model, SimExperts(), MEAN_ROWS)
    numbers = torch.empty(1, 1, dtype=torch.int64, device="meta")
    draw(numbers, numbers, model.spec.vocab_size)
    assert not programs.launched
    answer(model, case, tmp_path)
    launched = {kernel for kernel, *_ in programs.launched}
    assert launched | {"merge_parts"} == case.kernels | {"exponential_rows", "merge_parts"}, "parts are merged where they are several"
    missing = programs.launched - programs.compiled
    assert not missing, "\n".join(map(str, sorted(missing)))


def test_the_kernels_of_a_device_are_compiled_when_a_model_is_prepared(novels_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them by one call, and an error is one of this machine; without Triton nothing is compiled."""
    from flexgen.kernels.triton import compiling
    from tests.kernels.on_sim import Programs

    model = assemble_model(novels_qwen3, AutoConfig.from_pretrained(novels_qwen3), torch.bfloat16)
    programs, asked, device = Programs(monkeypatch), list[int](), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def compile_ahead(calls: Sequence[Callable[[], None]], num_threads: int) -> int:
        asked.append(num_threads)
        for call in calls:
            call()
        return len(programs.compiled)

    monkeypatch.setattr(compiling, "compile_ahead", compile_ahead)
    device_kernels.compile_kernels(model, device)
    assert {kernel for kernel, *_ in programs.compiled} == ATTENTION | {"exponential_rows"}
    assert not programs.launched
    assert asked[0] >= 1
    monkeypatch.setattr(compiling, "compile_ahead", lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    with pytest.raises(OptionError, match=r"Triton cannot compile a kernel on this machine \(no C compiler\)"):
        device_kernels.compile_kernels(model, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device_kernels.compile_kernels(model, device)
