"""Memory and time over depth and number of samples, against PEFT's lora_ga.

    python benchmarks/scale.py            # about 10 minutes on 2 cores; table, picture, benchmarks/results/scale.json
    python benchmarks/scale.py --quick    # a minute, smallest models, nothing written: to see that it works

Synthetic Llama checkpoints with random weights in fp32, depth 4 to 64 at 8 rows, and 8 to 256 rows at depth 8, rows of
64 tokens, r = 8, all linear layers of the blocks. Ours goes block by block (--schedule blocks), the schedule that is
made for little memory. Two figures of memory:

process memory       peak resident memory of the whole process, as the operating system counts it.
device-side memory   peak of the bytes in live tensors at any operation: what torch.cuda.max_memory_allocated tells of
                     a GPU. Ours reads weights from disk, keeps block inputs in a temporary file, and finished factors
                     do not count, since they are moved off the device. PEFT's is all of it.

Times are those of whole processes, without the counting of live tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from init import MACHINE, measure, run_python

HERE = Path(__file__).parent
DEPTHS, ROWS = (4, 8, 16, 32, 64), (8, 32, 128, 256)
DEPTH_OF_ROWS, ROWS_OF_DEPTHS = 8, 8
CHEAP = 64  # blocks × rows up to which a run is repeated
WORDS, TOKENS = 500, 64
ALLOWED = 0.02  # of PEFT's slope over depth

MAKE = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

directory, depth, width, num_words = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth, num_attention_heads=4,
    vocab_size=num_words + 3, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=256,
)
AutoModelForCausalLM.from_config(config).save_pretrained(directory)
vocabulary = {"<pad>": 0, "</s>": 1, "?": 2} | {f"w{i}": i + 3 for i in range(num_words)}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="?")
tokenizer.save_pretrained(directory)
"""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    depths: Sequence[int] = DEPTHS
    rows: Sequence[int] = ROWS
    width: int = 384
    repeats: int = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest models, once, nothing written")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scale.json")
    arguments = parser.parse_args()
    sizes = Sizes((2, 4), (8, 16), 48, 1) if arguments.quick else Sizes()
    # This process stays small: a child's peak memory counts that of its parent at the fork.
    result: dict[str, Any] = {"machine": json.loads(run_python(MACHINE)), "width": sizes.width, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        result["depth"] = {d: compare(work, d, ROWS_OF_DEPTHS, sizes) for d in sizes.depths}
        depth = min(DEPTH_OF_ROWS, max(sizes.depths))
        result["rows"] = {
            n: result["depth"][depth] if n == ROWS_OF_DEPTHS else compare(work, depth, n, sizes) for n in sizes.rows
        }
    result["slopes"] = slopes(result["depth"])
    print(f"\n{markdown(result)}")
    if not arguments.quick:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        draw(result, arguments.output.with_suffix(".png"))


def compare(work: Path, depth: int, rows: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Medians of ours and PEFT's, by turns."""
    model, data = work / f"model-{depth}", work / f"{rows}.jsonl"
    if not model.exists():
        measure([sys.executable, "-c", MAKE, *map(str, (model, depth, sizes.width, WORDS))])
    data.write_text("".join(json.dumps(make_row(index)) + "\n" for index in range(rows)))
    ours = [sys.executable, "-m", "loraone_init", str(model), str(data), "-o", str(work / "ours.safetensors")]
    ours += ["--samples", str(rows), "--max-length", str(TOKENS), "--placement", "disk", "--schedule", "blocks"]
    ours += ["--gamma", "128", "--overwrite", "--json"]  # no search: PEFT has none
    shape = [str(model), str(data), str(work / "peft"), "--max-length", str(TOKENS)]
    commands = {"ours": ours, "peft": [sys.executable, str(HERE / "peers" / "peft_lora_ga.py"), *shape]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(sizes.repeats if depth * rows <= CHEAP else 1):
        for name, command in commands.items():
            found[name].append(measure(command))
    summary = {}
    for name, runs in found.items():
        live = measure([sys.executable, str(HERE / "peers" / "live.py"), name, *shape])
        summary[name] = {
            "seconds": median(run["seconds"] for run in runs),
            "process_mb": median(run["peak_mb"] for run in runs),
            "device_mb": int(live["printed"].split()[-1]) / 1e6,
            "runs": len(runs),
        }
        print(f"{depth:3} blocks {rows:4} rows  {name:5} {describe(summary[name])}", flush=True)
    return summary


def make_row(index: int) -> dict[str, str]:
    """Of 64 tokens with its end; half of them are trained on."""
    words = [f"w{(7 * index + 13 * position * position) % WORDS}" for position in range(TOKENS - 1)]
    return {"question": " ".join(words[: TOKENS // 2]), "answer": " ".join(words[TOKENS // 2 :])}


def slopes(by_depth: dict[int, dict[str, dict[str, float]]]) -> dict[str, float]:
    """MB for each block more, by least squares; and ours over PEFT's, of device-side memory."""
    found = {name: slope({d: case[name]["device_mb"] for d, case in by_depth.items()}) for name in ("ours", "peft")}
    return {**found, "ratio": found["ours"] / found["peft"], "allowed": ALLOWED}


def slope(points: dict[int, float]) -> float:
    x_mean, y_mean = sum(points) / len(points), sum(points.values()) / len(points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points.items()) / sum((x - x_mean) ** 2 for x in points)


def describe(summary: dict[str, float]) -> str:
    return f"{summary['seconds']:7.1f} s {summary['process_mb']:7.0f} MB {summary['device_mb']:7.1f} MB device-side"


def markdown(result: dict[str, Any]) -> str:
    """The tables, and what they show."""
    lines = []
    for over in ("depth", "rows"):
        title = "blocks" if over == "depth" else "rows"
        lines += [f"| {title} | | wall | process memory | device-side memory |", "|---|---|---|---|---|"]
        for number, case in result[over].items():
            for name, label in (("ours", "ours"), ("peft", "PEFT lora_ga")):
                s = case[name]
                figures = f"{s['seconds']:.1f} s | {s['process_mb']:,.0f} MB | {s['device_mb']:,.1f} MB"
                lines.append(f"| {number} | {label} | {figures} |")
        lines.append("")
    s = result["slopes"]
    lines.append(
        f"Device-side memory for each block more: ours {s['ours']:.4f} MB, PEFT {s['peft']:.2f} MB,"
        f" {s['ratio']:.2%} of it (to reach: {s['allowed']:.0%} at most)."
    )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Device-side memory, process memory and time, over depth and over rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    kinds = {"device_mb": "device-side memory (MB)", "process_mb": "process memory (MB)", "seconds": "wall time (s)"}
    for row, over in zip(axes, ("depth", "rows"), strict=True):
        for axis, (key, title) in zip(row, kinds.items(), strict=True):
            for name, label in (("ours", "ours"), ("peft", "PEFT lora_ga")):
                points = {int(number): case[name][key] for number, case in result[over].items()}
                axis.plot(list(points), list(points.values()), "o-", label=label)
            axis.set(xlabel="blocks" if over == "depth" else "rows", title=title, xscale="log", ylim=(0, None))
            axis.set_xticks([int(number) for number in result[over]], labels=list(map(str, result[over])), minor=False)
            axis.minorticks_off()
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
