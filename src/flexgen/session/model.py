"""Finds each fact about a model once per run: its config, the dtype to compute in, the budgets, and the parts to execute.

Loads torch only where a model is described.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flexgen.base.option_values import parse_passes
from flexgen.base.recorder import Recorder
from flexgen.base.steps import step
from flexgen.errors import CapacityError, FlexGenError, ModelError, OptionError, is_out_of_memory
from flexgen.hub.config import read_config, reason_of
from flexgen.hub.diagnose import other_quantization
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_tokenizer
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits
from flexgen.profile.limits import find_limits
from flexgen.session.dtypes import compute_dtype, config_dtype, has_bfloat16, without_bfloat16
from flexgen.text.defaults import token_limits
from flexgen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from flexgen.models.assemble import AssembledModel

logger = logging.getLogger(__name__)

_TOKENIZING_PARTS = 4  # of the memory that the host budget leaves, one part in so many is for the text that is tokenised
# Building a skeleton temporarily replaces functions of torch, so models are described one at a time.
DESCRIBING = threading.RLock()


class ResolvedModel:
    """The files of a model together with everything that follows from them, from the options and from this machine.

    Each fact is determined when it is first needed, and only once; all other code takes it from here.

    Args:
        files: The model's files.
        options: The options that state the device, the dtype, the budgets, and whether weights are random.

    Attributes:
        files: The model's files.
        options: The options.
        config: The transformers config.

    Raises:
        ModelError: The config is unusable.
    """

    def __init__(self, files: ModelFiles, options: EngineOptions) -> None:
        self.files, self.options = files, options
        self.config: Any = read_config(files)
        self._limits: Limits | None = None
        self._assembled: AssembledModel | None = None
        self._recorder: Recorder | None = None

    @property
    def limits(self) -> Limits:
        """The hard budgets of this process, as they were before anything was loaded.

        Raises:
            OptionError: A size cannot be read, or an option cannot be honoured on this machine.
            CapacityError: A budget is larger than the hard limit above it.
        """
        if self._limits is None:
            self._limits = find_limits(self.options)
        return self._limits

    @functools.cached_property
    def token_limits(self) -> tuple[int, int]:
        """The size of the vocabulary, and the most tokens that a prompt and its answer may have together.

        Raises:
            ModelError: The config states no vocabulary size.
            OptionError: The `max_model_len` of the options exceeds the model's context, or is needed because the model states none.
        """
        return token_limits(self.files.name, self.config, self.options.max_model_len)

    def tokenizing_bytes(self) -> int:
        """Return the memory that one text may use while it is tokenised: a part of what the host budget leaves, before there is a plan."""
        return max(self.limits.host_bytes - psutil.Process().memory_info().rss, 0) // _TOKENIZING_PARTS

    @functools.cached_property
    def dtype(self) -> str:
        """The dtype to compute in, never "auto".

        Raises:
            OptionError: As for `limits`.
            CapacityError: As for `limits`.
            ModelError: The checkpoint's dtype cannot be computed in, and the options name no other.
        """
        device = self.limits.device
        if self.options.dtype != "auto":
            return self.options.dtype
        stored, bfloat16 = config_dtype(self.config), has_bfloat16(device)
        if stored == "bfloat16" and not bfloat16:
            logger.warning(without_bfloat16("this GPU"))
        return compute_dtype(stored, device, bfloat16=bfloat16)

    def load_tokenizer(
        self, other: str | os.PathLike[str] | None = None, *, revision: str | None = None, token: str | None = None
    ) -> Tokenizer | None:
        """Load the model's own tokenizer or another one; return None if there is none.

        Args:
            other: The folder or hub id of another tokenizer.
            revision: The revision of another tokenizer on the hub; None for the default branch.
            token: The access token for the hub.

        Raises:
            OptionError: The revision is neither that of the model nor one of another tokenizer.
            ModelError: The tokenizer cannot be found or is not supported.
        """
        if other is not None:
            return Tokenizer.load(resolve_tokenizer(other, revision=revision, token=token))
        if revision is not None and revision != self.options.revision:
            raise OptionError(f"tokenizer_revision={revision!r} needs a tokenizer= of its own")
        return Tokenizer.load(self.files.folder) if self.files.has_tokenizer else None

    @property
    def kv_format(self) -> str:
        """The format of the KV cache, as in EngineOptions."""
        return self.options.kv_format

    @property
    def cpu_compute(self) -> str:
        """How linear layers are computed, as in EngineOptions."""
        return self.options.cpu_compute

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the trace that the options ask for, which all engines share; None without one.

        Raises:
            StorageError: The file cannot be written.
        """
        if self._recorder is None and self.options.trace is not None:
            passes = None if self.options.trace_passes is None else parse_passes(self.options.trace_passes)
            self._recorder = Recorder(Path(self.options.trace), passes, {"model": self.files.name})
        return self._recorder

    def end_trace(self) -> None:
        """Write the trace to its end, if there is one; no engine may be open any more."""
        if self._recorder is not None:
            self._recorder.close()

    def check(self) -> None:
        """Refuse a model that cannot be served because of its files; no weights are read.

        Raises:
            ModelError: The model cannot be served; the message names the reason.
            OptionError: As for `dtype`.
            CapacityError: As for `dtype`.
        """
        folder, dtype = self.files.folder, self.dtype
        if self.options.load_format != "dummy" and self._assembled is None:
            self._assembled = self._assemble(folder, dtype)

    def take(self, folder: Path, layers: range | None = None) -> AssembledModel:
        """Return the model, whose weights lie in `folder`, ready for an engine.

        It belongs to the caller alone, because an engine keeps weights in it. The next caller gets another one, and fresh limits, since
        memory may have been taken or freed by then.

        Args:
            folder: The folder of the weights.
            layers: The decoder layers that the engine computes, as a stage of several; None for the whole model.

        Raises:
            ModelError: The model cannot be served, or not be divided there.
        """
        assembled, self._assembled = self._assembled, None
        if assembled is None or layers is not None:
            assembled = self._assemble(folder, self.dtype, layers)
        self._limits = None
        return assembled

    def _assemble(self, folder: Path, dtype: str, layers: range | None = None) -> AssembledModel:
        """Assemble the model in a folder; quantized weights are refused as such, before they are compared with the config."""
        import torch

        from flexgen.checkpoint.stored import stored_headers
        from flexgen.formats.table import refuse_quantization
        from flexgen.kv.low_bit import kv_format
        from flexgen.models.assemble import assemble_model

        step("tracing the model's layers")
        with DESCRIBING, describing(self.files.name):
            if (tool := other_quantization(self.files.config)) is not None:
                raise refuse_quantization({"quant_method": tool})
            random, computed = self.options.load_format == "dummy", getattr(torch, dtype)
            headers = None if random else stored_headers(self.files)
            kv = kv_format(self.options.kv_format, computed)
            return assemble_model(
                folder,
                self.config,
                computed,
                name=self.files.name,
                kv_format=kv,
                headers=headers,
                cpu_compute=self.options.cpu_compute,
                sparse_attention=self.options.kept_share,
                device=self.limits.device,
                layers=layers,
            )


@contextlib.contextmanager
def describing(name: str) -> Iterator[None]:
    """Turn whatever fails while a model is described into a refusal, because its files are the reason.

    Raises:
        ModelError: An error occurred that is not one of flexgen's.
        CapacityError: Describing the model takes more memory than there is.
    """
    try:
        yield
    except FlexGenError:
        raise
    except Exception as error:
        logger.debug("%s cannot be described", name, exc_info=True)
        if is_out_of_memory(error):
            raise CapacityError(f"{name}: describing the model takes more memory than there is ({reason_of(error)})") from error
        raise ModelError(f"{name} cannot be used, because of its config.json or its weights: {reason_of(error)}") from error
