"""Write the catalogue's files, src/flexgen/plan/known/models/NAME.json, from the public configs in src/flexgen/plan/known/configs.json.

python benchmarks/catalogue.py [NAME ...]

Which layers a group of KV has is left out: plans for several machines spread them evenly.
The sizes that follow from the configs are checked against published ones in tests/plan/test_catalogue.py.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib import resources
from pathlib import Path

from flexgen.plan.known.models import catalogue_names
from flexgen.session.shipped import described


def main() -> None:
    folder = Path(str(resources.files("flexgen.plan.known.models")))
    for name in sys.argv[1:] or catalogue_names():
        spec = described(name)
        spec = dataclasses.replace(spec, kv_groups=tuple(dataclasses.replace(group, layers=()) for group in spec.kv_groups))
        (folder / f"{name}.json").write_text(spec.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
