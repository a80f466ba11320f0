"""The theory of LoRA-One (arXiv 2502.01235) on toy problems, in fp64, with the library's own functions.

    python benchmarks/theory.py     # minutes on one core; results/theory.json, docs/theory.md and its pictures

What is computed is in toy/: `problems`, `methods`, the experiments `linear`, `relu` and `digits`, then `plots` and
`report`. docs/theory.md shows the pictures beside the claims; its tables are written here. Needs the extra
`benchmarks`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from toy import digits, linear, plots, relu, report

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SEEDS = (0, 1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "theory.json")
    parser.add_argument("--redraw", action="store_true", help="pictures and tables from the output that is there")
    arguments = parser.parse_args()

    if not arguments.redraw:
        arguments.output.parent.mkdir(exist_ok=True)
        result = rounded(run_all())
        verdicts = {"claims": [asdict(claim) for claim in report.claims(result)]}
        arguments.output.write_text(json.dumps(verdicts | result) + "\n")
    result = json.loads(arguments.output.read_text())
    for path in plots.draw_all(result, DOCS / "theory"):
        print(path)
    document = DOCS / "theory.md"
    document.write_text(report.fill(document.read_text(), result))
    print_claims(result)


def run_all() -> dict[str, Any]:
    result: dict[str, Any] = {"machine": {"python": platform.python_version(), "torch": torch.__version__}}
    seconds = result["seconds"] = {}
    for experiments in (linear, relu, digits):
        for name, found, taken in timed(experiments.run(SEEDS)):
            result[name], seconds[name] = found, taken
            print(f"{name:14} {taken:6.1f} s", flush=True)
    return result


def timed(results: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any, float]]:
    """Adds the seconds that each took."""
    start = time.perf_counter()
    for name, result in results:
        yield name, result, time.perf_counter() - start
        start = time.perf_counter()


def rounded(value: Any) -> Any:
    """Floats to four digits, None where they are not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def print_claims(result: dict[str, Any]) -> None:
    print(f"\n{sum(result['seconds'].values()):.0f} s in all")
    for claim in report.claims(result):
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.source}: {claim.says}\n       {claim.seen}")


if __name__ == "__main__":
    main()
