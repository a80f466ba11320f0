"""The sweep's records, counted, and as the table of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .kinds import KINDS

BEGIN, END = "<!-- architectures: written by benchmarks/architectures.py -->", "<!-- end of architectures -->"
_HEAD = "| kind | types | built | opened | gave an adapter | exact | exact and right in PEFT | refused | other |"

Record = dict[str, Any]


def read_records(file: Path) -> list[Record]:
    """The last record of each type; none where there is no file yet."""
    if not file.is_file():
        return []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return list({(record["kind"], record["type"]): record for record in records}.values())


def totals(records: list[Record]) -> str:
    """A Markdown table with a line for each kind."""
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|---|"]
    for kind in KINDS:
        own = [record for record in records if record["kind"] == kind]
        if own:
            right = [record for record in own if is_right(record)]
            refused = [record for record in own if record["ended"] == "refused"]
            built = [record for record in own if record.get("built")]
            reached = [sum(bool(r.get(stage)) for r in own) for stage in ("built", "opened", "adapter", "exact")]
            rest = len(built) - len(right) - len(refused)
            cells = [kind, len(own), *reached, len(right), len(refused), rest]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def is_right(record: Record) -> bool:
    return bool(record.get("exact") and record.get("peft"))


def replace_table(page: Path, records: list[Record]) -> None:
    """Between the markers of the page: the totals, the types that are right, and the reason for each other one."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n\n{_table(records)}\n\n{END}{after}")


def _table(records: list[Record]) -> str:
    parts = [totals(records)]
    for kind in KINDS:
        right = sorted(record["type"] for record in records if record["kind"] == kind and is_right(record))
        if right:
            parts.append(f"Exact and right in PEFT, {kind}: {', '.join(right)}.")
    others = [record for record in records if record.get("built") and not is_right(record)]
    if others:
        lines = ["| kind | type | what becomes of it |", "|---|---|---|"]
        lines += [f"| {record['kind']} | {record['type']} | {_why(record)} |" for record in others]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _why(record: Record) -> str:
    if record["ended"] != "done":
        return f"{record['ended']}: {record['why']}".replace("|", "\\|").replace("<", "&lt;")
    if not record["exact"]:
        return str(record.get("why_not_exact") or f"off by {record['error']:.0%} in {record['worst_layer']}")
    return str(record.get("why_not_peft") or f"PEFT's output is off by {record['output_error']:.0%}").replace(
        "|", "\\|"
    )
