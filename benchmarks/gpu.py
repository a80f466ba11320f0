"""The initialisation on a GPU: peak memory, time by stage, and what that is of the card's own ceilings.

    python benchmarks/gpu.py                        # Llama-2-7B's shape, bf16; under 30 minutes on an H100
    python benchmarks/gpu.py --small --device cpu   # tiny shapes, seconds: whether it works, not a measurement

Ours row by row; block by block with the weights on the device, in host memory and on disk, and under a --max-memory
that they exceed; PEFT's lora_ga; the published procedure. The checkpoint has random weights and is made here: needs no
network, and nothing beyond torch, transformers, safetensors, numpy, click, rich and PEFT. Each case runs in a process
of its own and is written to the output when it ends; cases that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_cases.cases import run_lora_ga, run_ours, run_published
from gpu_cases.goals import describe_goals, print_table
from gpu_cases.measure import measure_ceilings
from gpu_cases.shapes import LLAMA_2_7B, SMALL, Shape, make_checkpoint

HERE = Path(__file__).parent
PLACEMENTS = ("device", "host", "disk")
CAP = {"llama-2-7b": 6 * 2**30, "small": 2**30}
PRODUCT = {"llama-2-7b": 8192, "small": 256}
LIMIT = 900  # seconds for a case


def main() -> None:
    arguments = parse_arguments()
    shape = SMALL if arguments.small else LLAMA_2_7B
    work = arguments.work or Path(tempfile.gettempdir()) / "loraone-gpu-benchmark"
    checkpoint = work / shape.name
    if arguments.case:
        print(json.dumps(run_case(arguments.case, shape, checkpoint, arguments)))
        return
    result = read_result(arguments, shape)
    for case in case_names(shape):
        if case in result["cases"] and "error" not in result["cases"][case]:
            print(f"{case}: there already", flush=True)
            continue
        result["cases"][case] = run_alone(case, arguments)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, shape)
    print("\n".join(describe_goals(result, shape)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of our micro-batches; the command's default")
    parser.add_argument(
        "--work", type=Path, help="where the checkpoint is kept (14 GB)  [default: in the temporary one]"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def case_names(shape: Shape) -> list[str]:
    """In the order in which they run: what matters most first, the slowest last."""
    fewest = shape.row_counts[0]
    names = ["checkpoint", "ceilings"]
    for rows in shape.row_counts:
        names.append(f"ours by rows, device, {rows} rows")
        names += [f"ours by blocks, {placement}, {rows} rows" for placement in PLACEMENTS]
        names.append(f"PEFT lora_ga, {rows} rows")
    return [*names, f"ours by blocks, capped, {fewest} rows", f"published LoRA-One, {fewest} rows"]


def run_case(case: str, shape: Shape, checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the case measured."""
    device = arguments.device
    if case == "checkpoint":
        make_checkpoint(shape, checkpoint, device)
        return {"bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))}
    if case == "ceilings":
        return measure_ceilings(device, checkpoint, PRODUCT[shape.name])
    kind, *middle, rows_text = case.split(", ")
    rows = int(rows_text.split()[0])
    if kind == "PEFT lora_ga":
        return run_lora_ga(shape, checkpoint, device, rows)
    if kind == "published LoRA-One":
        return run_published(shape, checkpoint, device, rows)
    capped = middle == ["capped"]
    cap = CAP[shape.name] if capped else None
    placement = "auto" if capped else middle[0]
    schedule = kind.rpartition(" ")[2]
    return run_ours(shape, checkpoint, device, rows, arguments.batch_tokens, placement, schedule, cap)


def run_alone(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The case in a process of its own: memory is clean, and a failure costs this case only."""
    print(f"{case} ...", flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {LIMIT} seconds"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"    failed: {last}", flush=True)
        return {"error": last[:500]}
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "seconds" in outcome:
        print(f"    {outcome['seconds']:.1f} s, {outcome['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return outcome


def read_result(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """What was measured before with the same settings, or nothing yet."""
    import torch

    is_cuda = arguments.device.startswith("cuda")
    settings = {"shape": shape.name, "device": arguments.device, "batch_tokens": arguments.batch_tokens}
    machine = {
        "card": torch.cuda.get_device_name() if is_cuda else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if arguments.output.is_file():
        before: dict[str, Any] = json.loads(arguments.output.read_text())
        if before["settings"] != settings or before["machine"] != machine:
            raise SystemExit(
                f"{arguments.output} holds other measurements, {before['settings']} on {before['machine']}; give"
                " another --output"
            )
        return before
    return {"machine": machine, "settings": settings, "cases": {}}


if __name__ == "__main__":
    main()
