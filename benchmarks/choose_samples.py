"""How many rows are enough: SmolLM2's starting adapters on GSM8K from 8 to 128 rows.

    python benchmarks/choose_samples.py             # 12 minutes of one core; table, and results/choose_samples.json

For each size: how far the two halves of the sample agree, which `--samples auto` goes by; how far the adapter agrees
with that of the largest sample, of which the smaller ones are parts; the energy captured; and the loss after the step
on rows that no sample has. Stopped and started again it goes on after the last size that is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from loraone_init import Adapter, DataOptions, InitConfig, initialize, load_sample, open_model
from loraone_init.choosing.sample_size import Growth
from loraone_init.data.sample import Sample
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.losses import check_losses
from loraone_init.gradients.stream import stream_losses
from loraone_init.initialization.evaluation import applied
from loraone_init.inspection.comparison import compare_adapters
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import OpenModel
from loraone_init.streaming.stack import BlockStack

HERE = Path(__file__).parent
HELD_OUT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=HERE.parent / "examples" / "gsm8k.jsonl")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gamma", type=float, default=256.0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "choose_samples.json")
    parser.add_argument("--adapters", type=Path, help="folder that keeps the adapters  [default: one that is removed]")
    arguments = parser.parse_args()
    logging.getLogger("loraone_init").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as directory:
        adapters = arguments.adapters or Path(directory)
        adapters.mkdir(parents=True, exist_ok=True)
        result = measure(arguments, adapters)
    print(f"\nheld-out loss before the step: {result['held_out_loss_before']:.3f}\n\n{markdown(result)}")


def measure(arguments: argparse.Namespace, adapters: Path) -> dict[str, Any]:
    """All sizes, the JSON written after each."""
    model = open_model(arguments.model)
    sample, held_out = split_rows(arguments.data, model, max(arguments.sizes), arguments.max_length)
    config = InitConfig(rank=arguments.rank, gamma=arguments.gamma)
    result: dict[str, Any] = {
        "data": arguments.data.name,
        "max_length": arguments.max_length,
        "rank": config.rank,
        "gamma": config.gamma,
        "held_out_rows": HELD_OUT,
        "held_out_loss_before": held_out_loss(model, held_out, None),
    }
    runs = earlier_runs(arguments.output, result, adapters)
    for size in sorted(arguments.sizes):
        if size not in (run["samples"] for run in runs):
            runs.append(run_size(model, sample.first(size), held_out, config, adapters))
        runs = with_angles(runs, adapters)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**result, "runs": runs}, indent=2) + "\n")
    return {**result, "runs": runs}


def split_rows(data: Path, model: OpenModel, samples: int, max_length: int) -> tuple[Sample, Sample]:
    """A sample of all rows but the last, and the last."""
    lines = data.read_text().splitlines(keepends=True)
    assert model.tokenizer is not None
    with tempfile.TemporaryDirectory() as work:
        for name, part in (("train", lines[:-HELD_OUT]), ("held-out", lines[-HELD_OUT:])):
            (Path(work) / f"{name}.jsonl").write_text("".join(part))
        options = DataOptions(samples=samples, max_length=max_length)
        train, held_out = (
            load_sample(str(Path(work) / f"{name}.jsonl"), model.tokenizer, options) for name in ("train", "held-out")
        )
    return train, held_out


def earlier_runs(output: Path, settings: dict[str, Any], adapters: Path) -> list[dict[str, Any]]:
    """What an interrupted call with the same settings left, as far as its adapters are there."""
    if not output.exists():
        return []
    found: dict[str, Any] = json.loads(output.read_text())
    runs: list[dict[str, Any]] = found.pop("runs")
    return [run for run in runs if adapter_file(adapters, run["samples"]).exists()] if found == settings else []


def adapter_file(adapters: Path, samples: int) -> Path:
    return adapters / f"{samples}.safetensors"


def run_size(model: OpenModel, sample: Sample, held_out: Sample, config: InitConfig, adapters: Path) -> dict[str, Any]:
    """One adapter; seconds are those of the processor, whatever else runs."""
    start = time.process_time()
    adapter = initialize(model, sample, config, growth=Growth(start=len(sample.rows)))
    seconds = time.process_time() - start
    adapter.save(adapter_file(adapters, len(sample.rows)), overwrite=True)
    assert adapter.growth is not None
    [stage] = adapter.growth.stages
    found = {
        "samples": stage.samples,
        "halves_agree_median": stage.agreement_median,
        "halves_agree_min": stage.agreement_min,
        "captured_energy_median": stage.captured_energy,
        "held_out_loss": held_out_loss(model, held_out, adapter),
        "processor_seconds": round(seconds, 1),
    }
    print(json.dumps(found), flush=True)
    return found


def held_out_loss(model: OpenModel, rows: Sample, adapter: Adapter | None) -> float:
    """Mean loss over their label tokens, with the step or without."""
    objective = CausalLM(model.module, model.device)
    targets = select_targets(model.module, "all-linear")
    pairs, scale = (adapter.pairs, adapter.config.scale) if adapter else ({}, 0.0)
    with applied(pairs, targets, scale):
        return check_losses(stream_losses(BlockStack.of(model), objective, rows.batches))[0]


def with_angles(runs: list[dict[str, Any]], adapters: Path) -> list[dict[str, Any]]:
    """Each with its agreement with the largest of them: mean cos² of the worse side, the median over the layers."""
    largest = Adapter.load(adapter_file(adapters, max(run["samples"] for run in runs)))
    compared = []
    for run in runs:
        layers = compare_adapters(Adapter.load(adapter_file(adapters, run["samples"])), largest).layers.values()
        worse = [max((both.output_angles, both.input_angles), key=sum) for both in layers]
        compared.append(
            {
                **run,
                "angle_to_largest_mean": median(sum(angles) / len(angles) for angles in worse),
                "cosine_with_largest": median(both.cosine for both in layers),
            }
        )
    return compared


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/choosing.md."""
    lines = [
        "| rows | halves agree, median | least | angle to the largest | captured energy | held-out loss | processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        lines.append(
            f"| {run['samples']} | {run['halves_agree_median']:.2f} | {run['halves_agree_min']:.2f}"
            f" | {run['angle_to_largest_mean']:.0f}° | {run['captured_energy_median']:.1%}"
            f" | {run['held_out_loss']:.3f} | {run['processor_seconds']:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
