"""The callable class that Ray Data makes an actor of."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Mapping
from typing import Any, cast

from flexgen.api.vllm_types import LLMKeywords
from flexgen.base.scalars import shown_in_python
from flexgen.errors import OptionError, RequestError
from flexgen.llm import LLM
from flexgen.ray_data.assigned import Assigned, assigned, granted
from flexgen.ray_data.processors import OwnProcessors
from flexgen.request import SamplingParams
from flexgen.tables.in_memory import FrameMap, MapKeywords, make_task

logger = logging.getLogger(__name__)


class FlexGenActor:
    """Asks a model about every row of the batches of a dataset: `dataset.map_batches(FlexGenActor, fn_constructor_kwargs={...}, ...)`.

    The engine is opened for the first batch and stays open for those that follow.  Columns stay as they are, and those of the answers and
    errors are added.  A row that cannot be answered has the reason in the column of errors, and stops no other.

    In an actor of Ray, budgets that are not given and the number of threads follow from what Ray has assigned to it (see `granted`).
    Elsewhere this is an `LLM` with the defaults of one, to try what is asked on a single batch.

    Args:
        model: See `LLM`.
        prompt: See `LLM.map`.
        examples: See `LLM.map`.
        chat: See `LLM.map`.
        sampling_params: See `LLM.map`; also a dict with the fields of SamplingParams.
        tokenizer: See `LLM`.
        chat_template: See `LLM`.
        chat_template_kwargs: See `LLM`.
        **keywords: Further keywords of `LLM.map` and of `LLM`.

    Attributes:
        llm: The model.

    Raises:
        OptionError: A keyword is unknown or cannot be honoured, two contradict each other, or the actor's share of its node is unknown.
        ModelError: The model cannot be found or is not supported.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        prompt: str | None = None,
        *,
        examples: Any = None,
        chat: bool | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        _check_names(keywords)
        asked = {name: keywords.pop(name) for name in MapKeywords.__annotations__ if name in keywords}
        task, params = make_task(prompt, cast("MapKeywords", asked)), _params(sampling_params)
        share = assigned()
        with contextlib.ExitStack() as opened:
            if share is not None:
                keywords = granted(keywords, share)
                opened.enter_context(_own_processors(share))
            self.llm = opened.enter_context(
                LLM(model, tokenizer=tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs, **keywords)
            )
            self.llm.model.check()
            self._map = FrameMap(self.llm, task, examples=examples, chat=chat, params=params)
            self._opened = opened.pop_all()

    def __call__(self, batch: Any) -> Any:
        """Return a batch with the columns of the answers.

        Args:
            batch: A dict of numpy's arrays, a DataFrame of pandas or a Table of pyarrow, as `batch_format` of `map_batches` says.

        Raises:
            OptionError: A column is missing or would be overwritten.
            CapacityError: The batch does not fit the budgets.
        """
        return self._map(batch)

    def close(self) -> None:
        """Free the engine and the processors; the process of an actor may also end without it."""
        self._opened.close()


def _own_processors(share: Assigned) -> OwnProcessors:
    """Take as many processors as Ray has assigned, and have torch use as many threads: Ray may have set their number by its own rules."""
    import torch

    found = OwnProcessors(share.num_processors(len(os.sched_getaffinity(0))))
    torch.set_num_threads(len(found.numbers))
    logger.info("%s, on the processors %s", share, sorted(found.numbers))
    return found


def _check_names(keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that neither `LLM.map` nor `LLM` has, before they are sorted."""
    known = {*MapKeywords.__annotations__, *LLMKeywords.__annotations__}
    if unknown := sorted(keywords.keys() - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; known are those of LLM and LLM.map"
        raise OptionError(f"FlexGenActor has no option {unknown[0]!r}{hint}")


def _params(given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams | None:
    if given is None or isinstance(given, SamplingParams):
        return given
    if not isinstance(given, Mapping):
        raise OptionError(f"sampling_params must be SamplingParams or a dict of its fields, not {shown_in_python(given)}")
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise OptionError(f"sampling_params: {error}") from error
