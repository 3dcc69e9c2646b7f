"""What the machine is: versions, memory, disk, and the GPU as its driver describes it.  Prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..record import machine, versions

_GPU = ("name", "driver_version", "memory.total", "memory.used", "pcie.link.gen.max", "pcie.link.gen.current", "pcie.link.width.current")


def facts(device: str, folder: Path) -> dict[str, Any]:
    """Return what is known of the machine, the disk of a folder and the device."""
    found: dict[str, Any] = {"device": device, "machine": machine(), "versions": versions()}
    disk = shutil.disk_usage(folder)
    found["disk"] = {"total_bytes": disk.total, "free_bytes": disk.free}
    found["available_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    found["cuda"] = torch.version.cuda
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        found["gpu"] = {"name": name, "capability": capability, "free_bytes": free, "total_bytes": total}
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found["driver"] = [dict(zip(_GPU, map(str.strip, line.split(",")), strict=False)) for line in told.splitlines()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    print(json.dumps(facts(asked.device, asked.folder), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
