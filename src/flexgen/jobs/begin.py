"""The begin of a run of a job: what changes answers must be as it was, and what the model may choose is chosen as it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from flexgen.errors import JobError, OptionError
from flexgen.hub.model_files import ModelFiles
from flexgen.jobs.database import connect, translated
from flexgen.jobs.folder import JobPaths
from flexgen.jobs.identity import Identity, changes, differing_from, identity_of
from flexgen.jobs.model import JobModel
from flexgen.jobs.store import Store
from flexgen.options import EngineOptions
from flexgen.request import SamplingParams
from flexgen.session.fingerprint import known_beforehand, stated

_BEGUN = """
SELECT value FROM facts
WHERE name = 'identity' AND (EXISTS (SELECT 1 FROM results WHERE NOT failed) OR EXISTS (SELECT 1 FROM begun))
"""


def check_begun(paths: JobPaths, files: ModelFiles, options: EngineOptions) -> None:
    """Refuse a run that is known not to go on with its job before the model is loaded, and so before its weights are converted.

    Args:
        paths: The paths of the job, whose folder the caller holds.
        files: The files of the model as they are, without a conversion.
        options: The options of the run.

    Raises:
        JobError: The weights or an option that changes answers are not as in earlier runs; `begin_job` finds what else is not.
        StorageError: The state of the job cannot be read.
    """
    begun = _begun_with(paths)
    if begun is None:
        return
    now = stated(options)
    if begun.get("load_format") == options.load_format:  # the weights are compared in the format that they had
        as_begun = options.in_formats(begun.get("weight_format", "auto"), begun.get("kv_format", "auto"))
        now = known_beforehand(files, as_begun) | now
    if found := changes(begun, now):
        raise JobError(differing_from(paths, found))


def _begun_with(paths: JobPaths) -> Mapping[str, Any] | None:
    """Return the settings that earlier runs were begun with; None where no line has an answer or is in progress."""
    if not paths.database.exists():
        return None
    with closing(connect(paths, create=True)) as connection, translated(paths.database):
        found = connection.execute(_BEGUN).fetchone()
    return None if found is None else Identity.from_json(found[0]).answers


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
    begun = _begun_with(store.paths)
    try:
        return model.resume(begun) if begun is not None else ""
    except OptionError as error:
        if accept_changes:
            return ""
        spelling = store.paths.spelling
        raise JobError(
            f"{store.paths.name} was begun with {error}: allow that, too; {spelling.accept_changes} goes on with others, {spelling.anew}"
        ) from error
