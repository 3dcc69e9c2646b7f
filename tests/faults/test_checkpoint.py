"""A checkpoint that somebody writes to while a run reads it: the run stops before a token comes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen import LLM, SamplingParams, StorageError
from flexgen.plan.workload import Workload


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\x7f" * 64)


def replace(path: Path) -> None:
    """As a download does, by another file: what is open stays what it was."""
    copy = path.with_suffix(".new")
    copy.write_bytes(b"another checkpoint")
    copy.replace(path)


@pytest.mark.parametrize(("change", "stops"), [(truncate, True), (overwrite, True), (replace, False)])
def test_a_checkpoint_that_changes_while_it_is_read(novels_opt: Path, tmp_path: Path, change: Callable[[Path], None], stops: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(novels_opt, folder)
    with LLM(folder, dtype="float32", device="cpu", weights="disk=1", max_num_seqs=1) as llm:
        requests = llm.model.token_requests(0, [5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        workload = Workload(prompt_lens=(3,), output_lens=(6,))
        (wanted,) = llm.stream(requests, workload)
        num_tokens: list[int] = []

        def on_pass(live: object) -> None:
            num_tokens.append(1)
            if len(num_tokens) == 2:
                change(folder / "model.safetensors")

        stream = llm.stream(requests, workload, on_pass=on_pass)
        if stops:
            with pytest.raises(StorageError, match=r"model\.safetensors changed while it was being read"):
                list(stream)
            assert len(num_tokens) == 2
        else:
            assert [result.token_ids for result in stream] == [wanted.token_ids]
