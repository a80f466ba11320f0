"""The command `loraone-init`. Heavy imports wait until the options have been read."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from ..choosing.sample_size import DEFAULT_MAX_SAMPLES, Growth
from ..config import AUTO, PUBLISHED_GAMMA, InitConfig, Scaling, Schedule
from ..data.options import HELD_OUT, DataOptions
from ..failures import one_line_errors
from ..tasks import TASKS
from ..version import __version__
from .init_options import InitOptions
from .publishing import check_private, check_push, push
from .recipe import recipe_option
from .run_config import DataArgument, config_in_use, config_option, given_in_file
from .support import (
    CONTEXT,
    Command,
    OrAuto,
    message_options,
    push_options,
    row_options,
    source_options,
    start_logging,
    under,
)

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..data.labels import LabelSource
    from ..data.rows import Rows
    from ..data.sample import Sample
    from ..models.opening import OpenModel
    from ..monitor import Monitor
    from ..processes.processes import Processes

logger = logging.getLogger(__name__)

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

    with one_line_errors(options.verbose), joined(options.device, options.verbose) as processes:
        _run(processes, options)


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


def _run(processes: Processes, options: InitOptions) -> None:
    """What needs no torch is checked before it is imported."""
    from ..adapter.files import check_output, is_single_file
    from ..adapter.inputs import check_apart
    from ..data.rows import read_if_local, require_packages
    from ..libraries import import_transformers
    from ..machine import own_peaks, use_one_heap
    from ..models.sources import check_model
    from .run_record import check_record, record_file, recorded_options, without_machine, write_record

    config, growth, wanted, max_bytes = options.config(), options.growth(), options.rows(), options.max_bytes()
    is_main, output = processes.index == 0, options.output
    if output is not None and is_main:
        check_apart(output, (options.model, options.data, config_in_use()))
        check_output(output, options.overwrite)
        check_record(record_file(output, is_file=is_single_file(output)), options.overwrite)
    start_logging(options.quiet, options.verbose, silent=not is_main)
    repository = check_push(options) if is_main else None
    require_packages(options.data)
    check_model(options.model, options.revision)
    data = read_if_local(options.data, wanted.split)
    use_one_heap()
    from .bars import Bars

    with Bars(shown=is_main and not (options.quiet or options.as_json)) as monitor:
        with monitor.timed("import"):
            import_transformers(options.verbose, options.quiet)
            from ..initialization.initialize import initialize
            from ..layers.targets import left_out_layers
            from .dry_run import plan, print_plan
            from .summary import print_summary, print_warning, summarize

        opened, sample = _prepare(processes, options, data, monitor)
        del data  # all rows of a file
        if options.dry_run:
            if is_main:
                planned = plan(opened, sample, config, growth, options.schedule, max_bytes)
                monitor.stop()
                print_plan(planned, options.as_json)
            return
        assert output is not None
        monitor.expect(sample, config.gamma, growth)
        adapter = initialize(
            opened,
            sample,
            config,
            max_memory=max_bytes,
            schedule=options.schedule,
            monitor=monitor,
            processes=processes,
            growth=growth,
        )
        peaks = processes.gather(own_peaks())
        processes.finish()
        if not is_main:
            return
        with monitor.timed("save"):
            recorded = recorded_options(options, options.base_name)
            adapter = replace(adapter, run=without_machine(recorded))
            adapter.save(output, overwrite=options.overwrite)
            write_record(record_file(output, is_file=is_single_file(output)), recorded)
    _tell_paths(adapter, output, is_published=repository is not None)
    published = None if repository is None else push(repository, adapter, recorded, output)
    left_out = 0 if config.vision_layers else left_out_layers(opened.module)
    summary = summarize(adapter, output, monitor, peaks, opened.opened_from, left_out)
    summary["published"] = published
    if not options.quiet or options.as_json:
        print_summary(summary, options.as_json)
    print_warning(summary)


def _prepare(
    processes: Processes, options: InitOptions, data: Rows | str, monitor: Monitor
) -> tuple[OpenModel, Sample]:
    """The model opened, and the rows drawn. data: rows of a file, or the id of a hub data set."""
    from ..data.classification_rows import read_labels
    from ..data.sample import load_sample
    from ..errors import ModelError

    wanted = options.rows()
    with monitor.timed("open"):
        labels = partial(read_labels, data, wanted, token=options.token)
        opened = _open(processes, options, options.max_bytes(), labels)
    if opened.tokenizer is None:
        raise ModelError(
            f"{options.model} has no tokenizer that can be read (--verbose says why); put its files beside config.json"
        )
    with monitor.timed("data"), processes.first():
        wanted = wanted.for_device(opened.device.type)
        return opened, load_sample(data, opened.tokenizer, wanted, token=options.token, labels=opened.labels)


def _open(processes: Processes, options: InitOptions, max_bytes: int | None, labels: LabelSource) -> OpenModel:
    """The model on this process's device. What has to be fetched or converted is so by one process of each node."""
    from ..models.opening import open_model
    from ..models.sources import resolve_model

    if processes.size > 1:
        with processes.first():
            resolve_model(
                options.model,
                revision=options.revision,
                token=options.token,
                trust_remote_code=options.trust_remote_code,
            )
    return open_model(
        options.model,
        revision=options.revision,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
        device=processes.device,
        dtype=options.dtype,
        block_path=options.block_path,
        placement=options.placement,
        max_memory=max_bytes,
        weights=not options.dry_run,
        task=options.task,
        labels=labels,
        seed=options.seed,
        base_name=options.base_name,
    )


def _tell_paths(adapter: Adapter, output: Path, is_published: bool) -> None:
    """Say which paths of this machine the adapter holds: whoever publishes it publishes them.

    A PEFT directory is what people publish, so that it gets a warning; so does what is published at once.
    """
    from ..adapter.files import is_single_file

    base, data = adapter.base.get("name"), adapter.sample.get("source")
    level = logging.INFO if is_single_file(output) and not is_published else logging.WARNING
    if base is not None and os.path.isabs(base):
        logger.log(level, "The adapter names its base by a path on this machine, %s; --base-name gives another", base)
    if data is not None and os.path.isabs(data):
        logger.log(
            level, "The adapter names its data by a path on this machine, %s; a relative one is recorded as given", data
        )
