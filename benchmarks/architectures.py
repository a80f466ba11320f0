"""Every type of model that transformers lists, tiny and random: opened, its gradients checked, its adapter loaded.

    python benchmarks/architectures.py                                       # all, to benchmarks/results/
    python benchmarks/architectures.py --types llama,t5 --output few.jsonl   # some
    python benchmarks/architectures.py --table docs/models-and-data.md       # what was found, as a table in this page

Each type is made small by the names of its configuration's numbers, saved with random weights, and opened as a user's
checkpoint in a process of its own. Gradients are compared with autograd through the whole model, one unpadded row at a
time; the adapter is loaded by PEFT into the class of the checkpoint, tensors compared one by one, and the output with
that of W + s·B·A. A line of JSON for each type is appended; types that have one are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from architecture_sweep.alone import GIB, Limits, run_all
from architecture_sweep.kinds import KINDS, types_of
from architecture_sweep.report import read_records, replace_table, totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: all, separated by commas")
    parser.add_argument("--types", default="", help="model types, separated by commas; default: all of the kinds")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of a type")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space of a type")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "architectures.jsonl")
    parser.add_argument(
        "--table", type=Path, help="write the table of what --output has into this page, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.table:
        replace_table(arguments.table, read_records(arguments.output))
    else:
        sweep(arguments)


def sweep(arguments: argparse.Namespace) -> None:
    wanted = [name for name in arguments.types.split(",") if name]
    done = {(record["kind"], record["type"]) for record in read_records(arguments.output)}
    kinds = [kind for kind in KINDS if kind in arguments.kinds.split(",")]
    cases = [(kind, name) for kind in kinds for name in types_of(kind) if not wanted or name in wanted]
    cases = [case for case in cases if case not in done]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    limits = Limits(arguments.timeout, int(arguments.memory * GIB))
    with open(arguments.output, "a") as file:
        for record in run_all(cases, arguments.rank, limits, arguments.jobs):
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{record['kind']:16} {record['type']:28} {outcome(record)}", flush=True)
    print(totals(read_records(arguments.output)))


def outcome(record: dict[str, Any]) -> str:
    if record["ended"] != "done":
        return f"{record['ended']} ({record.get('stage', 'alone')}): {record['why']}"
    error = f"error {record['error']:.1e}" if "error" in record else record["why_not_exact"]
    if "error_of_padded" in record:
        error += f" (padded {record['error_of_padded']:.1e}) in {record['worst_layer']}"
    peft = "right in PEFT" if record["peft"] else record.get("why_not_peft", f"off by {record.get('output_error')}")
    return f"{error}, {peft}"


if __name__ == "__main__":
    main()
