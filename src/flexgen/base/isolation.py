"""Work for one request, isolated so that what goes wrong in it ends that request and no other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flexgen.errors import FlexGenError, RequestError, is_failure, is_out_of_memory

logger = logging.getLogger(__name__)

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


def for_one_request(serve: Callable[_Arguments, _Value], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Value | RequestError:
    """Call `serve`, and return its result or the error of the one request that it works for.

    An unexpected exception ends that request only.  It is logged with its traceback, because it is a bug, and becomes an error with
    the code "internal_error".

    Raises:
        Exception: Whatever concerns more than this request: memory that ran out, a failing disk, a broken invariant.
    """
    try:
        return serve(*args, **kwargs)
    except RequestError as error:
        return error
    except BaseException as error:
        if not is_failure(error) or isinstance(error, (FlexGenError, OSError)) or is_out_of_memory(error):
            raise
        logger.exception("a request ends with an error that is a bug in flexgen; please report it")
        return RequestError(f"{type(error).__name__}: {error}", code="internal_error")
