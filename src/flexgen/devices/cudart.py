"""The CUDA runtime library that torch has loaded, by ctypes, for what torch does not offer."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from typing import Any, Protocol

import torch

NOT_REGISTERED = 713  # the code of cudaErrorHostMemoryNotRegistered

_RUNTIME = re.compile(r"libcudart(-[0-9a-f]+)?\.so(\.\d+)*")  # wheels of torch put a hash into the name of the library that they bring


class CudaRuntime(Protocol):
    """The functions of libcudart that are called; most return an error code, 0 for success.

    A failed call also leaves its code behind, in the library and for the thread that called.  Whatever looks for errors next raises it,
    which is as a rule an innocent launch of torch, unless `cudaGetLastError` takes it away.
    """

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int, /) -> int: ...
    def cudaHostUnregister(self, address: int, /) -> int: ...
    def cudaGetLastError(self) -> int: ...
    def cudaGetErrorString(self, code: int, /) -> bytes: ...


def cuda_runtime(maps: Path = Path("/proc/self/maps")) -> CudaRuntime | None:
    """Return the runtime library that torch has loaded; None if there is none with the functions that are needed.

    Should the process have loaded several, it does not matter which one is returned: all of them register memory with the same driver, and
    each keeps the errors of its own calls.

    Args:
        maps: The file in which the system lists what the process has mapped.
    """
    torch.cuda.init()
    names = loaded_runtimes(maps.read_text()) if maps.exists() else []
    if torch.version.cuda is not None:  # linked statically, or listed under a name of its own
        names.append(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    for name in names:
        with contextlib.suppress(OSError, AttributeError):  # gone from disk; a stub that some packages bring
            return _declared(ctypes.CDLL(name))
    return None


def loaded_runtimes(maps: str) -> list[str]:
    """Return the paths of the CUDA runtime libraries among what a process has mapped, which is listed as in /proc/self/maps."""
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = dict.fromkeys(each[5].removesuffix(" (deleted)") for each in fields if len(each) == 6)
    return [path for path in paths if _RUNTIME.fullmatch(path.rpartition("/")[2])]


def _declared(library: Any) -> CudaRuntime:
    """Return the library with the types of its functions declared."""
    library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
    library.cudaGetLastError.argtypes = []
    library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [ctypes.c_int], ctypes.c_char_p
    return library
