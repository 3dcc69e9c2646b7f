"""The begin of a run of a job: what changes answers must be as it was, and what the model may choose is chosen as it was."""

from __future__ import annotations

from flexgen.errors import JobError, OptionError
from flexgen.jobs.identity import Identity, identity_of
from flexgen.jobs.model import JobModel
from flexgen.jobs.store import Store
from flexgen.request import SamplingParams


def begin_job(
    store: Store,
    model: JobModel,
    defaults: SamplingParams,
    *,
    accept_changes: bool = False,
    identity: Identity | None = None,
    **settings: object,
) -> str:
    """Begin a run: the model goes on as the job was begun, or the run is refused.

    Args:
        store: The state of the job.
        model: The model that answers the lines.
        defaults: The sampling parameters of lines that set none.
        accept_changes: Whether to go on although the model or settings changed.
        identity: What `identity_of` returns, where the caller knows it already.
        **settings: Other settings that change answers, as JSON values.

    Returns:
        What the model was free to choose and goes on with, in words; empty where there is nothing of that kind.

    Raises:
        JobError: Something that changes answers is not as in earlier runs, and `accept_changes` is false.
    """
    resumed = _resumed(store, model, accept_changes)
    store.begin(identity or identity_of(model, defaults, **settings), model.name, accept_changes=accept_changes)
    return resumed


def _resumed(store: Store, model: JobModel, accept_changes: bool) -> str:
    begun = store.begun_with()
    try:
        return model.resume(begun) if begun is not None else ""
    except OptionError as error:
        if accept_changes:
            return ""
        raise JobError(
            f"{store.paths.name} was begun with {error}: allow that, too; --accept-changes goes on with others, --fresh starts anew, "
            "another output keeps both"
        ) from error
