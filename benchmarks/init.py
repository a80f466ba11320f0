"""Wall time and peak memory of the initialisation, against PEFT's lora_ga and the published procedure.

    python benchmarks/init.py            # about 30 minutes on 2 cores; table, and benchmarks/results/init.json

Whole processes on the CPU, run in turn, medians of three. SmolLM2-135M-Instruct as an fp32 safetensors directory,
GSM8K prompt and completion, at most 256 tokens, r = 8, γ = 128, all linear layers of the blocks, 8 and 64 rows.

"ours" is the command as it is, which goes row by row where that fits; "ours, by blocks" has --schedule blocks. The
limit is what no program can beat here: three forwards' products with weights at the machine's own matrix rate, plus the
imports that any of them needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE / "peers"
ROWS = (8, 64)
BLOCK_PARAMETERS, VOCABULARY, HIDDEN = 106_168_320, 49_152, 576  # of SmolLM2-135M: 30 blocks' linear layers
EVALUATED = {8: 1 / 4, 64: 1 / 8}  # of the rows
OURS = ("ours", "ours, by blocks")

MACHINE = """
import json, platform, time, torch
A, rates = torch.randn(2048, 2048), []
for _ in range(20):
    start = time.perf_counter()
    A @ A
    rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "threads": torch.get_num_threads(),
    "matrix_gflops": sorted(rates)[10],
}))
"""
IMPORTS = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; AutoModelForCausalLM.from_config"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent / "examples" / "gsm8k.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-published", action="store_true", help="leave the slowest peer out")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "init.json")
    arguments = parser.parse_args()

    # This process stays small: a child's peak memory counts that of its parent at the fork.
    model = Path(run_python("from loraone_init.models.sources import resolve_model as r; print(r('demo').directory)"))
    result: dict[str, Any] = {"machine": json.loads(run_python(MACHINE)), "repeats": arguments.repeats, "cases": {}}
    imports = [measure([sys.executable, "-c", IMPORTS])["seconds"] for _ in range(arguments.repeats)]
    result["machine"]["import_seconds"] = median(imports)
    lines = arguments.data.read_text().splitlines()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for rows in ROWS:
            data = work / f"{rows}.jsonl"
            data.write_text("\n".join(lines[:rows]) + "\n")
            commands = commands_for(rows, model, data, work, published=not arguments.without_published)
            result["cases"][str(rows)] = compare(commands, arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    print(f"\n{markdown(result)}")


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/scaling.md and the README."""
    lines = ["| rows | | wall | peak memory | ours / this, wall | ours / this, memory |", "|---|---|---|---|---|---|"]
    for rows, case in result["cases"].items():
        ours = case["ours"]
        for name, summary in case.items():
            ratios = f"{ours['seconds'] / summary['seconds']:.2f} | {ours['peak_mb'] / summary['peak_mb']:.2f}"
            lines.append(f"| {rows} | {name} | {summary['seconds']:.1f} s | {summary['peak_mb']:,.0f} MB | {ratios} |")
        limit = limit_seconds(result["machine"], ours)
        lines.append(f"| {rows} | the limit of this machine | {limit:.1f} s | | {ours['seconds'] / limit:.2f} | |")
    return "\n".join(lines)


def limit_seconds(machine: dict[str, Any], ours: dict[str, Any]) -> float:
    """Forward, gradients of inputs and gradients of weights, of blocks and head, at the matrix rate; and imports."""
    flops = stage_flops(8, ours["tokens"], ours["label_tokens"], "rows")
    return (flops["forward"] + flops["backward"]) / machine["matrix_gflops"] / 1e9 + machine["import_seconds"]


