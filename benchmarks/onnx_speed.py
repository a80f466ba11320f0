"""Prefill and decode tokens/s on the CPU: ONNX Runtime, from both engines, against PyTorch's `generate`.

    python benchmarks/onnx_speed.py            # 10 minutes on 2 cores; table, and benchmarks/results/onnx.json
    python benchmarks/onnx_speed.py --quick    # a few tokens, once: does it run

SmolLM2-135M-Instruct merged with an adapter of random factors, exported by `loraone-export onnx` with both engines,
in fp32 and int4. A prompt of 128 tokens, then 128 tokens greedily, batch 1. The competitors take turns in one
process, on the same number of threads, PyTorch next to each of the others; given are medians over the repeats, and
the median of the ratios to the PyTorch run beside. Prefill is the time to the first token, decode that of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraone_init.models.sources import resolve_model

GOAL = 1.5  # × PyTorch's decoding
PYTORCH = "PyTorch generate"
FOLDERS = [(engine, dtype) for engine in ("torch", "genai") for dtype in ("fp32", "int4")]


@dataclass(frozen=True)
class Times:
    """Seconds to the first token, and for the others."""

    prefill: float
    decode: float


Run = Callable[[Sequence[int], int], Times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="to generate")
    parser.add_argument("--folders", type=Path, help="where exported folders are kept, and taken from if there")
    parser.add_argument("--quick", action="store_true", help="once, 16 and 8 tokens, nothing written")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "onnx.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.prompt, arguments.tokens = 1, 16, 8

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        folders = export(arguments.folders or Path(directory), arguments.threads)
        repeats = measure(folders, arguments)
    result = summarise(repeats, arguments)
    print_table(result)
    if not arguments.quick:
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def export(work: Path, threads: int) -> dict[str, Path]:
    """The folders by what made them, and the merged model for PyTorch as PYTORCH."""
    work.mkdir(parents=True, exist_ok=True)
    base, adapter, merged = resolve_model("demo").directory, work / "adapter", work / "merged"
    if not adapter.exists():
        torch.manual_seed(0)
        settings = LoraConfig(r=8, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
        settings.task_type = "CAUSAL_LM"
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(adapter)
    commands = {merged: ["merged"]}
    commands |= {work / f"{e}-{d}": ["onnx", "--engine", e, "--dtype", d] for e, d in FOLDERS}
    for folder, options in commands.items():
        if not folder.exists():
            print(f"exporting {folder.name}", flush=True)
            command = [sys.executable, "-m", "loraone_init.cli.export", *options, str(base), str(adapter)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run([*command, "-o", str(folder), "--quiet"], env=environment, check=True)
    return {PYTORCH: merged} | {f"{engine} {dtype}": work / f"{engine}-{dtype}" for engine, dtype in FOLDERS}


def measure(folders: dict[str, Path], arguments: argparse.Namespace) -> list[dict[str, dict[str, Times]]]:
    """For every repeat and competitor: its times and, under PYTORCH, those of PyTorch just before.

    One competitor is in memory at a time beside PyTorch; each runs once before it counts.
    """
    model = AutoModelForCausalLM.from_pretrained(folders[PYTORCH], dtype=torch.float32).eval()
    prompt = np.random.default_rng(0).integers(100, model.config.vocab_size, arguments.prompt).tolist()
    repeats: list[dict[str, dict[str, Times]]] = [{} for _ in range(arguments.repeats)]

    def pytorch(prompt: Sequence[int], count: int) -> Times:
        return time_pytorch(model, prompt, count)

    for name, folder in folders.items():
        if name == PYTORCH:
            continue
        for runtime, open_run in (("onnxruntime", open_onnxruntime), ("onnxruntime-genai", open_genai)):
            run = open_run(folder, arguments.threads)
            for warm_up in (pytorch, run):
                warm_up(prompt, 4)
            for repeat in repeats:
                pair = {PYTORCH: pytorch(prompt, arguments.tokens), "this": run(prompt, arguments.tokens)}
                repeat[f"{name}, {runtime}"] = pair
            print(f"measured {name}, {runtime}", flush=True)
            del run
    return repeats


def time_pytorch(model: PreTrainedModel, prompt: Sequence[int], count: int) -> Times:
    """`generate` for one token, then for all: the difference is decoding."""
    ids = torch.tensor([prompt])

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return time.perf_counter() - start

    first = seconds(1)
    return Times(first, seconds(count) - first)


def open_onnxruntime(folder: Path, threads: int) -> Run:
    """A loop over the session, caches handed on without a copy."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    (graph,) = folder.glob("onnx/model*.onnx")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    value_of = onnxruntime.OrtValue.ortvalue_from_numpy

    def run(prompt: Sequence[int], count: int) -> Times:
        start, first = time.perf_counter(), 0.0
        tokens, seen = np.array([prompt]), 0
        empty = {name: (1, value.shape[1], 0, value.shape[3]) for name, value in inputs.items() if "past" in name}
        cache = {name: value_of(np.zeros(shape, np.float32)) for name, shape in empty.items()}
        for _ in range(count):
            positions = np.arange(seen, seen + tokens.shape[1])[None]
            seen += tokens.shape[1]
            feed = {"input_ids": tokens, "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions}
            given = {name: value_of(value) for name, value in feed.items() if name in inputs}
            made = dict(zip(outputs, session.run_with_ort_values(outputs, given | cache), strict=True))
            cache = {name: made[name.replace("past_key_values", "present")] for name in cache}
            tokens = made["logits"].numpy()[:, -1:].argmax(-1)
            first = first or time.perf_counter() - start
        return Times(first, time.perf_counter() - start - first)

    return run


def open_genai(folder: Path, threads: int) -> Run:
    config = onnxruntime_genai.Config(str(folder))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = onnxruntime_genai.Model(config)

    def run(prompt: Sequence[int], count: int) -> Times:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + count
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        start, first = time.perf_counter(), 0.0
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(list(prompt))
        for _ in range(count):
            generator.generate_next_token()
            first = first or time.perf_counter() - start
        return Times(first, time.perf_counter() - start - first)

    return run


def summarise(repeats: list[dict[str, dict[str, Times]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def rates(times: Times) -> dict[str, float]:
        return {"prefill": arguments.prompt / times.prefill, "decode": (arguments.tokens - 1) / times.decode}

    cases = {}
    for name in repeats[0]:
        pairs = [(rates(repeat[name]["this"]), rates(repeat[name][PYTORCH])) for repeat in repeats]
        cases[name] = {
            stage: {
                "tokens_per_second": median(this[stage] for this, _ in pairs),
                "pytorch_beside": median(that[stage] for _, that in pairs),
                "ratio": median(this[stage] / that[stage] for this, that in pairs),
                "ratios": [round(this[stage] / that[stage], 3) for this, that in pairs],
            }
            for stage in ("prefill", "decode")
        }
    return {
        "machine": {
            "python": platform.python_version(),
            "threads": arguments.threads,
            "load_average": os.getloadavg()[0],
            **{name: version(name) for name in ("torch", "transformers", "onnxruntime", "onnxruntime-genai")},
        },
        "repeats": arguments.repeats,
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.tokens,
        "cases": cases,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{'':<34} {'prefill/s':>9} {'× PyTorch':>9} {'decode/s':>9} {'× PyTorch':>9} {'range':>11}")
    beside = [case["decode"]["pytorch_beside"] for case in result["cases"].values()]
    prefill = [case["prefill"]["pytorch_beside"] for case in result["cases"].values()]
    print(f"{PYTORCH:<34} {median(prefill):9.1f} {1:9.2f} {median(beside):9.1f} {1:9.2f}")
    for name, case in result["cases"].items():
        first, rest = case["prefill"], case["decode"]
        spread = f"{min(rest['ratios']):.2f}-{max(rest['ratios']):.2f}"
        reached = "" if rest["ratio"] >= GOAL else f"  below {GOAL}"
        rates = f"{first['tokens_per_second']:9.1f} {first['ratio']:9.2f} {rest['tokens_per_second']:9.1f}"
        print(f"{name:<34} {rates} {rest['ratio']:9.2f} {spread:>11}{reached}")


if __name__ == "__main__":
    main()
