"""The folder of what can be made again: where the system says, for everything that is kept there."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen.base.cache_home import cache_home
from flexgen.quantize.cache import cache_folder


def test_the_cache_lies_where_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "flexgen"
    assert cache_folder() == tmp_path / "flexgen" / "weights"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("relative", ""):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_home() == tmp_path / "home" / ".cache" / "flexgen"
