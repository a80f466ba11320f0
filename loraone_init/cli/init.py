"""The command `loraone-init`. Heavy imports wait until the options have been read."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..failures import one_line_errors
from ..version import __version__
from .support import CONTEXT, Command, OrAuto, parse_modules, row_options, source_options, start_logging

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..choosing.sample_size import Growth
    from ..config import InitConfig
    from ..data.labels import LabelSource
    from ..data.options import DataOptions
    from ..models.opening import OpenModel
    from ..processes.processes import Processes


logger = logging.getLogger(__name__)


@click.command("loraone-init", cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("data")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write: FILE.safetensors, or a PEFT directory.  [required, but for --dry-run]",
)
@click.option(
    "--task",
    default="causal-lm",
    type=click.Choice(["causal-lm", "seq2seq-lm", "sequence-classification"]),
    help="What MODEL is fine-tuned for.",
)
@click.option("-r", "--rank", default=8, type=click.IntRange(min=1), help="Columns of B and rows of A.")
@click.option(
    "--rank-budget",
    help="Ranks by layer, by its spectrum, in place of --rank: their average such as 8, or sum such as total:1680.",
)
@click.option("--alpha", default=16.0, help="LoRA's α.")
@click.option(
    "--gamma",
    default=128.0,
    type=OrAuto(click.FLOAT),
    metavar="FLOAT|auto",
    help="γ: the step's largest singular value is s/γ in every layer. auto: the one with the lowest loss on rows held"
    " out.",
)
@click.option(
    "--scaling", default="rslora", type=click.Choice(["rslora", "lora"]), help="s = α/√r (rslora) or α/r (lora)."
)
@click.option(
    "--target-modules",
    default="all-linear",
    help="all-linear, names separated by commas, or a regular expression for whole module names.",
)
@click.option("--exclude-modules", help="Names or a regular expression of layers to leave out.")
@click.option(
    "--samples",
    default=64,
    type=OrAuto(click.IntRange(min=1)),
    help="Rows to draw from the data; auto: doubled until two halves of them agree.",
)
@click.option(
    "--max-samples", type=click.IntRange(min=2), help="Rows that --samples auto draws, at most.  [default: 512]"
)
@click.option(
    "--sample-tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="How far its halves' subspaces may be apart, by their mean sin².  [default: 0.4]",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    help="Rows to draw beside these, for losses on rows not in the gradient.  [default: 16 with --gamma auto]",
)
@click.option("--max-length", default=1024, type=click.IntRange(min=2), help="Tokens kept of a row.")
@click.option("--batch-size", default=8, type=click.IntRange(min=1), help="Rows that pass a block together, at most.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Their tokens, at most.  [default: 512 on a CPU, 8192 on a GPU]",
)
@row_options
@click.option("--block-path", help="Name of the list of blocks, for a model where it cannot be found.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
    help="What to compute in; gradients and SVDs are fp32 or better in any case.",
)
@click.option(
    "--placement",
    default="auto",
    type=click.Choice(["auto", "device", "host", "disk"]),
    help="Where blocks' weights are between their uses: on the device, in host memory, or on disk.",
)
@click.option(
    "--max-memory",
    help="What may be used of the device, such as 8GiB; what is left of it keeps block inputs, then activations.",
)
@click.option("--seed", default=0, help="Seeds the choice of rows and the SVDs.")
@click.option("--base-name", help="What the adapter calls its base, such as a hub id.  [default: MODEL's path or id]")
@source_options
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it would take, read no weights.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print the libraries' messages too, and tracebacks.")
@click.version_option(__version__, prog_name="loraone-init")
def main(verbose: bool, quiet: bool, **options: Any) -> None:
    """Write the LoRA-One starting adapter of MODEL for DATA.

    MODEL is a Hugging Face directory, a hub id, a .gguf file, or "demo" for the packaged SmolLM2-135M-Instruct. DATA
    is a .jsonl, .json, .csv, .parquet or .txt file or a hub data set id, with columns text, prompt and completion,
    messages, question and answer, or instruction and output; or text and label.

    \b
      loraone-init demo examples/gsm8k.jsonl -o adapters.safetensors
    """
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--output'.")
    source = click.get_current_context().get_parameter_source("rank")
    if options["rank_budget"] is not None and source is not ParameterSource.DEFAULT:
        raise click.UsageError("--rank and --rank-budget exclude each other.")
    if options["samples"] != "auto" and (options["max_samples"] or options["sample_tolerance"]):
        raise click.UsageError("--max-samples and --sample-tolerance are for --samples auto.")
    if "LOCAL_RANK" in os.environ:  # torchrun: else torch adds a trace of its own to the line on a lost rank
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..processes.processes import joined

    with one_line_errors(verbose), joined(options["device"], verbose) as processes:
        _run(processes, verbose, quiet, **options)


def _run(
    processes: Processes,
    verbose: bool,
    quiet: bool,
    *,
    model: str,
    data: str,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    from ..adapter.files import check_output
    from ..adapter.inputs import check_apart
    from ..data.classification_rows import read_labels
    from ..data.sample import load_batches
    from ..errors import ModelError
    from ..initialization.initialize import initialize
    from ..machine import own_peaks, parse_size, use_one_heap
    from .bars import Bars
    from .dry_run import plan, print_plan
    from .summary import print_summary, summarize, warn_if_worse

    config = _init_config(options)
    growth = _growth(options)
    wanted = _data_options(options)
    max_memory = parse_size(options["max_memory"]) if options["max_memory"] else None
    is_main = processes.index == 0
    if output is not None and is_main:
        check_apart(output, (model, data))
        check_output(output, options["overwrite"])
    start_logging(quiet, verbose, silent=not is_main)
    use_one_heap()
    with Bars(shown=is_main and not (quiet or as_json)) as monitor:
        with monitor.timed("open"):
            opened = _open(
                processes, model, max_memory, options, partial(read_labels, data, wanted, token=options["token"])
            )
        if opened.tokenizer is None:
            raise ModelError(
                f"{model} has no tokenizer that can be read (--verbose says why); put its files beside config.json"
            )
        with monitor.timed("data"), processes.first():
            on_cpu = opened.device.type == "cpu"
            wanted = replace(wanted, batch_tokens=options["batch_tokens"] or (512 if on_cpu else 8192))
            sample = load_batches(data, opened.tokenizer, wanted, token=options["token"], labels=opened.labels)
        if options["dry_run"]:
            if is_main:
                print_plan(plan(opened, sample, config, growth), as_json)
            return
        assert output is not None
        adapter = initialize(
            opened, sample, config, max_memory=max_memory, monitor=monitor, processes=processes, growth=growth
        )
        peaks = processes.gather(own_peaks())
        processes.finish()
        if not is_main:
            return
        with monitor.timed("save"):
            adapter.save(output, overwrite=options["overwrite"])
    summary = summarize(adapter, output, monitor, peaks, opened.opened_from)
    _tell_paths(adapter)
    if not quiet or as_json:
        print_summary(summary, as_json)
    warn_if_worse(adapter.loss, adapter.gamma)


def _open(
    processes: Processes, model: str, max_memory: int | None, options: dict[str, Any], labels: LabelSource
) -> OpenModel:
    """The model on this process's device. What has to be fetched or converted is so by one process of each node."""
    from ..models.opening import open_model
    from ..models.sources import resolve_model

    revision, token, trust = options["revision"], options["token"], options["trust_remote_code"]
    if processes.size > 1:
        with processes.first():
            resolve_model(model, revision=revision, token=token, trust_remote_code=trust)
    return open_model(
        model,
        revision=revision,
        token=token,
        trust_remote_code=trust,
        device=processes.device,
        dtype=options["dtype"],
        block_path=options["block_path"],
        placement=options["placement"],
        max_memory=max_memory,
        weights=not options["dry_run"],
        task=options["task"],
        labels=labels,
        seed=options["seed"],
        base_name=options["base_name"],
    )


