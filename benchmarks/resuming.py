"""Runs in a JSON file: written after each one, read back when a benchmark is started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def earlier_runs(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an interrupted call with the same settings left."""
    if not output.exists():
        return []
    found: dict[str, Any] = json.loads(output.read_text())
    runs: list[dict[str, Any]] = found.pop("runs")
    return runs if found == settings else []


def write_runs(output: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**settings, "runs": runs}, indent=2) + "\n")
