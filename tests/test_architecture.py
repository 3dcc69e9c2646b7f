"""The house: its rooms have floors and imports run downward, no two files import each other in a circle, plan/ knows no torch.

All imports count, those inside functions and those that only annotations use included.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FLEXGEN = Path(__file__).parent.parent / "src" / "flexgen"

# The public face: the only files that lie beside the rooms.
FACE = {"__init__", "__main__", "errors", "llm", "options", "outputs", "request"}
# Rooms and files of the face, from the ground up; what stands on one floor does not see each other.
FLOORS = (
    {"errors"},
    {"base"},
    {"options", "outputs", "request"},
    {"io", "hub", "plan"},
    {"passes", "chat"},
    {"text", "kernels", "devices"},
    {"formats"},
    {"checkpoint", "weights", "kv"},
    {"models"},
    {"report", "quantize"},
    {"engine"},
    {"distributed"},
    {"profile"},
    {"session"},
    {"api"},
    {"tables"},
    {"llm"},
    {"jobs", "bench", "ray_data"},
    {"evaluation"},
    {"cli"},
    {"__init__", "__main__"},
)
# The rooms of plan/, from the ground up; its loose files are its values.
FLOORS_OF_PLAN = ({""}, {"price"}, {"known", "play"}, {"search"}, {"tell"}, {"stages"})
# What a mechanism sees of plan/: values, never the choice.  What is above the LLM sees of the engine nothing, of reports values.
MECHANISMS = {"kernels", "devices", "formats", "checkpoint", "weights", "kv", "models"}
PLAN_VALUES = {"machine", "model", "policy", "workload", "stages.spec"}


@dataclass(frozen=True)
class Import:
    """One import: the file that imports, the file that is imported (both as dotted names below flexgen), and the name taken."""

    file: str
    target: str
    name: str

    @property
    def room(self) -> str:
        return self.file.partition(".")[0]

    @property
    def other(self) -> str:
        return self.target.partition(".")[0]


def modules() -> dict[str, Path]:
    """Dotted name below flexgen -> file; a folder stands for its __init__."""
    found = {}
    for path in sorted(FLEXGEN.rglob("*.py")):
        parts = path.relative_to(FLEXGEN).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def module_of(dotted: str) -> str | None:
    """The file that `flexgen.<dotted>` lies in."""
    while dotted and dotted not in MODULES:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of a file of ours, lazy and type-only ones included."""
    return tuple(read_imports())


def read_imports() -> Iterator[Import]:
    for file, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                package, _, dotted = name.partition(".")
                if package == "flexgen" and dotted != "__version__":
                    yield Import(file, module_of(dotted) or "__init__", name.rpartition(".")[2])


def floor(name: str, floors: tuple[set[str], ...] = FLOORS) -> int:
    return next(index for index, rooms in enumerate(floors) if name in rooms)


def test_beside_the_rooms_lies_the_public_face_only() -> None:
    assert {path.stem for path in FLEXGEN.glob("*.py")} == FACE


def test_every_room_has_a_floor_and_every_floor_exists() -> None:
    rooms = {path.name for path in FLEXGEN.iterdir() if (path / "__init__.py").exists()}
    assert rooms | FACE == set().union(*FLOORS)
    assert {path.name for path in (FLEXGEN / "plan").iterdir() if (path / "__init__.py").exists()} | {""} == set().union(*FLOORS_OF_PLAN)


def test_imports_run_downward() -> None:
    wrong = {
        f"{each.file} imports {each.target}" for each in imports() if each.room != each.other and floor(each.other) >= floor(each.room)
    }
    assert not wrong, "not downward:\n" + "\n".join(sorted(wrong))


def test_imports_inside_plan_run_downward() -> None:
    def room(module: str) -> str:
        return module.split(".")[1] if module.count(".") > 1 or (FLEXGEN / module.replace(".", "/")).is_dir() else ""

    inside = [each for each in imports() if each.room == each.other == "plan" and each.target != "plan"]
    wrong = {
        f"{each.file} imports {each.target}"
        for each in inside
        if room(each.file) != room(each.target) and floor(room(each.target), FLOORS_OF_PLAN) >= floor(room(each.file), FLOORS_OF_PLAN)
    }
    assert not wrong, "not downward:\n" + "\n".join(sorted(wrong))


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {file: set() for file in MODULES}
    for each in imports():
        graph[each.file].add(each.target)
    graphlib.TopologicalSorter(graph).prepare()


def test_mechanisms_see_values_of_the_plan_only() -> None:
    wrong = {
        f"{each.file} imports {each.target}"
        for each in imports()
        if each.room in MECHANISMS and each.other == "plan" and each.target.partition(".")[2] not in PLAN_VALUES
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_what_is_above_the_session_does_not_see_the_engine() -> None:
    assert not {
        f"{each.file} imports {each.target}" for each in imports() if each.other == "engine" and floor(each.room) > floor("session")
    }


def test_private_names_stay_in_their_file() -> None:
    assert not {f"{each.file} imports {each.target}.{each.name}" for each in imports() if each.name.startswith("_") and each.name[1] != "_"}


def test_plan_names_no_torch() -> None:
    for file, path in MODULES.items():
        if file.partition(".")[0] == "plan":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            heavy = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            heavy += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert not {str(name).partition(".")[0] for name in heavy} & {"torch", "transformers"}, file


ALL_OF_PLAN = """
import importlib, pkgutil, flexgen.plan
for module in pkgutil.walk_packages(flexgen.plan.__path__, "flexgen.plan."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import flexgen", {"torch", "transformers", "numba"}),
        ("import flexgen.cli", {"torch", "transformers", "numba"}),
        (ALL_OF_PLAN, {"torch", "transformers"}),
        ("import flexgen.formats.table", {"torch", "transformers"}),
    ],
    ids=["flexgen", "cli", "plan", "formats"],
)
def test_imports_load_nothing_heavy(code: str, heavy: set[str]) -> None:
    check = f"import sys; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
