"""The dtype to compute in, where the options leave it to the checkpoint and the device.  Loads torch only to ask a CUDA device."""

from __future__ import annotations

from typing import Any

from flexgen.errors import ModelError
from flexgen.options import DTYPE_BYTES

BFLOAT16_CAPABILITY = (8, 0)  # of the first CUDA devices whose units multiply bfloat16


def config_dtype(config: Any) -> str:
    """Return the dtype that a config states for its weights; float32 where it states none.

    Raises:
        ModelError: The dtype cannot be computed in.
    """
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or "float32"
    name = str(stored).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ModelError(f"config.json has dtype {str(stored)[:40]}, which cannot be computed in: give another, such as dtype='float32'")
    return name


def compute_dtype(stored: str, device: str, *, bfloat16: bool = True) -> str:
    """Resolve "auto": the checkpoint's dtype, but the other one of 16 bits where the device computes that many times as fast.

    CPUs compute float16 slowly, and older CUDA devices bfloat16.

    Args:
        stored: The dtype of the checkpoint.
        device: "cpu", "cuda" or "sim".
        bfloat16: Whether a CUDA device has units for bfloat16.
    """
    if device != "cuda":
        return "bfloat16" if stored == "float16" else stored
    return "float16" if stored == "bfloat16" and not bfloat16 else stored


def has_bfloat16(device: str) -> bool:
    """Return whether this machine's device has units for bfloat16, as far as it is a CUDA device."""
    if device != "cuda":
        return True
    import torch

    return torch.cuda.get_device_capability() >= BFLOAT16_CAPABILITY


def without_bfloat16(where: str) -> str:
    """Return the warning for a model in bfloat16 that is computed in float16; `where` names the device."""
    return (
        f"{where} has no units for bfloat16, in which the weights are stored, so the model is computed in float16: numbers above 65,504 "
        "would overflow, and answers may differ; dtype='float32' has the range of bfloat16"
    )
