"""The house has no cycles: imports run downward, rooms see each other only where a table says so, plan/ knows no torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FLEXGEN = Path(__file__).parent.parent / "src" / "flexgen"

# Rooms from the ground up; a room may import any room of a lower floor.
FLOORS = (
    {"errors", "failpoints", "durations", "compiled", "scalars", "steps"},
    {"sizes", "formats", "parameters", "request", "options", "prefixes", "inputs", "isolation", "turns"}
    | {"strict_json", "links", "foreign"},
    {"files"},
    {"plan"},
    {"quant", "kernels", "memory", "models", "hub", "private_folder", "model_config"}
    | {"text", "text_sizes", "stopping", "defaults", "choices", "chat"},
    {"engine"},
    {"profile"},
    {"opening", "open_engine", "specs", "vllm_keywords"},
    {"llm", "readable"},
    {"jobs", "bench", "integrations", "display", "cli", "__init__", "__main__"},
)
# Rooms of one floor that may see each other.  (A name that only annotations use may look sideways anyway, never up.)
BESIDE = {
    "request": {"parameters"},
    "inputs": {"request"},
    "options": {"sizes"},
    "quant": {"kernels"},
    "memory": {"kernels", "quant"},
    "models": {"memory", "kernels", "quant"},
    "private_folder": {"hub"},
    "model_config": {"hub", "private_folder"},
    "text": {"hub", "text_sizes", "private_folder"},
    "stopping": {"text"},
    "choices": {"text", "stopping", "defaults"},
    "defaults": {"hub", "model_config"},
    "open_engine": {"opening"},
    "specs": {"opening"},
    "bench": {"jobs"},
    "integrations": {"jobs"},
    "cli": {"jobs", "bench", "integrations", "display"},
    "__main__": {"cli"},
}
# What a mechanism may see of plan/: values, never the choice.  What is above the LLM may see of the engine: values.
PLAN_VALUES = {"machine", "model", "policy", "workload"}
ENGINE_VALUES = {"progress"}


def floor(room: str) -> int:
    return next((index for index, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def rooms() -> set[str]:
    return {path.stem for path in FLEXGEN.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def imports() -> Iterator[tuple[str, str, list[str], bool]]:
    """(file, its room, dotted name, whether only annotations use it) of every import, lazy ones included."""
    for path in sorted(FLEXGEN.rglob("*.py")):
        parts = path.relative_to(FLEXGEN).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
        type_only = {child for node in guarded for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                yield from (
                    ("/".join(parts), parts[0], f"{node.module}.{alias.name}".split("."), node in type_only) for alias in node.names
                )
            elif isinstance(node, ast.Import):
                yield from (("/".join(parts), parts[0], alias.name.split("."), node in type_only) for alias in node.names)


def test_imports_run_downward() -> None:
    wrong = []
    for file, room, (package, *target), type_only in imports():
        other = target[0] if target and target[0] in rooms() else "__init__"
        if package != "flexgen" or other == room or (room == "__init__" and other != "cli"):
            continue
        sideways = floor(other) == floor(room) and (type_only or other in BESIDE.get(room, ()))
        if floor(other) >= floor(room) and not sideways and target != ["__version__"]:
            wrong.append(f"{file} imports {'.'.join(target)}: not downward")
        if other == "plan" and floor(room) == floor("models") and target[1] not in PLAN_VALUES:
            wrong.append(f"{file} imports {'.'.join(target)}: a mechanism sees only {sorted(PLAN_VALUES)} of the plan")
        if other == "engine" and floor(room) > floor("llm") and target[1] not in ENGINE_VALUES:
            wrong.append(f"{file} imports {'.'.join(target)}: what is above the LLM sees only {sorted(ENGINE_VALUES)} of the engine")
        if any(part.startswith("_") and not part.startswith("__") for part in target):
            wrong.append(f"{file} imports {'.'.join(target)}: private to its room")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor() -> None:
    assert not rooms() - set().union(*FLOORS), "give the new room a floor in this file"


def test_rooms_of_one_floor_have_no_cycle() -> None:
    graphlib.TopologicalSorter(BESIDE).prepare()


def test_plan_names_no_torch() -> None:
    assert not [file for file, room, target, _ in imports() if room == "plan" and target[0] in ("torch", "transformers")]


ALL_OF_PLAN = """
import importlib, pkgutil, flexgen.plan
for module in pkgutil.iter_modules(flexgen.plan.__path__, "flexgen.plan."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import flexgen", {"torch", "transformers", "numba"}),
        ("import flexgen.cli", {"torch", "transformers", "numba"}),
        (ALL_OF_PLAN, {"torch", "transformers"}),
    ],
    ids=["flexgen", "cli", "plan"],
)
def test_imports_load_nothing_heavy(code: str, heavy: set[str]) -> None:
    check = f"import sys; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
