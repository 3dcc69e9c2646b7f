"""`flexgen convert` and `flexgen cache`: what they print, and how they end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from flexgen.cli import app
from flexgen.cli.exit_codes import ExitCode
from flexgen.quantize.cache import cached_conversion
from flexgen.quantize.record import locked
from flexgen.quantize.settings import QuantizeSettings
from tests.quantize.reading import made


def killed(*_: object) -> None:
    raise OSError(28, "No space left on device")


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
        (("--group-size", 48), "--group-size 48 is not supported"),
        (("--group-size", 0), "--group-size 0 is not supported"),
        (("--int8", "nothing.*"), "--int8 'nothing.*' matches no tensor that is rounded"),
        (("--shard-size", "2"), "--shard-size '2' is less than 1.0 MiB; did you mean 2MiB? (a number without a unit is bytes)"),
        (("--shard-size", "1MB"), "--shard-size '1MB' is less than 1.0 MiB\n"),
        (("--keep", "nothing.*"), "--keep 'nothing.*' matches no stored tensor"),
    ],
    ids=["format", "group", "no group", "int8", "shard", "shard with a unit", "keep"],
)
def test_flags_that_cannot_be_honoured(model: Path, tmp_path: Path, flags: tuple[object, ...], said: str) -> None:
    done = flexgen("convert", model, "-o", tmp_path / "out", *flags)
    assert done.exit_code == ExitCode.USAGE
    assert said in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_conversion_that_was_killed_is_completed_by_the_command_that_the_refusal_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my out"
    asked = ("--weight-format", "int4", "--group-size", 32, "--keep", "*.o_proj.*", "--int8", "*.down_proj.*", "--shard-size", "2MB")
    with monkeypatch.context() as patched:
        patched.setattr("flexgen.quantize.convert._Writing.add_small_files", killed)
        assert flexgen("convert", model, "-o", out, *asked).exit_code == ExitCode.RESUMABLE
    refused = flexgen("plan", out, "--machine", "t4-gcp")
    assert refused.exit_code == ExitCode.REFUSED
    found = re.search(r"is a conversion that was not finished, so it is not a model yet: `flexgen (.*)` goes on", refused.stderr)
    assert found is not None, refused.stderr
    assert flexgen(*shlex.split(found[1])).exit_code == 0
    assert flexgen("plan", out, "--machine", "t4-gcp").exit_code == 0


def test_the_command_that_completes_a_conversion_has_all_that_the_first_one_had(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that are in a low-bit format already, too, and from another folder than that of the first one."""
    monkeypatch.chdir(tmp_path)
    assert flexgen("convert", model, "-o", "once", "--weight-format", "int8", "--group-size", 32).exit_code == 0
    asked = (
        "--weight-format", "int4", "--group-size", 32, "--keep", "*.o_proj.*", "--int8", "*.down_proj.*", "--shard-size", "2MB",
        "--allow-requantize", "--quantize-head",
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr("flexgen.quantize.convert._Writing.add_small_files", killed)
        assert flexgen("convert", "once", "-o", tmp_path / "twice", *asked).exit_code == ExitCode.RESUMABLE
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    refused = flexgen("plan", "../twice", "--machine", "t4-gcp")
    found = re.search(r"is a conversion that was not finished, so it is not a model yet: `flexgen (.*)` goes on", refused.stderr)
    assert found is not None, refused.stderr
    words = shlex.split(found[1])
    known = {flag for each in get_command(app).commands["convert"].params for flag in each.opts if flag.startswith("--")}
    assert {*words} >= known - {
        "--output",
        "--progress",
        "--revision",
    }  # -o is there, progress is no part of it, only a hub model has revisions
    assert flexgen(*words).exit_code == 0
    assert flexgen("plan", "../twice", "--machine", "t4-gcp").exit_code == 0


def test_a_head_that_cannot_be_converted_names_the_flag(tmp_path: Path) -> None:
    made(tmp_path / "model", tie_word_embeddings=True)
    done = flexgen("convert", tmp_path / "model", "-o", tmp_path / "out", "--quantize-head")
    assert (done.exit_code, "flexgen: --quantize-head: the head shares its numbers" in done.stderr) == (ExitCode.USAGE, True), done.stderr


def test_an_output_that_is_no_folder_is_a_wrong_command_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    done = flexgen("convert", model, "-o", tmp_path / "file")
    assert (done.exit_code, f"--output {tmp_path / 'file'} is not a folder" in done.stderr) == (ExitCode.USAGE, True), done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    done = flexgen("convert", model, "-o", tmp_path / "no" / "out")
    assert (done.exit_code, f"there is no folder {tmp_path / 'no'}" in done.stderr) == (ExitCode.USAGE, True), done.stderr
    monkeypatch.setattr("flexgen.base.files.os.access", lambda *_: False)  # whoever runs the tests may write anywhere
    done = flexgen("convert", model, "-o", tmp_path / "out")
    assert (done.exit_code, f"the folder {tmp_path} is read-only" in done.stderr) == (ExitCode.USAGE, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_were_rounded_before_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by llama.cpp; the message has both sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flexgen("convert", model, "-o", tmp_path / "int4", "--group-size", 32)
    again = ("convert", tmp_path / "int4", "-o", tmp_path / "int8", "--weight-format", "int8", "--group-size", 32)
    done = flexgen(*again)
    assert done.exit_code == ExitCode.REFUSED
    assert re.search(r"has 28 matrices in int4 already, [\d.]+ KiB; rounded again to int8 they take [\d.]+ KiB", done.stderr), done.stderr
    assert not (tmp_path / "int8").exists()
    planned = flexgen("plan", tmp_path / "int4", "--weight-format", "int4")
    assert (planned.exit_code, "in int4 already" in planned.stderr) == (ExitCode.REFUSED, True), planned.stderr
    done = flexgen(*again, "--allow-requantize")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"in int8, groups of 32, [\d.]+ KiB of weights \([\d.]+ KiB before\)", done.stdout)


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
    assert flexgen("cache", "verify", model).stdout == "1 conversion: all as it was written\n"
    config = tmp_path / "cache" / "flexgen" / "weights" / name / "config.json"
    config.unlink()
    assert f"{name}: {model} in int4, damaged: config.json is missing\n" in flexgen("cache", "ls").stdout
    assert json.loads(flexgen("cache", "ls", "--json").stdout)["state"] == "damaged: config.json is missing"
    done = flexgen("cache", "verify")
    assert (done.exit_code, f"{config} cannot be read: " in done.stderr) == (ExitCode.SOME_FAILED, True)
    assert "1 conversion: 1 damage\na damaged file that is removed is written again by the next run" in done.stdout
    assert "removed 1 conversion, " in flexgen("cache", "rm", f"{model}/").stdout
    assert "in 0 conversions" in flexgen("cache", "ls").stdout
