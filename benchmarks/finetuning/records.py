"""Finished runs as JSON lines: appended one by one, read back when the benchmark is started again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .presets import ProblemName, Settings
from .runs import Record, how

Inputs = dict[ProblemName, dict[str, str]]
"""By problem, what model and data the runs are of."""


def inputs_of(model: str, data: Path | None) -> Inputs:
    digest = hashlib.sha256(data.read_bytes()).hexdigest()[:12] if data else ""
    return {"gsm8k": {"model": model, "sha256": digest}, "newsgroups": {}}


def read_records(path: Path, settings: dict[ProblemName, Settings], inputs: Inputs | None = None) -> list[Record]:
    """Those of the same settings and inputs, or any. A line cut short, by a kill while it was written, is no run."""
    if not path.exists():
        return []
    expected = {name: how(chosen) for name, chosen in settings.items()}
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        same_inputs = inputs is None or record["inputs"] == inputs[record["problem"]]
        if record["how"] == expected.get(record["problem"]) and same_inputs:
            records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(record) + "\n")
