"""Makes config, tokenizer and templates of the metadata of a GGUF file, by transformers' converters.

The result is a small folder in the cache, named after what it was made of.  The weights stay where they are.  transformers sees a copy of
the header only, in which every tensor is one byte long.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from flexgen.base.cache_home import cache_home
from flexgen.base.digests import digest_of
from flexgen.base.quantities import align_up
from flexgen.errors import ModelError, StorageError, UnsupportedModelError, is_failure
from flexgen.hub.config import read_config, reason_of
from flexgen.hub.gguf_configs import OWN_ARCHITECTURES, own_config
from flexgen.hub.gguf_file import DEFAULT_ALIGNMENT, MAGIC, Values
from flexgen.hub.gguf_model import GGUFModel
from flexgen.hub.gguf_rope import rope_factors, rope_scaling
from flexgen.hub.model_files import TEMPLATE_FOLDER, ModelFiles, has_tokenizer, read_json

logger = logging.getLogger(__name__)

_VERSION = 2  # of what is made
_HEADER_FILE, _NOTE_FILE = "header.gguf", "flexgen.json"
_ONE_BYTE = 24  # ggml's type of 8-bit integers
_LLAMA = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")  # a pair: a key, the type of texts, and a text
_DTYPES = {"F32": "float32", "F16": "float16"}

# What files state beyond the values that transformers reads: the end of the key -> the field of a config that has one.
_FIELDS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
# Architectures that transformers' tables name, but do not describe.
_REFUSED = {"gemma4": "the tables leave out which layers share keys, and the sizes of heads, windows and inputs of single layers"}
# Rules that llama.cpp (llama-vocab.cpp) treats as GPT-2's.
_SPLIT_AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATES = re.compile(r"tokenizer\.chat_template\.(\w{1,40})")


def gguf_model_files(name: str, model: GGUFModel, commit: str | None = None) -> ModelFiles:
    """Return a model in GGUF as if its config and tokenizer lay beside it.

    Args:
        name: The model as the user wrote it.
        model: Its headers.
        commit: The commit of a hub model.

    Raises:
        ModelError: The package `gguf` is missing, or transformers cannot make a config of the metadata.
        UnsupportedModelError: The architecture, or a variant of it, is not supported.
        StorageError: The folder cannot be written.
    """
    folder = _kept(name, model)
    notes = read_json(folder / _NOTE_FILE)
    if (note := notes.get("tokenizer")) is not None:
        logger.warning("%s: its tokenizer cannot be used (%s): give another as tokenizer=", name, note)
    elif (rule := notes.get("unknown_split")) is not None:
        logger.warning(
            "%s: its tokenizer splits text by the rule %r, which is not known here, so prompts may have other tokens than in training: "
            "give the original as tokenizer=", name, rule,
        )  # fmt: skip
    return ModelFiles(
        name=name,
        folder=folder,
        config=read_json(folder / "config.json"),
        generation_config=read_json(folder / "generation_config.json"),
        commit=commit,
        has_tokenizer=has_tokenizer(folder),
        gguf=model,
    )


def _kept(name: str, model: GGUFModel) -> Path:
    """Return the folder of a model, making it unless it is there."""
    home = cache_home() / "gguf"
    folder = home / _digest(model)
    if folder.is_dir():
        return folder
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="flexgen-gguf-") as source:
            made = Path(tempfile.mkdtemp(prefix="new-", dir=home))
            try:
                _make(name, model, Path(source), made)
                made.rename(folder)
            except BaseException as error:
                shutil.rmtree(made, ignore_errors=True)
                if isinstance(error, OSError) and folder.is_dir():  # another process was faster
                    return folder
                raise
    except OSError as error:
        raise StorageError(f"{home} cannot be written, where config and tokenizer of {name} are kept: {error}") from error
    return folder


def _digest(model: GGUFModel) -> str:
    """Return a name for what a folder is made of."""
    import transformers

    parts = [f"{_VERSION} {importlib.metadata.version('flexgen-engine')} {transformers.__version__}".encode()]
    parts += model.parts[0].pairs.values()
    parts += [f"{tensor.name} {tensor.type.name} {tensor.shape}".encode() for _, tensor in model.tensors]
    parts += [struct.pack(f"<{len(factors)}f", *factors)] if (factors := rope_factors(model)) is not None else []
    return digest_of(parts, 16)


def _make(name: str, model: GGUFModel, source: Path, folder: Path) -> None:
    (source / _HEADER_FILE).write_bytes(_header_copy(model))
    generation = _generation_config(model)
    _write(folder / "generation_config.json", generation)
    config = _config(name, model, source, folder, generation)
    _write(folder / "config.json", config)
    _write(folder / _NOTE_FILE, {"tokenizer": _write_tokenizer(model, source, folder), "unknown_split": _unknown_split(model)})


def _header_copy(model: GGUFModel) -> bytes:
    """Return a GGUF file with the metadata that transformers is to see and the names of all tensors.

    Names of models are left out, by which transformers would choose classes, and what it reads wrongly, which `_config` adds.  What it does
    not know is called a llama, and has a tokenizer only.
    """
    architecture = model.architecture
    own = architecture in OWN_ARCHITECTURES
    kept = ("general.alignment",) if own else ("general.alignment", "general.architecture")
    read = ("tokenizer.",) if own else (f"{architecture}.", "tokenizer.")
    pairs = [
        pair
        for key, pair in model.parts[0].pairs.items()
        if key in kept or (key.startswith(read) and not key.startswith(f"{architecture}.rope.scaling."))
    ]
    pairs += [_LLAMA] if own else []
    names = [tensor.name.encode() for _, tensor in model.tensors]
    entries = [struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, _ONE_BYTE, 0) for name in names]
    header = MAGIC + struct.pack("<IQQ", 3, len(entries), len(pairs)) + b"".join(pairs) + b"".join(entries)
    alignment = model.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return header.ljust(align_up(len(header), alignment) + alignment, b"\0")


def _config(name: str, model: GGUFModel, source: Path, folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json."""
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ModelError(f"{name}: reading GGUF files needs the package gguf: pip install 'flexgen-engine[gguf]'")
    _check_known(name, model)
    values = own_config(model) if model.architecture in OWN_ARCHITECTURES else _known_config(name, source)
    values |= {"dtype": _dtype(model), **_mixtral(model)}

    def checked() -> Any:
        return read_config(
            ModelFiles(name=name, folder=folder, config=values, generation_config=generation, commit=None, has_tokenizer=False)
        )

    known = checked()
    for key, field in _FIELDS.items():
        value = model.metadata.get(f"{model.architecture}.{key}")
        if isinstance(value, (int, float)) and known.to_dict().get(field) is not None:
            values[field] = value
    rotated = model.metadata.get(f"{model.architecture}.rope.dimension_count")
    if isinstance(rotated, int) and "partial_rotary_factor" in (getattr(known, "rope_parameters", None) or {}):
        values["partial_rotary_factor"] = rotated / (getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads)
    own = dict(getattr(known, "rope_parameters", None) or {})
    if (scaling := rope_scaling(model, checked())) is not None:
        values["rope_parameters"] = own | ({"full_attention": own["full_attention"] | scaling} if "full_attention" in own else scaling)
    elif own.get("rope_type", "default") != "default":  # the default of gpt-oss's class, which the file does not state
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": own["rope_theta"]}
    checked()
    return values