def _tell_paths(adapter: Adapter) -> None:
    """Paths of this machine would be published with the adapter."""
    base, data = adapter.base.get("name"), adapter.sample.get("source")
    if base is not None and os.path.isabs(base):
        logger.info("The adapter names its base by a path on this machine, %s; --base-name gives another", base)
    if data is not None and os.path.isabs(data):
        logger.info(
            "The adapter names its data by a path on this machine, %s; a relative one is recorded as given", data
        )


def _init_config(options: dict[str, Any]) -> InitConfig:
    from ..config import InitConfig, parse_rank_budget

    budget = options["rank_budget"]
    return InitConfig(
        rank=options["rank"],
        alpha=options["alpha"],
        gamma=options["gamma"],
        scaling=options["scaling"],
        target_modules=parse_modules(options["target_modules"]),
        exclude_modules=parse_modules(options["exclude_modules"]),
        block_path=options["block_path"],
        seed=options["seed"],
        rank_budget=None if budget is None else parse_rank_budget(budget),
    )


def _growth(options: dict[str, Any]) -> Growth | None:
    """How the sample is to grow; None where its size is given."""
    from ..choosing.sample_size import DEFAULT_TOLERANCE, Growth

    return Growth(options["sample_tolerance"] or DEFAULT_TOLERANCE) if options["samples"] == "auto" else None


def _data_options(options: dict[str, Any]) -> DataOptions:
    from ..choosing.sample_size import DEFAULT_MAX_SAMPLES
    from ..data.formats import parse_columns
    from ..data.options import DataOptions
    from ..data.sampling import HELD_OUT

    samples, most = options["samples"], options["max_samples"] or DEFAULT_MAX_SAMPLES
    return DataOptions(
        samples=most if samples == "auto" else samples,
        max_length=options["max_length"],
        batch_size=options["batch_size"],
        batch_tokens=options["batch_tokens"] or DataOptions.batch_tokens,
        split=options["split"],
        columns=parse_columns(options["columns"]) if options["columns"] else None,
        completion_only=options["completion_only"],
        assistant_only=options["assistant_only"],
        seed=options["seed"],
        task=options["task"],
        held_out=options["held_out"] or (HELD_OUT if options["gamma"] == "auto" else 0),
    )
