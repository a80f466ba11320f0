"""The tables of docs/scaling.md and the README, from the cost model and from what was measured.

python benchmarks/tables.py      # writes them anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import init
import scale
from cost_model import H100_NODE, LLAMA_8B, LLAMA_70B, LLAMA_405B, Machine, predict, shared_reading

HERE = Path(__file__).parent
SCALING = HERE.parent / "docs" / "scaling.md"
README = HERE.parent / "README.md"


def machine_for_predictions() -> tuple[Machine, bool]:
    """An H100 node: by data sheets, or with the ceilings that benchmarks/gpu.py measured; and whether it did."""
    file = HERE / "results" / "gpu.json"
    if not file.is_file():
        return H100_NODE, False
    from gpu_cases.goals import stage_flops
    from gpu_cases.shapes import LLAMA_2_7B

    cases = json.loads(file.read_text())["cases"]
    ceilings, ours = cases["ceilings"], cases["ours by blocks, device, 64 rows"]
    rate = ceilings["bf16_tflops"] * 1e12
    reached = stage_flops(LLAMA_2_7B, 64, ours["loss_rows"], "blocks")["backward"] / ours["stages"]["backward"]
    measured = replace(
        H100_NODE,
        matrix_rate=rate,
        efficiency=reached / rate,
        host_to_device=ceilings["host_to_device_gb_per_s"] * 1e9,
        disk=ceilings["disk_gb_per_s"] * 1e9,
        file_cache=ceilings["file_cache_gb_per_s"] * 1e9,
    )
    return measured, True


def predictions_table(machine: Machine) -> str:
    lines = [
        "| model | GPUs | schedule | placement | on each GPU | host memory of a node | moved by each GPU |"
        " TFLOP of each | open | forward | backward | reduce | SVD | evaluate | all |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B, LLAMA_405B):
        for ranks in (1, 8, 64):
            cost = predict(model, ranks, machine)
            place = cost.placement + (", inputs in host memory" if cost.inputs_on_host else "")
            amounts = (cost.device_bytes, cost.host_bytes, cost.moved_bytes)
            cells = [model.name, str(ranks), cost.schedule, place, *[f"{amount / 1e9:,.0f} GB" for amount in amounts]]
            cells.append(f"{cost.flops / 1e12:,.0f}")
            cells += [f"{seconds:,.0f} s" for seconds in (*cost.seconds.values(), cost.total)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shared_table(machine: Machine) -> str:
    """Reading shared between the GPUs of a node, beside each for itself, as the table above has it."""
    lines = [
        "| model | GPUs | | host memory of a node | over PCIe, each GPU | forward | backward | evaluate | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_70B, LLAMA_405B):
        for how, cost in (("each for itself", predict), ("shared", shared_reading)):
            found = cost(model, 8, machine)
            amounts = [f"{amount / 1e9:,.0f} GB" for amount in (found.host_bytes, found.moved_bytes)]
            seconds = [found.seconds[stage] for stage in ("forward", "backward", "evaluate")]
            cells = [model.name, "8", how, *amounts, *[f"{s:,.0f} s" for s in (*seconds, found.total)]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_table() -> str:
    """What the stages of benchmarks/init.py reached of that CPU's matrix rate."""
    result = _results("init")
    machine = result["machine"]
    lines = ["| rows | schedule | stage | GFLOP | seconds | of the matrix rate |", "|---|---|---|---|---|---|"]
    for rows, case in result["cases"].items():
        for ours in (case[name] for name in init.OURS):
            for stage, (flops, share) in init.stage_shares(int(rows), ours, machine).items():
                figures = f"{flops / 1e9:,.0f} | {ours['stages'][stage]:.1f} | {share:.0%}"
                lines.append(f"| {rows} | {ours['schedule']} | {stage} | {figures} |")
    rate = machine["matrix_gflops"]
    return "\n".join([*lines, "", f"The matrix rate is {rate:.0f} GFLOP/s, of fp32 products of 2048³ on two threads."])


def readme_table() -> str:
    """Of the larger sample: wall time and memory beside PEFT's, and what each stage reached of the matrix rate."""
    result = _results("init")
    case, machine = result["cases"]["64"], result["machine"]
    peft = case["PEFT lora_ga"]
    lines = [
        "| | wall | peak memory | of PEFT's wall | of PEFT's memory | of the machine's matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*init.OURS, "PEFT lora_ga"):
        found = case[name]
        figures = [f"{found['seconds']:.1f} s", f"{found['peak_mb']:,.0f} MB"]
        figures += [f"{found[key] / peft[key]:.2f}" for key in ("seconds", "peak_mb")]
        shares = init.stage_shares(64, found, machine) if name in init.OURS else {}
        reached = ", ".join(f"{stage} {share:.0%}" for stage, (_, share) in shares.items())
        lines.append(f"| {name} | {' | '.join(figures)} | {reached} |")
    limit = init.limit_seconds(machine, case["ours"])
    of_peft = limit / peft["seconds"]
    lines.append(f"| the limit of this machine | {limit:.1f} s | | {of_peft:.2f} | | 100%, and imports |")
    return "\n".join(lines)


def documents() -> dict[Path, dict[str, str]]:
    """The tables by document, and by the name of the marks between which each stands."""
    machine, _ = machine_for_predictions()
    scaling = {
        "init": init.markdown(_results("init")),
        "cpu": cpu_table(),
        "scale": scale.markdown(_results("scale")),
        "predictions": predictions_table(machine),
        "shared": shared_table(machine),
    }
    return {SCALING: scaling, README: {"init": readme_table()}}


def filled_in(text: str, tables: Mapping[str, str]) -> str:
    """A document's text with these tables between their marks."""
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.S)
        text, replaced = marks.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if replaced != 1:
            raise SystemExit(f"there are no marks for the table {name!r}")
    return text


def _results(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return content


if __name__ == "__main__":
    for document, tables in documents().items():
        document.write_text(filled_in(document.read_text(), tables))
        print("\n\n".join(tables.values()))
