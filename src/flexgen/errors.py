"""The exception tree.  Everything that flexgen raises on purpose derives from FlexGenError.

FlexGenError
├── OptionError            an option or keyword that is unknown, malformed, or cannot be honoured
├── RequestError           one request that cannot be served (it never stops the others)
├── JobError               a job that is refused: its input, output or model is not that of the job that was begun
├── ModelError             the model folder is unusable
│   ├── UnsupportedModelError   the architecture or number format is refused by name
│   └── CheckpointError         files are missing, corrupt, unsafe, or disagree with the config
├── CapacityError          the plan does not fit the budgets
│   └── OutOfMemoryError        memory ran out while the plan was carried out
├── StorageError           an offload folder, output file or disk failed
│   └── DeliveryError           standard output did not take answers that are done and stored
├── StageError             a stage of a pipeline has ended, hangs, or failed, so that the run ends on all of them
└── EngineError            a broken invariant inside the engine (a bug: please report it)
"""

from __future__ import annotations

import errno
import os

# A disk or a quota is full, or a file may not grow.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a disk, its file system, or a server of files says that does not work.  A path that is wrong or forbidden is none of these.
_BROKEN = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EUCLEAN)


class FlexGenError(Exception):
    """Base class of every error that flexgen raises on purpose."""


class OptionError(FlexGenError):
    """An option or keyword that is unknown, malformed, or cannot be honoured."""


class RequestError(FlexGenError):
    """One request that cannot be served.

    Args:
        message: What is wrong, for the person who wrote the request.
        code: A short machine-readable reason, OpenAI's where one exists (`context_length_exceeded`).
        param: The offending field, if one field is to blame.
    """

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class JobError(FlexGenError):
    """A job that is refused as a whole: bad lines under --strict, an input or model that changed since the job began, a foreign output."""


class ModelError(FlexGenError):
    """The model folder is unusable."""


class UnsupportedModelError(ModelError):
    """The architecture or number format is not supported; the message names it and the reason."""


class CheckpointError(ModelError):
    """Weight files are missing, corrupt, unsafe, or disagree with the config."""


class CapacityError(FlexGenError):
    """The plan does not fit the budgets; the message says what is missing, in GiB, and what to change."""


class OutOfMemoryError(CapacityError):
    """Memory ran out while the plan was carried out."""


class StorageError(FlexGenError):
    """An offload folder, an output file or a disk failed."""


class StageError(FlexGenError):
    """A stage of a pipeline has ended, hangs, or failed; the message names its rank and host.  The run ends on all ranks, and can go on."""


class EngineError(FlexGenError):
    """An invariant inside the engine broke."""


def is_failure(error: BaseException) -> bool:
    """Return whether `error` means that something went wrong, and not that someone wants to stop.

    Every Exception is a failure, and so is a panic of a library written in Rust: PyO3's PanicException does not derive from Exception
    and cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out, in Python or in torch (whose CPU allocator raises a plain RuntimeError)."""
    said = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    return said or isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` says that there is no room for what is written, by itself or by what it was raised from."""
    return _comes_from(error, _NO_ROOM)


def is_disk_failure(error: BaseException) -> bool:
    """Return whether `error` says that a disk is full or does not work, by itself or by what it was raised from."""
    return _comes_from(error, (*_NO_ROOM, *_BROKEN))


def _comes_from(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Return whether the system has said one of these errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in numbers:
            return True
        cause = cause.__cause__
    return False


def no_room() -> OSError:
    """Return the error of a full disk, as a cause for those who find the disk full before they write."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_failure() -> OSError:
    """Return the error of a disk that does not work, as a cause for those whom something else than the system has told of it."""
    return OSError(errno.EIO, os.strerror(errno.EIO))