def commands_for(rows: int, model: Path, data: Path, work: Path, published: bool) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "loraone_init", str(model), str(data), "-o", str(work / "ours.safetensors")]
    options = ["--max-length", "256", "--gamma", "128", "--overwrite", "--json"]  # no search: the others have none
    peer = [str(model), str(data)]
    commands = {
        "ours": [*ours, *options],
        "ours, by blocks": [*ours, *options, "--schedule", "blocks"],
        "PEFT lora_ga": [sys.executable, str(PEERS / "peft_lora_ga.py"), *peer, str(work / "peft")],
    }
    if rows == ROWS[0] and published:
        commands["published LoRA-One"] = [
            sys.executable,
            str(PEERS / "published_loraone.py"),
            *peer,
            str(work / "published.safetensors"),
        ]
    return commands


def compare(commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Run the commands in turn, `repeats` times round."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(measure(command))
            print(f"{name:24} {runs[name][-1]['seconds']:7.1f} s {runs[name][-1]['peak_mb']:7.0f} MB", flush=True)
    return {name: summarise(measured) for name, measured in runs.items()}


def measure(command: list[str]) -> dict[str, Any]:
    """One process: wall seconds, peak resident memory as the operating system counts it, and what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1000, "printed": printed.decode()}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "seconds": median(run["seconds"] for run in runs),
        "peak_mb": median(run["peak_mb"] for run in runs),
        "all_seconds": [round(run["seconds"], 2) for run in runs],
    }
    if runs[0]["printed"].startswith("{"):  # ours, with --json
        reports = [json.loads(run["printed"]) for run in runs]
        stages = reports[0]["seconds"]
        summary["stages"] = {stage: median(report["seconds"][stage] for report in reports) for stage in stages}
        summary["schedule"] = reports[0]["schedule"]["chosen"]
        summary["tokens"] = reports[0]["sample"]["num_tokens"]
        summary["label_tokens"] = reports[0]["sample"]["num_label_tokens"]
    return summary


def run_python(code: str) -> str:
    """What the last line printed by a Python process of its own is."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def stage_flops(rows: int, tokens: int, label_tokens: int, schedule: str) -> dict[str, float]:
    """Products with weights only; attention's own are under 3 % at these lengths.

    The backward has gradients of inputs and of weights; by blocks the forward again, row by row the head.
    """
    forward = 2.0 * BLOCK_PARAMETERS * tokens
    head = 4.0 * VOCABULARY * HIDDEN * label_tokens
    evaluate = EVALUATED[rows] * forward
    if schedule == "rows":
        return {"forward": forward, "backward": 2 * forward + head, "evaluate": evaluate}
    return {"forward": forward, "head": head, "backward": 3 * forward, "evaluate": evaluate}


def stage_shares(rows: int, ours: dict[str, Any], machine: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of each stage that computes: its operations, and the share of the machine's matrix rate that it reached."""
    flops = stage_flops(rows, ours["tokens"], ours["label_tokens"], ours["schedule"])
    rate = machine["matrix_gflops"] * 1e9
    return {stage: (number, number / ours["stages"][stage] / rate) for stage, number in flops.items()}


def print_table(result: dict[str, Any]) -> None:
    rate = result["machine"]["matrix_gflops"]
    print(f"\n2048³ fp32 product: {rate:.0f} GFLOP/s on {result['machine']['threads']} threads")
    for rows, case in result["cases"].items():
        ours = case["ours"]
        print(f"\n{rows} rows, {ours['tokens']} tokens, {ours['label_tokens']} trained on; medians")
        for name, summary in case.items():
            ratios = f"{ours['seconds'] / summary['seconds']:.2f} {ours['peak_mb'] / summary['peak_mb']:.2f}"
            print(f"{name:24} {summary['seconds']:7.1f} s {summary['peak_mb']:7.0f} MB   ours/this {ratios}")
        for name in OURS:
            each = case[name]
            print(f"  {name}: {each['schedule']}")
            shares = stage_shares(int(rows), each, result["machine"])
            for stage, seconds in each["stages"].items():
                share = f"{shares[stage][1]:6.0%} of the rate" if stage in shares else ""
                print(f"    {stage:10} {seconds:6.2f} s {share}")
        print(f"  the limit {limit_seconds(result['machine'], ours):.1f} s")


if __name__ == "__main__":
    main()
