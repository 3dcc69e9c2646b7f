"""`flexgen map`: a table in, the table with its answers out, by the job engine.  One test has a real model, the others a fake engine."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import POISON, FakeEngine, fake_text
from typer.testing import CliRunner

from flexgen import LLM, cli
from flexgen.errors import EngineError

HANGS_SECONDS = 120
ASK = ("--prompt", "{text}:", "--max-tokens", 4)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text("id,text\n007,abc\n8,de\n9,\n")
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.csv"


def flexgen(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def rows(output: Path) -> list[dict[str, str]]:
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(output: Path) -> list[dict[str, Any]]:
    """The lines of the job."""
    return [json.loads(line) for line in (output.with_name(output.name + ".flexgen") / "input").read_text().splitlines()]


def answered(text: str) -> str:
    return fake_text(f"{text}:", 4)


def test_a_column_of_answers(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert done.exit_code == 0, done.output
    assert output.read_text() == f"id,text,answer,error\n007,abc,{answered('abc')},\n8,de,{answered('de')},\n9,,{answered('')},\n"
    assert f"{table}: 3 lines, 0 of them bad, 0 done before, 3 to answer" in done.stderr
    assert 'greedy, stop ["\\n"], 4 tokens' in done.stderr
    assert f"{output}: 3 of 3 lines answered, 0 with errors" in done.stdout
    assert lines(output) == [{"id": number, "prompt": f"{text}:"} for number, text in enumerate(("abc", "de", ""), start=1)]
    again = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (again.exit_code, "nothing was left to do" in again.stderr, len(engines)) == (0, True, 1)


def test_answers_that_were_cut_are_counted(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert "3 of 3 answers were cut because they reached the most tokens" in done.stderr


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
def test_every_format_becomes_every_other(model_folder: Path, tmp_path: Path, engines: list[FakeEngine], source: str, ending: str) -> None:
    table, output = tmp_path / f"in{source}", tmp_path / f"out{ending}"
    given = pa.table({"text": ["abc", "de"], "n": pa.array([1, 2], pa.int16())})
    if source == ".parquet":
        pq.write_table(given, table)
    elif source == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in given.to_pylist()))
    else:
        table.write_text("text,n\nabc,1\nde,2\n")
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert done.exit_code == 0, done.output
    if ending == ".parquet":
        found = pq.read_table(output)
        assert found.schema.field("n").type == {".parquet": pa.int16(), ".jsonl": pa.int64(), ".csv": pa.string()}[source]
        answers = found.column("answer").to_pylist()
    elif ending == ".jsonl":
        answers = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as file:
            answers = [row["answer"] for row in csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")]
    assert answers == [answered("abc"), answered("de")]


def test_choices_and_probabilities(model_folder: Path, table: Path, output: Path, scorers: list[FakeEngine]) -> None:
    flags = ("--prompt", "{text}:", "--choices", "yes, no", "--probabilities", "--answer-column", "label", "--error-column", "why")
    done = flexgen("map", model_folder, table, "-o", output, *flags)
    assert done.exit_code == 0, done.output
    for row in rows(output):
        assert float(row["label_yes"]) + float(row["label_no"]) == pytest.approx(1)
        assert row["label"] == ("yes" if float(row["label_yes"]) >= float(row["label_no"]) else "no")
        assert row["why"] == ""
    assert lines(output)[0] == {"id": 1, "prompt": "abc:", "choices": [" yes", " no"]}
    assert re.search(r": 3 lines, 0 of them bad, 0 done before, 3 to answer by \d+ requests: ", done.stderr)


def test_one_row_is_told_in_the_singular(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    table.write_text("text\nabc\n")
    done = flexgen("map", model_folder, table, "-o", output, "--prompt", "{text}:", "--max-tokens", 1)
    assert f"{table}: 1 line, 0 of them bad, 0 done before, 1 to answer: 4 prompt and at most 1 output token\n" in done.stderr
    assert 'greedy, stop ["\\n"], 1 token (' in done.stderr
    assert "1 of 1 answer was cut because it reached the most tokens" in done.stderr
    assert "1 of 1 line done (0 with errors), 0 in progress; 4 prompt and 1 output token\n" in flexgen("status", output).stdout


def test_choices_of_a_real_model(novels_opt: Path, table: Path, output: Path) -> None:
    flags = ("--prompt", "{text} and he", "--choice", "went", "--choice", " of the", "--probabilities", "--host-mem", "2GiB")
    done = flexgen("map", novels_opt, table, "-o", output, *flags)
    assert done.exit_code == 0, done.output
    with LLM(novels_opt, host_mem="2GiB") as llm:
        wanted = llm.classify([f"{text} and he" for text in ("abc", "de", "")], [" went", " of the"])
    assert [float(row["answer_went"]) for row in rows(output)] == pytest.approx([each.outputs.probs[0] for each in wanted], rel=1e-4)
    assert [row["answer"] for row in rows(output)] == ["went"] * 3


def test_examples_come_before_each_row(model_folder: Path, table: Path, output: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"text": "x", "answer": "y"}\n')
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--examples", shots, "--system", "A {id}\\nB")
    assert done.exit_code == 0, done.output
    assert lines(output)[0]["prompt"] == "A 007\nB\n\nx: y\n\nabc:"


def test_a_chat_model_gets_messages(model_folder: Path, table: Path, output: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    chat = shutil.copytree(model_folder, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    assert flexgen("map", chat, table, "-o", output, *ASK, "--system", "S").exit_code == 0
    assert lines(output)[0]["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "abc:"}]
    plain = output.with_name("plain.csv")
    assert flexgen("map", chat, table, "-o", plain, *ASK, "--no-chat").exit_code == 0
    assert lines(plain)[0]["prompt"] == "abc:"
    done = flexgen("map", model_folder, table, "-o", output.with_name("no.csv"), *ASK, "--chat")
    assert (done.exit_code, "has no chat template" in done.stderr) == (2, True)


def test_what_ends_an_answer(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    whole = answered("abc")
    assert flexgen("map", model_folder, table, "-o", output, *ASK, "--stop", whole[2], "--stop", "\\n\\n").exit_code == 0
    assert rows(output)[0]["answer"] == whole[: whole.index(whole[2])]
    done = flexgen("map", model_folder, table, "-o", output.with_name("b.csv"), *ASK, "--stop", "")
    assert "defaults of lines that leave them out: greedy, 4 tokens" in done.stderr


@pytest.mark.usefixtures("kept_rates")
def test_dry_run(model_folder: Path, table: Path, output: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text() + "10,four\n")
    done = flexgen("map", model_folder, table, "-o", output, "--prompt", "Text: {text}\\nLabel:", "--choices", "yes,no", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "-- row 1 " in done.stdout
    assert "\nText: abc\nLabel:\n-- answers: ' yes', ' no'\n" in done.stdout
    assert "-- row 3 " in done.stdout
    assert "four" not in done.stdout
    assert "plan: cpu" in done.stdout
    assert f"{table}: 4 lines" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


@pytest.mark.usefixtures("kept_rates")
def test_dry_run_of_a_chat(model_folder: Path, table: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--chat-template", tmp_path / "t.jinja", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "\n<user>abc:<assistant>\n" in done.stdout


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def test_a_schema_becomes_columns(
    model_folder: Path, table: Path, output: Path, tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What guides the generation is left out of the lines, and the answers are written by hand."""
    from flexgen.tables.task import Task

    monkeypatch.setattr(Task, "constraint", property(lambda task: {}))
    texts = iter(['{"name": "Ada", "age": 36}', '{"name": "B', "[1]"])
    monkeypatch.setattr("flexgen.api.plain.PlainForm._choice", lambda *_: {"text": next(texts), "finish_reason": "length"})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--schema", tmp_path / "schema.json", "--raw")
    assert done.exit_code == 1, done.output
    assert output.read_text().startswith("id,text,answer,name,age,error\n")
    found = {row["answer"]: (row["name"], row["age"], row["error"]) for row in rows(output)}
    assert found['{"name": "Ada", "age": 36}'] == ("Ada", "36", "")
    assert found['{"name": "B'][2].endswith("it was cut: more tokens may help")
    assert found["[1]"] == ("", "", "the answer is not a JSON object but [1]")
    assert "2 of 3 rows have an error, which stands in their row" in done.stderr
    assert "1 of 3 lines answered, 2 with errors; the same command with --retry-errors tries those again" in done.stdout
    assert "3 of 3 lines done (2 with errors)" in flexgen("status", output).stdout
    records = [json.loads(line) for line in flexgen("export", output, "--to", "-").stdout.splitlines()]
    assert sorted((record["text"], record.get("error", {}).get("code")) for record in records) == [
        ("[1]", "invalid_answer"),
        ('{"name": "Ada", "age": 36}', None),
        ('{"name": "B', "invalid_answer"),
    ]


