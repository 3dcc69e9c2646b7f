"""What transformers gets to see of a model's folder: vetted files under their fixed names, in a folder of our own.

transformers follows what it finds in a folder: file names in configs, versions of files, code.  Here it finds only what was
checked, and what the identity of a job is made of.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen.errors import CheckpointError
from flexgen.hub.folder import read_json
from flexgen.hub.foreign import check_fetched
from flexgen.hub.hub import TEMPLATE_FILE, TEMPLATE_FOLDER, TOKENIZER_FILES, is_template
from flexgen.hub.links import followed

_CONFIG, _ADDED_TOKENS = "config.json", "added_tokens.json"
_REWRITTEN = ("tokenizer_config.json", "special_tokens_map.json")  # their fields become arguments of tokenizers
_MOST_BYTES = 256 << 20  # the largest vocabularies have 40 MiB

# Fields that name files, code or other models: by their names, and by what they end in.
_NAMING = frozenset(
    {"auto_map", "custom_pipelines", "configuration_files", "_name_or_path", "name_or_path", "init_inputs", "source_spm", "target_spm",
     "gguf_file", "base_model_name_or_path", "custom_generate"}
)  # fmt: skip
_NAMING_ENDINGS = ("_file", "_files", "_path")
# Counts and names of classes, which transformers makes tables of and language models have no use for.
_USELESS = frozenset({"num_labels", "id2label", "label2id", "transformers_weights"})


@contextmanager
def config_folder(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with this config.json only, without what names files or code."""
    with tempfile.TemporaryDirectory(prefix="flexgen-config-") as name:
        folder = Path(name)
        _write(folder / _CONFIG, _cleaned(config))
        yield folder


@contextmanager
def tokenizer_folder(source: Path) -> Iterator[Path]:
    """A folder with the tokenizer and the chat templates of `source`.

    Raises:
        CheckpointError: a file is no JSON object, absurdly large, or behind a link that is not followed.
    """
    with tempfile.TemporaryDirectory(prefix="flexgen-tokenizer-") as name:
        folder = Path(name)
        for relative, path in tokenizer_files(source).items():
            (folder / relative).parent.mkdir(exist_ok=True)
            if relative == _ADDED_TOKENS:
                _write(folder / relative, read_json(path))
            elif relative in _REWRITTEN:
                _write(folder / relative, {name: value for name, value in read_json(path).items() if not _names_files(name)})
            else:
                (folder / relative).symlink_to(_checked(path))
        if (source / _CONFIG).is_file():  # some tokenizers are found by the model's type
            _write(folder / _CONFIG, _cleaned(read_json(source / _CONFIG)))
        yield folder


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Everything that a tokenizer and its templates are loaded from, by its name in the folder."""
    names = [name for name in (*TOKENIZER_FILES, TEMPLATE_FILE) if (folder / name).is_file()]
    templates = folder / TEMPLATE_FOLDER
    if templates.is_dir():
        names += [f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted(templates.iterdir()) if is_template(path.name) and path.is_file()]
    return {name: folder / name for name in names}


def _checked(path: Path) -> Path:
    real = followed(path)
    check_fetched(real)
    if real.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path} has more than {_MOST_BYTES >> 20} MiB, which no tokenizer needs")
    return real


def _cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those within it, without what names files and what is useless."""
    kept = ((name, value) for name, value in config.items() if name not in _USELESS and not _names_files(name))
    return {name: _cleaned(value) if isinstance(value, dict) else value for name, value in kept}


def _names_files(name: str) -> bool:
    return name in _NAMING or name.endswith(_NAMING_ENDINGS)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
