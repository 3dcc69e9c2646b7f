"""Runs the command as `python -m flexgen`."""

from __future__ import annotations

from flexgen.cli import main

main()
