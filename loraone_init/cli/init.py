"""The options of `loraone-init`, and what goes together of them. What the command does is in `init_run`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from ..choosing.sample_size import DEFAULT_MAX_SAMPLES, Growth
from ..config import AUTO, PUBLISHED_GAMMA, InitConfig, Scaling, Schedule
from ..data.options import HELD_OUT, DataOptions
from ..failures import one_line_errors
from ..tasks import TASKS
from ..version import __version__
from .init_options import InitOptions
from .publishing import check_private
from .recipe import recipe_option
from .run_config import DataArgument, config_option, given_in_file
from .support import CONTEXT, Command, OrAuto, message_options, push_options, row_options, source_options, under

_output = under("Output")
_adapted = under("What is adapted")
_data = under("Data")
_step = under("Step")
_memory = under("Memory and speed")


@click.command("loraone-init", cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("data", cls=DataArgument)
@_output(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write: FILE.safetensors, or a PEFT directory.  [required, but for --dry-run]",
)
@_output("--overwrite", is_flag=True, help="Replace an output that exists.")
@_output("--dry-run", is_flag=True, help="Say what would be done and what it would take, read no weights.")
@_adapted("-r", "--rank", default=InitConfig.rank, type=click.IntRange(min=1), help="Columns of B and rows of A.")
@_adapted(
    "--rank-budget",
    help="Ranks by layer, by its spectrum, in place of --rank: their average such as 8, or sum such as total:1680.",
)
@_adapted(
    "--target-modules",
    default=InitConfig.target_modules,
    help="all-linear, names separated by commas, or a regular expression for whole module names.",
)
@_adapted("--exclude-modules", help="Names or a regular expression of layers to leave out.")
@_adapted(
    "--vision-layers", is_flag=True, help="Adapt the layers for images and sound too, which are left out otherwise."
)
@_adapted(
    "--task",
    default=DataOptions.task,
    type=click.Choice(TASKS),
    help="What MODEL is fine-tuned for.",
)
@_adapted("--block-path", help="Name of the list of blocks, for a model where it cannot be found.")
@_data(
    "--samples",
    default=DataOptions.samples,
    type=OrAuto(click.IntRange(min=1)),
    metavar="N|auto",
    help="Rows to draw from the data; auto: doubled until two halves of them agree.",
)
@_data(
    "--max-samples",
    type=click.IntRange(min=2),
    help=f"Rows that --samples auto draws, at most.  [default: {DEFAULT_MAX_SAMPLES}]",
)
@_data(
    "--sample-tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help=f"How far its halves' subspaces may be apart, by their mean sin².  [default: {Growth.tolerance}]",
)
@_data(
    "--held-out",
    type=click.IntRange(min=0),
    help="Rows to draw beside these, for the search of γ and losses on rows not in the gradient.  [default:"
    f" {HELD_OUT} with --gamma auto, else 0]",
)
@_data("--max-length", default=DataOptions.max_length, type=click.IntRange(min=2), help="Tokens kept of a row.")
@row_options
@_data("--seed", default=InitConfig.seed, help="Seeds the choice of rows and the SVDs.")
@_step(
    "--gamma",
    default=InitConfig.gamma,
    type=OrAuto(click.FLOAT),
    metavar="X|auto",
    help="γ: the step's largest singular value is s/γ in every layer. auto: the one with the lowest loss on rows held"
    f" out; {PUBLISHED_GAMMA:g}: the published one.",
)
@_step("--alpha", default=InitConfig.alpha, help="LoRA's α.")
@_step(
    "--scaling",
    default=InitConfig.scaling,
    type=click.Choice(get_args(Scaling)),
    help="s = α/√r (rslora) or α/r (lora).",
)
@_memory("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
@_memory(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
    help="What to compute in; gradients and SVDs are fp32 or better in any case.",
)
@_memory(
    "--schedule",
    default=AUTO,
    type=click.Choice([AUTO, *get_args(Schedule)]),
    help="rows: each micro-batch through the whole model at once, fastest. blocks: all of them through one block, then"
    " the next, in the memory of one block. auto: rows where that fits.",
)
@_memory("--max-memory", help="What may be used of the device, such as 8GiB; what is left of it keeps block inputs.")
@_memory(
    "--placement",
    default="auto",
    type=click.Choice(["auto", "device", "host", "disk"]),
    help="Where blocks' weights are between their uses: on the device, in host memory, or on disk.",
)
@_memory(
    "--batch-size",
    default=DataOptions.batch_size,
    type=click.IntRange(min=1),
    help="Rows that pass a block together, at most.",
)
@_memory(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Their tokens, at most.  [default: 512 on a CPU, 8192 on a GPU]",
)
@_output("--base-name", help="What the adapter calls its base, such as a hub id.  [default: MODEL's path or id]")
@_output("--license", help="Licence of the adapter for its model card, as the hub spells it: apache-2.0, mit …")
@push_options
@source_options
@config_option("loraone-init")
@recipe_option
@message_options
@click.version_option(__version__, prog_name="loraone-init")
def main(**given: Any) -> None:
    """Write the LoRA-One starting adapter of MODEL for DATA.

    MODEL is a Hugging Face directory, a hub id, a .gguf file, or "demo" for the packaged SmolLM2-135M-Instruct. DATA
    is a .jsonl, .json, .csv, .parquet or .txt file or a hub data set id, with columns text, prompt and completion,
    messages, question and answer, or instruction and output; or text and label.

    \b
      loraone-init demo examples/gsm8k.jsonl -o adapters.safetensors
    """
    options = _settle_ranks(InitOptions(**given))
    if options.output is None and not options.dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    options = _settle_samples(options)
    check_private(options)
    if "LOCAL_RANK" in os.environ:  # torchrun: else torch adds a trace of its own to the line on a lost rank
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..processes.processes import joined
    from .init_run import run

    with one_line_errors(options.verbose), joined(options.device, options.verbose) as processes:
        run(processes, options)


def _settle_ranks(options: InitOptions) -> InitOptions:
    """Refuses --rank beside --rank-budget, unless one of them is from a file: then the one given here is meant."""
    context = click.get_current_context()
    source = context.get_parameter_source("rank")
    if options.rank_budget is None or source is ParameterSource.DEFAULT:
        return options
    if source is context.get_parameter_source("rank_budget"):
        raise click.UsageError("--rank and --rank-budget exclude each other.")
    return options if given_in_file(context, "rank") else replace(options, rank_budget=None)


def _settle_samples(options: InitOptions) -> InitOptions:
    """Refuses options of --samples auto without it, unless they are from a file whose --samples is not meant."""
    context = click.get_current_context()
    if options.samples == AUTO:
        return options
    for name in ("max_samples", "sample_tolerance"):
        if getattr(options, name) is not None and not given_in_file(context, name):
            raise click.UsageError("--max-samples and --sample-tolerance are for --samples auto.")
    return replace(options, max_samples=None, sample_tolerance=None)
