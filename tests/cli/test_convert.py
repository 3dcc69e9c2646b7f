"""`flexgen convert` and `flexgen cache`: what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexgen.cli import app
from flexgen.cli.exit_codes import ExitCode
from flexgen.quantize.cache import cached_conversion
from flexgen.quantize.record import locked
from flexgen.quantize.settings import QuantizeSettings
from tests.quantize.reading import made


def flexgen(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made(tmp_path / "model")
    return tmp_path / "model"


def test_a_conversion_says_what_it_left_out(model: Path, tmp_path: Path) -> None:
    done = flexgen("convert", model, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'out'}: {model} in int4, groups of 32" in done.stdout
    assert "not converted, the output head: lm_head.weight" in done.stdout
    again = flexgen("convert", model, "-o", tmp_path / "out", "--group-size", 32)
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    assert flexgen("cache", "verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--weight-format", "int3"), "--weight-format 'int3' is unknown; known: int4, int8, flexgen-v0"),
        (("--group-size", 48), "group_size=48 is not supported"),
        (("--group-size", 0), "--group-size 0 is not supported"),
        (("--int8", "nothing.*"), "matches no tensor that is rounded"),
        (("--shard-size", "2"), "did you mean 2MiB"),
        (("--keep", "nothing.*"), "matches no stored tensor"),
    ],
    ids=["format", "group", "no group", "int8", "shard", "keep"],
)
def test_flags_that_cannot_be_honoured(model: Path, tmp_path: Path, flags: tuple[object, ...], said: str) -> None:
    done = flexgen("convert", model, "-o", tmp_path / "out", *flags)
    assert done.exit_code == ExitCode.USAGE
    assert said in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_model_itself_is_no_output(model: Path) -> None:
    done = flexgen("convert", model, "-o", model)
    assert done.exit_code == ExitCode.USAGE
    assert "is the model itself" in done.stderr


def test_a_folder_in_use_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = flexgen("convert", model, "-o", tmp_path / "out", "--group-size", 32)
    assert done.exit_code == ExitCode.USAGE
    assert "holds notes.txt" in done.stderr
    (tmp_path / "new").mkdir()
    with locked(tmp_path / "new"):
        done = flexgen("convert", model, "-o", tmp_path / "new", "--group-size", 32)
    assert done.exit_code == ExitCode.REFUSED
    assert "is being written by another process" in done.stderr


def test_damage_is_found_and_named(model: Path, tmp_path: Path) -> None:
    flexgen("convert", model, "-o", tmp_path / "out", "--group-size", 32)
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = flexgen("cache", "verify", tmp_path / "out")
    assert done.exit_code == ExitCode.SOME_FAILED
    assert f"{path} is damaged" in done.stderr


def test_the_cache_is_listed_verified_and_emptied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen.hub.resolve import resolve_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "in 0 conversions" in flexgen("cache", "ls").stdout
    name = cached_conversion(resolve_model(model), QuantizeSettings(group_size=32)).folder.name
    listed = flexgen("cache", "ls")
    assert f"{name}: {model} in int4" in listed.stdout
    (entry,) = map(json.loads, flexgen("cache", "ls", "--json").stdout.splitlines())
    assert (entry["name"], entry["weight_format"], entry["state"]) == (name, "int4", "complete")
    assert flexgen("cache", "verify").exit_code == 0
    assert flexgen("cache", "rm").exit_code == ExitCode.USAGE
    assert flexgen("cache", "rm", "unknown").exit_code == ExitCode.USAGE
    assert "removed 1 conversions" in flexgen("cache", "rm", name).stdout
    assert "in 0 conversions" in flexgen("cache", "ls").stdout
