"""The headers of a model's weights, in whatever format of files they are, here or on the hub."""

from __future__ import annotations

from flexgen.checkpoint.files import Checkpoint, Headers
from flexgen.checkpoint.gguf import GGUFHeaders
from flexgen.hub.download import weight_headers
from flexgen.hub.model_files import ModelFiles, weight_files


def stored_headers(files: ModelFiles, *, token: str | None = None) -> Headers:
    """Return the headers of the weights: of a GGUF file, of the folder, or of the hub where the folder has only the small files.

    Args:
        files: The model's files.
        token: The access token for the hub, as in `resolve_model`.

    Raises:
        ModelError: The headers cannot be read, or are broken.
    """
    if files.gguf is not None:
        return GGUFHeaders(files.gguf)
    if files.commit is None or all((files.folder / name).is_file() for name in weight_files(files.folder)):
        return Checkpoint(files.folder)
    return Headers.parsed(files.folder, weight_headers(files.name, files.folder, token=token))