def test_answers_that_do_not_fit_can_be_retried(
    model_folder: Path, table: Path, output: Path, tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgen.tables.task import Task

    monkeypatch.setattr(Task, "constraint", property(lambda task: {}))
    texts = iter(["7", "cut", "8", "again", "9", "10"])
    monkeypatch.setattr("flexgen.api.plain.PlainForm._choice", lambda *_: {"text": next(texts), "finish_reason": "length"})
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    command = ("map", model_folder, table, "-o", output, "--prompt", "{text}:", "--schema", tmp_path / "schema.json", "--max-tokens")
    assert flexgen(*command, 4).exit_code == 1
    first = sorted(row["answer"] for row in rows(output))
    assert first == ["", "7", "8"]
    again = flexgen(*command, 4)
    assert (again.exit_code, "nothing was left to do" in again.stderr, len(engines)) == (1, True, 1), again.output
    assert flexgen(*command, 4, "--retry-errors").exit_code == 1
    assert flexgen(*command, 8, "--retry-errors").exit_code == 3
    done = flexgen(*command, 8, "--retry-errors", "--accept-changes")
    assert (done.exit_code, sorted(row["answer"] for row in rows(output))) == (0, ["7", "8", "9"]), done.output
    assert [engine.num_pulled for engine in engines] == [3, 1, 1]


def test_an_answer_that_was_cut_before_it_matched(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--regex", "[a-z]{6}")
    assert done.exit_code == 1, done.output
    said = "the answer was cut before it matched the pattern: more tokens may help"
    assert [(row["answer"], row["error"]) for row in rows(output)] == [("", said)] * 3
    assert flexgen("map", model_folder, table, "-o", output.with_name("b.csv"), *ASK, "--regex", "[a-z]+").exit_code == 0
    assert rows(output.with_name("b.csv"))[0]["answer"] == answered("abc")


# -- text that is not Unicode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_half_of_a_surrogate_pair_is_not_lost(model_folder: Path, tmp_path: Path, engines: list[FakeEngine], ending: str) -> None:
    table, output = tmp_path / "in.jsonl", tmp_path / f"out{ending}"
    table.write_text('{"text": "abc", "note": "a\\ud800b"}\n{"text": "de", "note": "\u00fc"}\n')
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert done.exit_code == 0, done.output
    if ending == ".jsonl":
        notes = [json.loads(line)["note"] for line in output.read_text().splitlines()]
    elif ending == ".parquet":
        notes = pq.read_table(output).column("note").to_pylist()
    else:
        with output.open(newline="", encoding="utf-8") as file:
            notes = [row["note"] for row in csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")]
    assert notes == (["a\ud800b", "\u00fc"] if ending == ".jsonl" else ["a\\ud800b", "\u00fc"])
    assert ("1 of 2 rows has half of a surrogate pair" in done.stderr) == (ending != ".jsonl")


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_half_of_a_surrogate_pair_in_a_prompt(model_folder: Path, tmp_path: Path, engines: list[FakeEngine], ending: str) -> None:
    table, output = tmp_path / "in.jsonl", tmp_path / f"out{ending}"
    table.write_text('{"text": "abc"}\n{"text": "a\\udc00b"}\n')
    said = "the prompt has half of a surrogate pair (\\udc00), which is no character"
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (done.exit_code, f"row 2: {said}" in done.stderr, engines) == (3, True, []), done.stderr
    assert flexgen("map", model_folder, table, "-o", output, *ASK, "--keep-going").exit_code == 1
    found = pq.read_table(output).to_pylist() if ending == ".parquet" else None
    if ending == ".jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["error"] or None for row in found or rows(output)] == [None, said]


# -- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "{texts}"], "in.csv has no column 'texts', which the prompt uses; there are 'id', 'text'; did you mean 'text'?"),
        (["--prompt", "{text}", "--answer-column", "id"], "has a column 'id' already, and it is not overwritten: give --answer-column"),
        (["--prompt", "{text}", "--choices", "a,b", "--choice", "c"], "--choices and --choice"),
        (["--prompt", "{text}", "--choices", "a,a"], "twice"),
        (["--prompt", "{text}", "--choices", 'a,"b'], "double quotes go around a whole choice"),
        (["--prompt", "{text}", "--choices", '"a" b,c'], "double quotes go around a whole choice"),
        (["--prompt", "{text}", "--choices", "a,,b"], "choices: one of them is empty"),
        (["--prompt", "{text}", "--choices", ""], "choices: one of them is empty"),
        (["--prompt", "{text}", "--probabilities"], "give choices"),
        (["--prompt", "{text}", "--examples", "none.csv"], "--examples none.csv: there is no such file"),
        (["--prompt", "{text}", "--schema", "none.json"], "--schema none.json: there is no such file"),
        (["--prompt", "{text}", "--regex", "("], "flexgen: --regex: the regular expression '(' cannot be used: "),
        (
            ["--prompt", "{text}", "--regex", "[^\\s\\S]"],
            "--regex: the regular expression '[^\\s\\S]' cannot be used: nothing meets it",
        ),
        (["--prompt", "{text}", "--template", "mustache"], "known: auto, braces, jinja"),
        (["--prompt", '{"label": {text}}'], "stands alone"),
        (["--prompt", "{text}", "--format", "xlsx"], "known: csv, tsv, parquet, jsonl"),
        (["--prompt", "{text}", "--temperature", "-1"], "--temperature -1"),
        (["--prompt", "no column"], "names no column"),
        (["--prompt", "{text}\udcff"], "--prompt: it has half of a surrogate pair (\\udcff), which is no character"),
        (["--prompt", "{text}", "--choices", "a,\udcff"], "choices: it has half of a surrogate pair"),
        (["--prompt", "{text}", "--output-format", "xlsx"], "known: csv, tsv, parquet, jsonl"),
        ([], "--prompt"),
    ],
)
def test_usage_errors(
    model_folder: Path, table: Path, output: Path, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = flexgen("map", model_folder, table, "-o", output, *flags)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


BAD_SCHEMAS = {
    "{": "--schema schema.json: Expecting property name",
    "[1]": "--schema schema.json: a JSON schema is an object",
    "\udcff": "--schema schema.json: it is not UTF-8 (0xff at byte 0)",
    '{"type": "strnig"}': "--schema: the JSON schema cannot be used: ",
    '{"type": "array", "minItems": 3, "maxItems": 2}': "--schema: the JSON schema cannot be used: nothing meets it",
    '{"$ref": "#"}': "--schema: the JSON schema cannot be used: nothing meets it, because what it asks for always contains itself",
}


@pytest.mark.parametrize(("schema", "said"), BAD_SCHEMAS.items(), ids=range(len(BAD_SCHEMAS)))
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_schema_that_cannot_be_used_is_refused_once(
    model_folder: Path, table: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine],
    schema: str, said: str, more: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text(schema, errors="surrogateescape")
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--schema", "schema.json", *more)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("cannot be used") <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "schema.json"]
    assert engines == []


def test_a_pattern_is_refused_though_the_first_row_has_no_prompt(model_folder: Path, tmp_path: Path, output: Path) -> None:
    table = tmp_path / "in.jsonl"
    table.write_text('{"texts": "x"}\n{"text": "de"}\n')
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--regex", "(", "--keep-going")
    assert (done.exit_code, "--regex: the regular expression" in done.stderr) == (2, True), done.stderr
    assert not output.exists()


BAD_SHOTS = {
    "shots.csv": [
        ("text,answer\n", [], "--examples shots.csv: it has no rows"),
        ("", [], "--examples shots.csv is empty"),
        ("text,answer\nx,y\nz,\n", [], "--examples shots.csv: row 2: the column 'answer' with the answer is empty"),
        ("text,label\nx,y\n", [], "--examples shots.csv: row 1: there is no column 'answer'"),
        ("answer\ny\n", [], "--examples shots.csv: row 1: the row has no column 'text'"),
        ("text,answer\nx,yes\nz,maybe\n", ["--choices", "yes,no"], "--examples shots.csv: row 2: the answer 'maybe' is not one of"),
        ("text,answer\nx,ab\nz,b1\n", ["--regex", "[a-z]+"], "--examples shots.csv: row 2: the answer 'b1' does not match '[a-z]+'"),
        ("text,answer\nx,3\nz,x\n", ["--schema", "SCHEMA"], "--examples shots.csv: row 2: the answer 'x' does not follow the schema"),
    ],
    "shots.jsonl": [
        ("", [], "--examples shots.jsonl has no rows"),
        ('{"text": "x", "answer": "y"}\n{"text": 1', [], "--examples shots.jsonl: line 2 is not a row"),
        ('{"text": "x", "answer": null}\n', [], "--examples shots.jsonl: row 1: the column 'answer' with the answer is empty"),
    ],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BAD_SHOTS.items() for case in range(len(cases))])
def test_examples_that_cannot_be_are_told_before_anything_runs(
    model_folder: Path, table: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, case: int
) -> None:
    monkeypatch.chdir(tmp_path)
    content, flags, said = BAD_SHOTS[name][case]
    Path(name).write_text(content)
    Path("schema.json").write_text('{"type": "integer"}')
    asked = ["--prompt", "{text}:", *("schema.json" if flag == "SCHEMA" else flag for flag in flags)]
    done = flexgen("map", model_folder, table, "-o", output, *asked, "--examples", name)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    assert not output.exists()
    assert not output.with_name("out.csv.flexgen").exists()


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [
        ("yes, no", [" yes", " no"]),
        ('"Yes, sir",No', [" Yes, sir", " No"]),
        ('"He said ""no""", \'x\'', [' He said "no"', " 'x'"]),
        ('5" disk,"a b" ', [' 5" disk', " a b"]),
        ('" of the",b', [" of the", " b"]),
    ],
)
def test_choices_between_commas(
    model_folder: Path, table: Path, output: Path, scorers: list[FakeEngine], choices: str, wanted: list[str]
) -> None:
    done = flexgen("map", model_folder, table, "-o", output, "--prompt", "{text}:", "--choices", choices)
    assert done.exit_code == 0, done.output
    assert lines(output)[0]["choices"] == wanted


def test_choices_may_be_repeated(model_folder: Path, table: Path, output: Path, scorers: list[FakeEngine]) -> None:
    done = flexgen("map", model_folder, table, "-o", output, "--prompt", "{text}:", "--choices", "a,b", "--choices", "c")
    assert done.exit_code == 0, done.output
    assert lines(output)[0]["choices"] == [" a", " b", " c"]


def test_steps_are_told_from_the_beginning(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--progress", "plain")
    first, second = done.stderr.splitlines()[:2]
    assert (first, second) == ("loading libraries ...", f"opening {table} ...")


def test_paths_that_cannot_be(model_folder: Path, table: Path, output: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    (tmp_path / "in.xlsx").write_bytes(b"PK")
    for model, given, target, said in (
        (model_folder, "-", output, "TABLE is read several times"),
        (model_folder, tmp_path / "none.csv", output, "there is no such file"),
        (table, model_folder, output, "the model comes first"),
        (model_folder, pipe, output, "give a file in place of a pipe"),
        (model_folder, tmp_path / "in.xlsx", output, "the ending of a table's name is one of"),
        (model_folder, table, "-", "OUTPUT is a file"),
        (model_folder, table, table, "is the input; give another output"),
        (model_folder, table, tmp_path / "out.xlsx", "--output"),
        (model_folder, table, tmp_path / "none" / "out.csv", "there is no folder"),
    ):
        done = flexgen("map", model, given, "-o", target, *ASK)
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr


BAD_TABLES = {
    "bytes.csv": (b"id,text\n1,\xff\n", "is not UTF-8"),
    "empty.csv": (b"", "is empty"),
    "twice.csv": (b"text,text\na,b\n", "two columns are called 'text'"),
    "long.csv": (b"text\na,b\n", "row 1, which begins 'a', has 2 cells, and the header has 1 column: "),
    "cut.csv.gz": (gzip.compress(b"text\nabc\n")[:-9], "cannot be read"),
    "empty.jsonl": (b"", "has no rows with columns"),
    "array.jsonl": (b"[1]\n", "line 1 is not a row"),
    "name.jsonl": (b'{"text": "a", "\\ud800": 1}\n', "the name of the column '\\ud800' has half of a surrogate pair"),
    "not.parquet": (b"PAR1", "cannot be read as a Parquet file"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_cannot_be_read(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine], name: str) -> None:
    content, said = BAD_TABLES[name]
    (tmp_path / name).write_bytes(content)
    done = flexgen("map", model_folder, tmp_path / name, "-o", output, *ASK)
    assert (done.exit_code, said in done.stderr, engines) == (3, True, []), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_columns_that_the_output_cannot_hold(model_folder: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n')
    done = flexgen("map", model_folder, tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet", *ASK)
    assert (done.exit_code, "a column has values of different types" in done.stderr, engines) == (3, True, []), done.stderr


def test_examples_that_cannot_be_read(model_folder: Path, table: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "shots.csv.gz").write_bytes(gzip.compress(b"text,answer\na,b\n")[:-9])
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--examples", tmp_path / "shots.csv.gz")
    assert (done.exit_code, f"--examples {tmp_path / 'shots.csv.gz'} cannot be read" in done.stderr) == (2, True), done.stderr


def test_rows_without_a_prompt_are_told_before_anything_runs(
    model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]
) -> None:
    table = tmp_path / "in.jsonl"
    table.write_text('{"text": "abc"}\n{"texts": "x"}\n{"text": "de"}\n')
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (done.exit_code, "row 2: the row has no column 'text'" in done.stderr) == (3, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    assert engines == []
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--keep-going")
    assert done.exit_code == 1, done.output
    assert [row["answer"] for row in rows(output)] == [answered("abc"), "", answered("de")]
    assert [row["error"] for row in rows(output)] == ["", "the row has no column 'text'", ""]
    assert "1 of 3 rows has an error" in done.stderr


def test_what_no_row_can_have_is_refused(model_folder: Path, table: Path, output: Path, tmp_path: Path) -> None:
    """A name that no line may have, in place of a constraint that cannot be served."""
    from flexgen.tables.task import Task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "constraint", property(lambda task: {"structured_inputs": {"regex": task.regex}}))
        done = flexgen("map", model_folder, table, "-o", output, *ASK, "--regex", "[a-z]+")
    assert (done.exit_code, "--regex: unknown field 'structured_inputs'" in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


# -- interrupted, changed, repeated -----------------------------------------------------------------------------------------------------


def test_a_failure_leaves_a_table_and_the_same_command_goes_on(
    model_folder: Path, table: Path, output: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_text("text\n" + "".join(f"{'x' * (number % 9)}\n" for number in range(1, 41) if number % 9))
    wanted = [answered("x" * (number % 9)) for number in range(1, 41) if number % 9]
    answer = FakeEngine._answer

    def failing(engine: FakeEngine, request: Any) -> Any:
        if len(engine.results) == 10:
            raise EngineError("the disk is gone")
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", failing)
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert done.exit_code == 75, done.output
    found = rows(output)
    assert len(found) == len(wanted)
    assert [row["answer"] or expected for row, expected in zip(found, wanted, strict=True)] == wanted
    assert sum(row["error"] == "not answered yet" for row in found) == len(wanted) - 10
    monkeypatch.setattr(FakeEngine, "_answer", answer)
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert done.exit_code == 0, done.output
    assert [(row["answer"], row["error"]) for row in rows(output)] == [(each, "") for each in wanted]
    assert sum(engine.num_pulled for engine in engines) < len(wanted) + 10


KILLED = """
import os, signal, sys
import flexgen.session.session, flexgen.jobs.store, flexgen.cli, fakes
class Engine(fakes.FakeEngine):
    def generate(self, requests, on_progress=None, **more):
        for count, result in enumerate(super().generate(requests, on_progress=on_progress, **more), 1):
            yield result
            if count == 600:
                os.kill(os.getpid(), signal.SIGKILL)
flexgen.session.session.open_engine = lambda files, options, workload: Engine(workload, max_num_seqs=64)
flexgen.jobs.store._COMMIT_RESULTS = 50
flexgen.cli.main()
"""


def test_killed_and_resumed(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    table = tmp_path / "in.parquet"
    texts = ["x" * (number * 7 % 19) + "y" * (number % 5) for number in range(1000)]
    pq.write_table(pa.table({"n": pa.array(range(1000), pa.int32()), "text": texts}), table)
    command = ["map", str(model_folder), str(table), "-o", str(output.with_suffix(".parquet")), *map(str, ASK)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, timeout=HANGS_SECONDS, env=env, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not output.with_suffix(".parquet").exists()
    done = flexgen(*command)
    assert done.exit_code == 0, done.output
    found = pq.read_table(output.with_suffix(".parquet"))
    assert found.column("n").to_pylist() == list(range(1000))
    assert found.schema.field("n").type == pa.int32()
    assert found.column("answer").to_pylist() == [answered(text) for text in texts]
    assert engines[0].num_pulled < 1000  # what was stored before the kill is not answered again


def test_changes_are_refused_unless_accepted(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    before = output.read_bytes()
    other = ("--prompt", "{text}!", "--max-tokens", 4)
    done = flexgen("map", model_folder, table, "-o", output, *other)
    assert (done.exit_code, "3 lines that were answered differ" in done.stderr) == (3, True), done.stderr
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--stop", "q")
    assert (done.exit_code, "begun with default stop" in done.stderr) == (3, True), done.stderr
    assert output.read_bytes() == before
    table.write_text(table.read_text().replace("de", "fg"))
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 3
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--accept-changes")
    assert done.exit_code == 0, done.output
    assert [row["answer"] for row in rows(output)] == [answered(text) for text in ("abc", "fg", "")]
    assert [engine.num_pulled for engine in engines] == [3, 1]
    assert flexgen("map", model_folder, table, "-o", output, *other, "--fresh").exit_code == 0
    assert rows(output)[0]["answer"] == fake_text("abc!", 4)


def test_rows_at_the_end_are_added(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    table.write_text(table.read_text() + "10,hi\n")
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    assert rows(output)[3] == {"id": "10", "text": "hi", "answer": answered("hi"), "error": ""}
    assert [engine.num_pulled for engine in engines] == [3, 1]


def test_errors_can_be_retried(
    model_folder: Path, table: Path, output: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fakes.POISON", 67)  # d
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (done.exit_code, [bool(row["error"]) for row in rows(output)]) == (1, [False, True, False])
    monkeypatch.setattr("fakes.POISON", POISON)
    assert flexgen("map", model_folder, table, "-o", output, *ASK, "--retry-errors").exit_code == 0
    assert rows(output)[1]["answer"] == answered("de")


def test_a_foreign_output_is_not_replaced(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    output.write_text("mine\n")
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (done.exit_code, output.read_text()) == (3, "mine\n")


def test_status_and_export(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine], tmp_path: Path) -> None:
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    assert "3 of 3 lines done" in flexgen("status", output).stdout
    wanted = output.read_bytes()
    output.unlink()
    assert flexgen("export", output).exit_code == 0
    assert output.read_bytes() == wanted
    done = flexgen("export", output, "--to", tmp_path / "other.jsonl")
    assert (done.exit_code, len((tmp_path / "other.jsonl").read_text().splitlines())) == (0, 3)
    assert [json.loads(line)["index"] for line in flexgen("export", output, "--to", "-").stdout.splitlines()] == [1, 2, 3]
    done = flexgen("export", output, "--order", "done")
    assert (done.exit_code, "whose rows have their own order" in done.stderr) == (2, True)
    table.write_text("id,text\n")
    done = flexgen("export", output)
    assert (done.exit_code, "changed since the job read it" in done.stderr) == (3, True)


def test_an_empty_table(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    table.write_text("id,text\n")
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    assert output.read_text() == "id,text,answer,error\n"


def test_a_lost_row_is_refused(model_folder: Path, table: Path, output: Path, engines: list[FakeEngine]) -> None:
    assert flexgen("map", model_folder, table, "-o", output, *ASK).exit_code == 0
    table.write_text("id,text\n")
    done = flexgen("map", model_folder, table, "-o", output, *ASK)
    assert (done.exit_code, "lines that were answered differ" in done.stderr) == (3, True), done.stderr


@pytest.mark.parametrize(
    "option", [("--max-tokens", 3), ("--stop", "x"), ("--temperature", 0.5), ("--top-p", 0.5)], ids=lambda each: each[0]
)
def test_choices_are_not_generated(option: tuple[str, object], model_folder: Path, table: Path, output: Path) -> None:
    done = flexgen("map", model_folder, table, "-o", output, "--prompt", "{text}:", "--choices", "a,b", *option)
    assert (done.exit_code, f"{option[0]} is for answers that are generated" in done.stderr) == (2, True), done.stderr
    assert not output.exists()


def test_a_column_needs_a_name(model_folder: Path, table: Path, output: Path) -> None:
    done = flexgen("map", model_folder, table, "-o", output, *ASK, "--answer-column", "")
    assert (done.exit_code, "--answer-column must be a name" in done.stderr) == (2, True), done.stderr
