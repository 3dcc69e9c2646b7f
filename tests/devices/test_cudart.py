"""Which of the libraries that a process has loaded is the CUDA runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexgen.devices.cudart import cuda_runtime, loaded_runtimes

MAPS = """\
5581c2a00000-5581c2a21000 r--p 00000000 fd:01 1053 /usr/bin/python3
7f30a0000000-7f30a0021000 rw-p 00000000 00:00 0
7f30b0000000-7f30b00b0000 r-xp 00000000 fd:01 77 {path}
7f30b00b0000-7f30b00c0000 rw-p 000b0000 fd:01 77 {path}
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
"""
HASHED = "/lib/torch/lib/libcudart-9335f6a2.so.12"


@pytest.mark.parametrize("name", ["libcudart.so", "libcudart.so.12", "libcudart.so.13.0.48", "libcudart-9335f6a2.so.12"])
def test_runtimes_are_found_by_their_names(name: str) -> None:
    path = f"/with a blank/nvidia/cuda_runtime/lib/{name}"
    assert loaded_runtimes(MAPS.format(path=path)) == [path]
    assert loaded_runtimes(MAPS.format(path=f"{path} (deleted)")) == [path]


@pytest.mark.parametrize(
    "name", ["libcudart_stub.so", "libcudart-stub.so", "libcudart.so.12.txt", "libcuda.so.1", "libcudart.so/libc.so.6"]
)
def test_other_libraries_are_not_taken_for_runtimes(name: str) -> None:
    assert loaded_runtimes(MAPS.format(path=f"/lib/{name}")) == []


class Libraries:
    """What can be loaded, and a file that says what is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.libraries: dict[str, SimpleNamespace] = {}
        self.maps = folder / "maps"
        self.maps.write_text(MAPS.format(path=HASHED))
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(ctypes, "CDLL", self._load)

    def _load(self, name: str) -> SimpleNamespace:
        if name not in self.libraries:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return self.libraries[name]

    def add(self, name: str, *missing: str) -> SimpleNamespace:
        functions = {"cudaHostRegister", "cudaHostUnregister", "cudaGetLastError", "cudaGetErrorString"} - set(missing)
        self.libraries[name] = SimpleNamespace(**{function: SimpleNamespace(argtypes=None, restype=ctypes.c_int) for function in functions})
        return self.libraries[name]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Libraries:
    return Libraries(monkeypatch, tmp_path)


def test_the_runtime_that_torch_has_loaded_comes_first(libraries: Libraries) -> None:
    """Wheels bring it under a name of their own, and another one may be installed."""
    own, _ = libraries.add(HASHED), libraries.add("libcudart.so.12")
    found = cuda_runtime(libraries.maps)
    assert found is own
    assert own.cudaHostRegister.argtypes == [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint], "addresses have 64 bits"
    assert own.cudaHostUnregister.argtypes == [ctypes.c_void_p]
    assert own.cudaGetErrorString.restype is ctypes.c_char_p


def test_a_library_without_the_functions_is_passed_over(libraries: Libraries) -> None:
    libraries.add(HASHED, "cudaHostRegister")
    other = libraries.add("libcudart.so.12")
    assert cuda_runtime(libraries.maps) is other


def test_without_a_list_of_what_is_loaded_the_name_must_do(libraries: Libraries) -> None:
    other = libraries.add("libcudart.so.12")
    assert cuda_runtime(libraries.maps.parent / "none") is other


@pytest.mark.parametrize("version", ["12.8", None])
def test_there_may_be_no_runtime(version: str | None, libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    """None stands for torch's build for AMD devices."""
    monkeypatch.setattr(torch.version, "cuda", version)
    assert cuda_runtime(libraries.maps) is None
