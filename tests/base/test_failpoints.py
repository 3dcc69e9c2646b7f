"""Failpoints: off, they do nothing; on, what happens at them happens to whoever passes."""

from __future__ import annotations

import pytest

from flexgen.base import failpoints
from flexgen.base.failpoints import failpoint, switch_on


def test_off() -> None:
    failpoint("store.commit")


def test_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_hook", None)  # restored afterwards
    passed: list[str] = []
    switch_on(passed.append)
    failpoint("store.commit")
    failpoint("disk.read")
    assert passed == ["store.commit", "disk.read"]

    def fail(name: str) -> None:
        raise OSError(name)

    switch_on(fail)
    with pytest.raises(OSError, match=r"engine\.pass"):
        failpoint("engine.pass")
