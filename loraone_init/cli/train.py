"""The command `loraone-train`. Heavy imports wait until the options have been read."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..data.options import DataOptions
from ..errors import printable
from ..failures import one_line_errors
from ..training.options import Device, OptimizerName, Precision, Reports, Schedule, TrainOptions, require_packages
from ..version import __version__
from .publishing import check_private, check_push, push
from .run_config import DataArgument, config_in_use, config_option
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
from .train_options import TrainCommand
from .waiting import LIBRARIES, READING, Waiting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..adapter.hub import Repository
    from ..adapter.plain import PlainAdapter
    from ..data.rows import Rows
    from ..data.sample import Sample
    from ..training.trainer import Outcome

logger = logging.getLogger(__name__)

_files = under("Adapter and output")
_data = under("Data")
_step = under("Steps")
_memory = under("Memory and speed")
_progress = under("Progress and checkpoints")


@click.command("loraone-train", cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("data", cls=DataArgument)
@_files("--adapter", required=True, type=click.Path(path_type=Path), help="What loraone-init or PEFT wrote.")
@_files("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the result.")
@_files("--resume", is_flag=True, help="Go on from the last whole checkpoint in the output.")
@_files("--overwrite", is_flag=True, help="Write into an output that exists.")
@_step("--epochs", default=TrainOptions.epochs, help="Times to go through the data.")
@_step("--max-steps", type=click.IntRange(min=1), help="Steps to take, whatever --epochs says.")
@_step(
    "--learning-rate",
    default=TrainOptions.learning_rate,
    type=OrAuto(click.FLOAT),
    metavar="X|auto",
    help="At its highest; auto: the best of a few that are tried for 20 steps each, on rows held out.",
)
@_step("--schedule", default=TrainOptions.schedule, type=click.Choice(get_args(Schedule)), help="Its course.")
@_step("--warmup", default=TrainOptions.warmup, help="Steps, or a share of all below 1, in which it rises from 0.")
@_step("--batch-size", default=TrainOptions.batch_size, type=click.IntRange(min=1), help="Rows in each process.")
@_step("--accumulation", default=TrainOptions.accumulation, type=click.IntRange(min=1), help="Batches of one step.")
@_step(
    "--optimizer",
    default=TrainOptions.optimizer,
    type=click.Choice(get_args(OptimizerName)),
    help="AdamW on preconditioned gradients, or plain.",
)
@_step("--damping", type=float, help="Of the preconditioner.  [default: what the adapter records]")
@_step("--weight-decay", default=TrainOptions.weight_decay, help="Of AdamW, decoupled.")
@_step("--max-grad-norm", default=TrainOptions.max_grad_norm, help="Gradients are clipped to it; 0 for no clipping.")
@_step("--seed", default=TrainOptions.seed, help="Seeds the order of rows, and dropout.")
@_data("--samples", type=click.IntRange(min=1), help="Rows to draw from the data.  [default: all]")
@_data("--max-length", default=DataOptions.max_length, type=click.IntRange(min=2), help="Tokens kept of a row.")
@_data("--eval-data", help="File or hub data set to evaluate on, before, after each epoch and at the end.")
@_data("--eval-split", help="Split of DATA, or of --eval-data, to evaluate on.")
@row_options
@_memory(
    "--device",
    default=TrainOptions.device,
    type=click.Choice(get_args(Device)),
    help="auto takes GPUs where there are.",
)
@_memory(
    "--precision", default=TrainOptions.precision, type=click.Choice(get_args(Precision)), help="Of the computation."
)
@_memory("--gradient-checkpointing", is_flag=True, help="Compute activations twice, to save memory.")
@_progress(
    "--logging-steps",
    default=TrainOptions.logging_steps,
    type=click.IntRange(min=1),
    help="Steps between two lines of progress.",
)
@_progress(
    "--save-steps",
    default=TrainOptions.save_steps,
    type=click.IntRange(min=1),
    help="Steps between two checkpoints.",
)
@_progress("--report-to", default=TrainOptions.report_to, type=click.Choice(get_args(Reports)), help="Where curves go.")
@push_options
@source_options
@config_option("loraone-train")
@message_options
@click.version_option(__version__, prog_name="loraone-train")
def main(**given: Any) -> None:
    """Train the adapter of MODEL on DATA, on from where loraone-init left it.

    MODEL and DATA are as for loraone-init, and tokens and label masks too. The output is a PEFT directory; its
    adapter_model.safetensors is our single-file form as well.

    \b
      loraone-train demo examples/gsm8k.jsonl --adapter adapters.safetensors \\
        -o trained --max-steps 20
      torchrun --no-python --nproc-per-node 2 loraone-train MODEL DATA \\
        --adapter adapters.safetensors -o trained
    """
    options = TrainCommand(**given)
    check_private(options)
    with one_line_errors(options.verbose):
        _run(options)


def _run(options: TrainCommand) -> None:
    """What needs no torch is checked before it is imported."""
    is_main = os.environ.get("RANK", "0") == "0"
    quiet = options.quiet or options.as_json
    start_logging(quiet, options.verbose, silent=not is_main)
    settings, evaluated = options.training(), options.rows_to_evaluate()
    _check(options, settings, is_main)
    repository = check_push(options) if is_main else None
    from ..data.rows import read_if_local

    asked = [(options.data, options.rows())]
    if evaluated is not None:
        asked.append((options.eval_data or options.data, evaluated))
    read = [(read_if_local(source, wanted.split), wanted) for source, wanted in asked]
    with Waiting(shown=is_main and not quiet) as waiting:
        waiting.say(LIBRARIES)
        from ..libraries import import_trainer

        import_trainer(options.verbose, quiet)
        from ..adapter.plain import load_to_train
        from ..models.sources import resolve_model
        from ..models.tokenizer import require_tokenizer
        from ..training.checkpoints import own_checkpoints, remove
        from ..training.trainer import train

        waiting.say(READING)
        start = load_to_train(options.adapter)
        _check_start(start, options)
        trust = options.trust_remote_code
        source = resolve_model(options.model, revision=options.revision, token=options.token, trust_remote_code=trust)
        tokenizer = require_tokenizer(source, trust)
        sample, *others = [_load(rows, tokenizer, wanted, options.token) for rows, wanted in read]
    del read  # all rows of files
    if is_main and not options.resume:  # --overwrite has been said
        remove(own_checkpoints(options.output))
    with redirect_stdout(sys.stderr):  # trackio prints, and standard output is for the result
        outcome = train(
            source,
            start,
            sample,
            options.output,
            settings,
            evaluation=others[0] if others else None,
            resume=options.resume,
            trust_remote_code=trust,
        )
    if is_main:
        _finish(outcome, options, repository)


def _check(options: TrainCommand, settings: TrainOptions, is_main: bool) -> None:
    """Raise a LoraOneError for paths that cannot be used, and for packages that are missing."""
    from ..adapter.files import is_single_file, weights_file
    from ..adapter.inputs import check_apart
    from ..data import rows as data_rows
    from ..errors import OutputError
    from ..models.sources import check_model
    from .run_record import check_record, record_file

    if is_single_file(options.output):
        raise OutputError(f"{options.output}: a training writes a directory, with checkpoints; leave .safetensors out")
    require_packages(settings)
    for needed in filter(None, (options.data, options.eval_data)):
        data_rows.require_packages(needed)
    if is_main:  # the others would find what this one writes
        check_apart(options.output, (options.model, options.data, options.adapter, options.eval_data, config_in_use()))
        _check_output(options.output, options.overwrite, options.resume)
        check_record(record_file(options.output, is_file=False), options.overwrite or options.resume)
    weights_file(options.adapter)
    check_model(options.model, options.revision)


def _check_start(start: Adapter | PlainAdapter, options: TrainCommand) -> None:
    """Raise ConfigError where this adapter cannot be trained here."""
    from ..adapter.plain import PlainAdapter
    from ..errors import ConfigError

    if isinstance(start, PlainAdapter):
        logger.info(
            "%s is another tool's adapter: preconditioned by default, and saved without a record", options.adapter
        )
        start.check_output(options.output, overwrite=True)  # the rest has been checked
    if start.task_type not in ("CAUSAL_LM", None):
        raise ConfigError(
            f"{options.adapter} is for {start.task_type}, and loraone-train trains causal language models only; load it"
            " with PEFT in another trainer"
        )


def _check_output(output: Path, overwrite: bool, resume: bool) -> None:
    """Raise OutputError where the output holds something else than a training of ours that is to be resumed."""
    from ..adapter.files import DIRECTORY_FILES, WEIGHTS, check_output
    from ..errors import OutputError
    from ..training.checkpoints import own_checkpoints

    check_output(output, overwrite or (resume and bool(own_checkpoints(output))))
    if not overwrite and not (output / WEIGHTS).exists():  # none of ours has been finished here
        for name in DIRECTORY_FILES:
            if (output / name).exists():
                raise OutputError(f"{output / name} exists already; choose another output, or pass --overwrite")


def _load(data: Rows | str, tokenizer: Any, rows: DataOptions, token: str | None) -> Sample:
    from ..data.sample import load_sample

    return load_sample(data, tokenizer, rows, token=token)


def _finish(outcome: Outcome, options: TrainCommand, repository: Repository | None) -> None:
    """Write the adapter, unless the training is to be resumed, and say so."""
    from ..atomic import atomic_file
    from ..errors import LoraOneError
    from .run_record import record_file, recorded_options, write_record

    output = options.output

    if outcome.interrupted:
        raise LoraOneError(
            f"interrupted after step {outcome.steps} of {outcome.total_steps}, which is saved; the same command with"
            " --resume goes on from there"
        )
    outcome.adapter.save(output, overwrite=True)
    with atomic_file(output / "training_log.json") as temporary:
        temporary.write_text(json.dumps(outcome.log, indent=2) + "\n", encoding="utf-8")
    recorded = recorded_options(options)
    write_record(record_file(output, is_file=False), recorded)
    published = None if repository is None else push(repository, outcome.adapter, recorded, output)
    result = {"output": str(output), "published": published, **(outcome.adapter.training or {})}
    if options.as_json:
        click.echo(json.dumps(result, indent=2))
        return
    losses = (
        f"loss {result['first_loss']:.4f} → {result['last_loss']:.4f}" if result["first_loss"] else "no loss logged"
    )
    if result["first_eval_loss"] is not None:
        losses += f", evaluation {result['first_eval_loss']:.4f} → {result['last_eval_loss']:.4f}"
    places = f"{output}" if published is None else f"{output}, published: {published}"
    click.echo(printable(f"{outcome.steps} steps, {losses}; written: {places}"))


if __name__ == "__main__":
    main()
