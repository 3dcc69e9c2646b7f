"""A model with its weights in the format that the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexgen.hub.model_files import ModelFiles
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.checkpoint.files import Headers


def in_weight_format(files: ModelFiles, options: EngineOptions) -> ModelFiles:
    """Return the files of the model in `options.weight_format`; they are converted into the cache first if they are not there.

    Raises:
        ModelError: The weights cannot be converted.
        CapacityError: There is no room in the cache.
        StorageError: The cache cannot be written.
    """
    if options.weight_format == "auto":
        return files
    from flexgen.quantize.cache import cached_conversion
    from flexgen.quantize.settings import QuantizeSettings

    return cached_conversion(files, QuantizeSettings(weight_format=options.weight_format))


def planned_in(weight_format: str, headers: Headers, config: Any, *, name: str) -> tuple[Headers, Any]:
    """Return the headers and the transformers config that a model would have after a conversion; nothing is read or written.

    Args:
        weight_format: The format, as in EngineOptions.
        headers: The headers of the model.
        config: Its transformers config.
        name: Its name, for messages.

    Raises:
        ModelError: The conversion is not possible.
    """
    from flexgen.quantize.layout import planned
    from flexgen.quantize.settings import QuantizeSettings
    from flexgen.quantize.source import decoded_headers

    return planned(decoded_headers(headers, config), config, QuantizeSettings(weight_format=weight_format), name=name)