def _known_config(name: str, source: Path) -> dict[str, Any]:
    """Return what transformers makes of the copy of the header."""
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(str(source), gguf_file=_HEADER_FILE, local_files_only=True)
    except Exception as error:  # its reader lets through whatever a value causes
        raise ModelError(f"{name}: its metadata cannot be used: {reason_of(error)}") from error
    return {key: value for key, value in values.items() if key not in ("_commit_hash", "_model_name_or_path")}


def _mixtral(model: GGUFModel) -> dict[str, Any]:
    """Return what makes a Mixtral of the config of a llama: its files say llama, and have experts."""
    count, used = (model.metadata.get(f"llama.expert_{each}") for each in ("count", "used_count"))
    if model.architecture != "llama" or not count or all(tensor.name != "blk.0.ffn_gate_inp.weight" for _, tensor in model.tensors):
        return {}
    return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": count, "num_experts_per_tok": used}


def _check_known(name: str, model: GGUFModel) -> None:
    """Refuse an architecture that transformers' tables do not map."""
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {each.replace("_", "") for each in (*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS)}
    if (reason := _REFUSED.get(model.architecture)) is not None:
        raise UnsupportedModelError(
            f"{name}: {model.architecture} is not supported in GGUF: {reason}; take the repository that the file was made from"
        )
    if model.architecture not in OWN_ARCHITECTURES and re.sub(r"[_\-]", "", model.architecture) not in known:
        raise UnsupportedModelError(
            f"{name} is of the architecture {model.architecture!r}, whose GGUF files transformers does not map; it does those of "
            f"{', '.join(sorted({*GGUF_SUPPORTED_ARCHITECTURES, *OWN_ARCHITECTURES} - {'general', 'tokenizer', *_REFUSED}))}"
        )


