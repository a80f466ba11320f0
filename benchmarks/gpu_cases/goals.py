"""The table of a finished benchmark, and which of its goals were reached."""

from __future__ import annotations

from typing import Any

from .shapes import Shape

MEMORY_OF_PEFT, TIME_OF_PEFT, TIME_OF_PUBLISHED, RATE = 0.15, 0.6, 0.1, 0.5


def stage_flops(shape: Shape, rows: int, evaluated: float, schedule: str) -> dict[str, float]:
    """Products with weights: forward 2·P·T; the backward multiplies twice more, by blocks after the forward again; row
    by row it has the head in it. No attention.
    """
    forward = 2.0 * shape.block_parameters * rows * shape.length
    head = 4.0 * shape.vocabulary * shape.hidden * rows * shape.length
    evaluate = evaluated / rows * forward
    if schedule == "rows":
        return {"forward": forward, "backward": 2.0 * forward + head, "evaluate": evaluate}
    return {"forward": forward, "head": head, "backward": 3.0 * forward, "evaluate": evaluate}


def moved_bytes(shape: Shape) -> float:
    """Over the bus by placements other than the device: bf16 blocks, in forward, backward and evaluation."""
    return 3 * 2.0 * shape.block_parameters


def print_table(result: dict[str, Any], shape: Shape) -> None:
    ceilings = result["cases"].get("ceilings", {})
    for name, value in ceilings.items():
        print(f"{name:26} {value:8.2f}" if isinstance(value, float) else f"{name:26} {value}")
    for name, case in result["cases"].items():
        if "peak_bytes" not in case:
            if name not in ("checkpoint", "ceilings"):
                print(f"{name:36} {case.get('error')}")
            continue
        print(f"{name:36} {case['seconds']:8.2f} s {case['peak_bytes'] / 1e9:7.2f} GB")
        rows = int(name.split(", ")[-1].split()[0])
        flops = stage_flops(shape, rows, case["loss_rows"], case["schedule"][0]) if "loss_rows" in case else {}
        for stage, seconds in case["stages"].items():
            rate = f"{flops[stage] / seconds / 1e12:8.2f} TFLOP/s" if stage in flops else ""
            print(f"    {stage:12} {seconds:8.2f} s {rate}")
        if case.get("placement") in ("host", "disk"):
            streaming = sum(case["stages"][stage] for stage in ("forward", "backward", "evaluate"))
            print(f"    {'blocks':12} {moved_bytes(shape) / streaming / 1e9:8.2f} GB/s moved in these stages")


def describe_goals(result: dict[str, Any], shape: Shape) -> list[str]:
    """One line for each goal: reached, not reached, or why it cannot be told."""
    cases = result["cases"]
    lines = [] if shape.name == "llama-2-7b" else ["(small shapes: the goals below mean nothing)"]
    for rows in shape.row_counts:
        peft = cases.get(f"PEFT lora_ga, {rows} rows", {})
        for case in ("by rows, device", "by blocks, device", "by blocks, host", "by blocks, disk"):
            ours = cases.get(f"ours {case}, {rows} rows", {})
            name = f"{rows} rows, {case}"
            if not case.endswith("device"):  # there the whole model is on the card
                lines.append(_ratio(f"{name}: peak memory of PEFT's", ours, peft, "peak_bytes", MEMORY_OF_PEFT))
            lines.append(_ratio(f"{name}: wall time of PEFT's", ours, peft, "seconds", TIME_OF_PEFT))
    fewest = shape.row_counts[0]
    ours = cases.get(f"ours by rows, device, {fewest} rows", {})
    published = cases.get(f"published LoRA-One, {fewest} rows", {})
    lines.append(_ratio(f"{fewest} rows: wall time of the published", ours, published, "seconds", TIME_OF_PUBLISHED))
    for rows in shape.row_counts:
        lines.append(_rate(cases, shape, rows))
    return lines


def _ratio(what: str, ours: dict[str, Any], other: dict[str, Any], key: str, goal: float) -> str:
    if key not in ours or key not in other:
        return f"{what}: cannot be told, a case is missing"
    ratio = ours[key] / other[key]
    return f"{what}: {ratio:.3f}, goal at most {goal}: {'reached' if ratio <= goal else 'NOT reached'}"


def _rate(cases: dict[str, Any], shape: Shape, rows: int) -> str:
    what = f"{rows} rows, by rows: backward, of the card's measured bf16 matrix rate"
    ours, ceilings = cases.get(f"ours by rows, device, {rows} rows", {}), cases.get("ceilings", {})
    if "stages" not in ours or "bf16_tflops" not in ceilings:
        return f"{what}: cannot be told, a case is missing"
    rate = stage_flops(shape, rows, ours["loss_rows"], "rows")["backward"] / ours["stages"]["backward"] / 1e12
    share = rate / ceilings["bf16_tflops"]
    return f"{what}: {share:.2f}, goal at least {RATE}: {'reached' if share >= RATE else 'NOT reached'}"
