"""Extraction with JSON schemas: every complete answer must be valid, and a run that is killed again and again must end in the same bytes.

    python benchmarks/extraction.py MODEL --scratch DIR [--lines 1000] [--kills 5] [-- options of flexgen run]

The lines ask for facts of generated texts in the form of one of 20 schemas (enums, bounds, patterns, formats, arrays, nested objects,
alternatives), mixed with lines that have no schema.  The job runs once in one piece, and once killed (SIGKILL) at random moments.  An
answer that ended by its length is counted as cut, and not checked.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
from record import Results

DEFAULT_RESULTS = Path(__file__).parent / "results" / "extraction.jsonl"
FREE_SHARE = 0.1  # of lines without a schema

NAME = {"type": "string", "minLength": 1, "maxLength": 40}
CITY = {"type": "string", "enum": ["Paris", "Lima", "Oslo", "Cairo", "Quito"]}
COUNT = {"type": "integer", "minimum": 0, "maximum": 500}
PRICE = {"type": "number", "minimum": 0, "maximum": 100000}
DATE = {"type": "string", "format": "date"}
CODE = {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}


def _object(required: Sequence[str] | None = None, **properties: Any) -> dict[str, Any]:
    wanted = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": wanted, "additionalProperties": False}


ITEM = _object(name=NAME, count=COUNT)
SCHEMAS: list[dict[str, Any]] = [
    _object(name=NAME),
    _object(city=CITY),
    _object(count=COUNT, city=CITY),
    _object(price=PRICE),
    _object(date=DATE),
    _object(code=CODE),
    _object(name=NAME, city=CITY, date=DATE),
    _object(code=CODE, price=PRICE, paid={"type": "boolean"}),
    _object(name=NAME, middle={"anyOf": [NAME, {"type": "null"}]}),
    _object(item=ITEM),
    _object(items={"type": "array", "items": ITEM, "minItems": 1, "maxItems": 2}),
    _object(cities={"type": "array", "items": CITY, "minItems": 1, "maxItems": 3}),
    _object(customer=_object(name=NAME, city=CITY), order=_object(code=CODE, count=COUNT)),
    _object(required=["name"], name=NAME, count=COUNT, price=PRICE),
    _object(answer={"const": "yes"}, reason={"type": "string", "maxLength": 60}),
    {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"type": "string", "enum": ["order", "refund", "question"]},
    {"anyOf": [_object(refund=PRICE), _object(order=CODE)]},
    {"$defs": {"thing": ITEM}, **_object(first={"$ref": "#/$defs/thing"})},
    _object(quantity={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100}, unit={"enum": ["kg", "box", None]}),
]


def make_lines(number: int) -> list[dict[str, Any]]:
    """Return the lines of the job, the same in every run."""
    rng = random.Random(0)
    lines: list[dict[str, Any]] = []
    for index in range(number):
        text = (
            f"On 2024-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02} {rng.choice(['Ann Lee', 'Bob Stone', 'Carla Diaz'])} of "
            f"{rng.choice(CITY['enum'])} ordered {rng.randrange(1, 400)} {rng.choice(['lamps', 'chairs', 'boxes of tea'])} "
            f"for {rng.randrange(10, 9000)} dollars (order {rng.choice(['AB', 'QX'])}-{rng.randrange(10000):04})."
        )
        line: dict[str, Any] = {"id": index, "max_tokens": 200, "temperature": 0 if index % 2 else 0.8, "seed": index}
        if rng.random() < FREE_SHARE:
            line |= {"messages": [{"role": "user", "content": f"{text} Say it in other words."}], "max_tokens": 40}
        else:
            schema = SCHEMAS[index % len(SCHEMAS)]
            asked = f"{text} Answer with JSON that fits this schema: {json.dumps(schema)}"
            form = {"type": "json_schema", "json_schema": {"name": f"schema_{index % len(SCHEMAS)}", "schema": schema}}
            line |= {"messages": [{"role": "user", "content": asked}], "response_format": form}
        lines.append(line)
    return lines


def check(lines: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> Counter[str]:
    """Return how many answers are valid, cut by their length, free of a schema, invalid or errors."""
    found: Counter[str] = Counter()
    for line, record in zip(lines, records, strict=True):
        if "error" in record:
            found["errors"] += 1
        elif "response_format" not in line:
            found["free"] += 1
        elif record["finish_reason"] == "length":
            found["cut"] += 1
        else:
            schema = line["response_format"]["json_schema"]["schema"]
            try:
                jsonschema.validate(json.loads(record["text"]), schema, format_checker=jsonschema.FormatChecker())
                found["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                print(f"line {record['index']}: {record['text']!r}: {error}", file=sys.stderr)
                found["invalid"] += 1
    return found


def run(argv: Sequence[str], output: Path, kills: int, seconds: float) -> float:
    """Run the job from its start, killed as often as this, and return the seconds of the last run."""
    for stale in output.parent.glob(f"{output.name}*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    rng = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen([*argv, "-o", str(output)], stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    start = time.monotonic()
    subprocess.run([*argv, "-o", str(output)], check=True)
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    given = sys.argv[1:]
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args = parser.parse_args(own)
    args.scratch.mkdir(parents=True, exist_ok=True)
    lines = make_lines(args.lines)
    requests, whole, killed = (args.scratch / f"extraction-{name}.jsonl" for name in ("requests", "whole", "killed"))
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [str(Path(sys.executable).with_name("flexgen")), "run", args.model, str(requests), "--checkpoint-seconds", "2", *options]
    seconds = run(argv, whole, 0, 0.0)
    run(argv, killed, args.kills, seconds)
    found = check(lines, [json.loads(line) for line in whole.read_text().splitlines()])
    same = whole.read_bytes() == killed.read_bytes()
    row = {
        "model": Path(args.model).name,
        "lines": args.lines,
        "kills": args.kills,
        "seconds": round(seconds, 1),
        **found,
        "same_bytes": same,
    }
    print(json.dumps(row))
    Results(args.results).append(row)
    return 0 if same and not found["invalid"] and not found["errors"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
