"""Runs the command as `python -m flexgen.cli`."""

from __future__ import annotations

from flexgen.cli import main

main()