def _dtype(model: GGUFModel) -> str:
    """Return the dtype to compute in: that of most bytes if they are plain numbers, otherwise bfloat16."""
    sizes: dict[str, int] = {}
    for _, tensor in model.tensors:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return _DTYPES.get(max(sizes, key=lambda each: sizes[each]), "bfloat16")


def _generation_config(model: GGUFModel) -> dict[str, Any]:
    """Return the contents of generation_config.json: special tokens, and how the maker of the file says that tokens are chosen."""
    found: dict[str, Any] = {}
    ids = [model.metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    if ends := list(dict.fromkeys(each for each in ids if type(each) is int)):
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for field, key in {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}.items():
        if type(token := model.metadata.get(f"tokenizer.ggml.{key}")) is int:
            found[field] = token
    for key, field in _SAMPLING.items():
        if isinstance(value := model.metadata.get(f"general.sampling.{key}"), (int, float)):
            found[field], found["do_sample"] = value, True
    return found


def _write_tokenizer(model: GGUFModel, source: Path, folder: Path) -> str | None:
    """Write the tokenizer and the templates that the metadata describes; return why not, or None."""
    if model.metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return "the file has none"
    from transformers import AutoTokenizer

    try:
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Values):
            raise ModelError("it has no tokens")
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source), gguf_file=_HEADER_FILE, local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(str(folder))
        settings = read_json(folder / "tokenizer_config.json")
        # tokenizer.json is the whole tokenizer; a class of the model's type would make another of its vocabulary
        _write(folder / "tokenizer_config.json", settings | {"tokenizer_class": "TokenizersBackend"})
        _write_templates(model, folder)
    except BaseException as error:  # its backends raise anything, and panic
        if not is_failure(error):
            raise
        for path in folder.glob("tokenizer*"):
            path.unlink()
        return reason_of(error)
    return None


def _unknown_split(model: GGUFModel) -> str | None:
    """Return the rule by which text is split into words before merges, if transformers would take GPT-2's in its place."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = model.metadata.get("tokenizer.ggml.pre")
    if model.metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(rule, str):
        return None
    return None if rule in GGUF_PRE_TOKENIZER_SPLITS or rule in _SPLIT_AS_GPT2 else rule[:40]


def _write_templates(model: GGUFModel, folder: Path) -> None:
    """Write the templates beside the default one, which transformers does not read."""
    for key, text in model.metadata.items():
        if (match := _TEMPLATES.fullmatch(key)) is not None and isinstance(text, str):
            (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            (folder / TEMPLATE_FOLDER / f"{match[1]}.jinja").write_text(text, encoding="utf-8")


def _write(path: Path, values: dict[str, Any]) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
