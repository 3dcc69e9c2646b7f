"""The tensors of a model's weight files, known by their headers alone; the files may be here, elsewhere, or not written at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from flexgen.checkpoint.headers import MAX_TENSORS, parse_header, read_header
from flexgen.errors import CheckpointError
from flexgen.formats.base import NumberFormat, StoredTensor
from flexgen.formats.plain import dtype_name
from flexgen.hub.diagnose import some
from flexgen.hub.model_files import INDEX_FILE, find_weight_files


class Headers:
    """The tensors of a model's files, known by their validated headers.  The files may be elsewhere, or may not exist.

    Args:
        folder: The folder of the files, or a name for files without a folder on this machine.
        tensors: The tensors of each file, by name.

    Attributes:
        folder: The folder of the files, or a name for files without a folder on this machine.
        tensors: Every stored tensor by name, over all files.
        total_bytes: The bytes of all tensors.
        number_format: The name of the format of the stored weights, as in ModelSpec.
        architecture: The architecture by whose names a GGUF file calls its tensors; None for the names of transformers.
        readable: Whether the files are on this machine, so that numbers can be compared.

    Raises:
        CheckpointError: Two files hold a tensor of the same name, or there are more tensors than in any known model.
    """

    readable = False
    architecture: str | None = None

    def __init__(self, folder: Path, tensors: Iterable[Mapping[str, StoredTensor]]) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for stored in tensors:
            for name in stored.keys() & self.tensors.keys():
                raise CheckpointError(f"{name} is stored twice: in {self.tensors[name].path.name} and in {stored[name].path.name}")
            self.tensors.update(stored)
            if len(self.tensors) > MAX_TENSORS:
                raise CheckpointError(f"{folder}: more than {MAX_TENSORS:,} tensors; no known model has as many")
        self.total_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.number_format = _most_common_dtype(self.tensors.values())

    @classmethod
    def parsed(cls, folder: Path, files: Mapping[str, tuple[bytes, int]]) -> Headers:
        """Return the headers of files given as file name -> (header without the 8 bytes of its length, size of the whole file).

        Raises:
            CheckpointError: A header breaks a rule of the format.
        """
        return Headers(folder, [parse_header(header, file_bytes=size, path=folder / name) for name, (header, size) in files.items()])

    def decoded(self, number_format: NumberFormat | None, dtype: torch.dtype) -> Headers:
        """Return the headers as if the encoded tensors had been stored in `dtype`; each tensor states its encoding.

        Args:
            number_format: The format of the weights; None for plain numbers.

        Raises:
            CheckpointError: The tensors are not stored as the format requires.
        """
        if number_format is None:
            self._check_unscaled()
            return self
        encodings = number_format.find(self.tensors)
        consumed = {name for each in encodings.values() for name in (*(part.tensor.name for part in each.parts), *each.beside)}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in consumed}
        low_bit = [name for name, tensor in tensors.items() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1]
        if not encodings or low_bit:
            what = f"{some(low_bit)} without scales" if low_bit else "none of its tensors is"
            raise CheckpointError(f"{self.folder}: config.json says that the weights are {number_format.name}, but {what}")
        for name, encoding in encodings.items():
            first, nbytes = encoding.parts[0].tensor, math.prod(encoding.shape) * dtype.itemsize
            tensors[name] = StoredTensor(
                name=name, path=first.path, offset=first.offset, nbytes=nbytes, dtype=dtype, shape=encoding.shape, encoding=encoding
            )
        decoded = Headers(self.folder, [tensors])
        decoded.number_format = number_format.name
        return decoded

    def _check_unscaled(self) -> None:
        """Refuse numbers of 8 bits that have scales, where config.json does not say so: without the scales they would be other numbers."""
        low_bit = [name for name, tensor in self.tensors.items() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1]
        scaled = [name for name in low_bit if any(f"{name}{ending}" in self.tensors for ending in ("_scale", "_scale_inv"))]
        if scaled:
            raise CheckpointError(
                f"{self.folder}: {some(scaled)} are stored in 8 bits with scales, but neither quantization_config in config.json nor "
                "an older tool's file (ModelOpt's is hf_quant_config.json) says how: see docs/formats.md"
            )


def _most_common_dtype(tensors: Iterable[StoredTensor]) -> str:
    """Return the name of the dtype that takes most of the stored bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return dtype_name(max(sizes, key=lambda dtype: sizes[dtype])) if sizes else ""


class Checkpoint(Headers):
    """The safetensors files of a model folder.

    Args:
        folder: The folder, which holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.  Files may be
            symbolic links into the same repository of the Hugging Face cache.

    Raises:
        CheckpointError: There are no such files, or one of them is unsafe or broken.
    """

    readable = True

    def __init__(self, folder: Path) -> None:
        files, index = find_weight_files(folder)
        super().__init__(folder, map(read_header, files))
        for name, file_name in index.items():
            if name not in self.tensors or self.tensors[name].path.name != file_name:
                raise CheckpointError(f"{self.folder / INDEX_FILE}: {name} is not in {file_name}")
