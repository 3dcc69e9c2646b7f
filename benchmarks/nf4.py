"""NF4, the 4 bits of bitsandbytes (arXiv:2305.14314): rounds matrices, and writes a folder as transformers would save it.

    python benchmarks/nf4.py MODEL DIR

Blocks of 64 numbers of the flattened matrix share a float32 scale, their largest magnitude, and a number is one of 16 quantiles of a normal
distribution: 4.5 bits.  Codes and scales are those of bitsandbytes 0.50.2 (its `quantize_4bit`), which is not needed here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexgen.hub.model_files import ModelFiles
from flexgen.hub.private_folder import tokenizer_files
from flexgen.hub.resolve import resolve_model
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.source import open_source
from flexgen.quantize.targets import find_targets

BLOCK = 64
# The values of the 16 codes: appendix E of the paper, as bitsandbytes has them.
VALUES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def round_nf4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, uint8 (blocks, 64), and the scales, float32 (blocks,), of a float32 matrix with a whole number of blocks."""
    data = weights.reshape(-1, BLOCK)
    scales = data.abs().amax(1)
    borders = (VALUES[1:] + VALUES[:-1]) / 2
    codes = torch.bucketize(data / scales.clamp(min=1e-30)[:, None], borders)
    return codes.to(torch.uint8), scales


def in_nf4(weights: torch.Tensor) -> torch.Tensor:
    """Return a float32 matrix rounded to NF4."""
    codes, scales = round_nf4(weights)
    return (VALUES[codes.long()] * scales[:, None]).view(weights.shape)


def stored(name: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that are stored for a matrix."""
    codes, scales = round_nf4(weights.float())
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(weights.dtype).removeprefix("torch."), "shape": list(weights.shape)}
    pairs = codes.view(-1, 2)
    return {
        name: (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
        f"{name}.absmax": scales,
        f"{name}.quant_map": VALUES.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
    }


def write_nf4(files: ModelFiles, folder: Path) -> Path:
    """Write a small model into a folder, with the weights of linear layers but the head in NF4, unless it is there; return the folder."""
    if (folder / "config.json").exists():
        return folder
    source = open_source(files)
    rounded = find_targets(source.config, source.headers, QuantizeSettings(weight_format="int8", group_size=32)).rounded
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.headers.tensors.items():
        numbers = torch.from_file(str(tensor.path), size=tensor.path.stat().st_size, dtype=torch.uint8)
        numbers = numbers[tensor.offset : tensor.offset + tensor.nbytes].clone().view(tensor.dtype).view(tensor.shape)
        tensors |= stored(name, numbers) if name in rounded else {name: numbers}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, path in tokenizer_files(files.folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    quantization: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**files.config, "quantization_config": quantization}, indent=2) + "\n")
    return folder


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, metavar="DIR")
    asked = parser.parse_args()
    write_nf4(resolve_model(asked.model), asked.folder)


if __name__ == "__main__":
    main()
