"""The command `loraone-train`. Heavy imports wait until the options have been read."""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..failures import one_line_errors
from ..version import __version__
from .support import CONTEXT, Command, row_options, source_options, start_logging

if TYPE_CHECKING:
    from ..training.trainer import Outcome, TrainOptions


logger = logging.getLogger(__name__)

ALL_ROWS = 2**62


@click.command("loraone-train", cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("data")
@click.option("--adapter", required=True, type=click.Path(path_type=Path), help="What loraone-init wrote.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the result.")
@click.option("--epochs", default=1.0, help="Times to go through the data.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Steps to take, whatever --epochs says.")
@click.option("--learning-rate", default=2e-4, help="At its highest.")
@click.option("--schedule", default="linear", type=click.Choice(["linear", "cosine", "constant"]), help="Its course.")
@click.option("--warmup", default=0.0, help="Steps, or a share of all below 1, in which it rises from 0.")
@click.option("--batch-size", default=8, type=click.IntRange(min=1), help="Rows in each process.")
@click.option("--accumulation", default=1, type=click.IntRange(min=1), help="Batches of one step.")
@click.option("--weight-decay", default=0.0, help="Of AdamW, decoupled.")
@click.option("--max-grad-norm", default=1.0, help="Gradients are clipped to it; 0 for no clipping.")
@click.option(
    "--optimizer",
    default="preconditioned",
    type=click.Choice(["preconditioned", "adamw"]),
    help="AdamW on preconditioned gradients, or plain.",
)
@click.option("--damping", type=float, help="Of the preconditioner.  [default: what the adapter records]")
@click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the computation.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice, to save memory.")
@click.option("--samples", type=click.IntRange(min=1), help="Rows to draw from the data.  [default: all]")
@click.option("--max-length", default=1024, type=click.IntRange(min=2), help="Tokens kept of a row.")
@row_options
@click.option("--eval-data", help="File or hub data set to evaluate on, before, after each epoch and at the end.")
@click.option("--eval-split", help="Split of DATA, or of --eval-data, to evaluate on.")
@click.option("--logging-steps", default=10, type=click.IntRange(min=1), help="Steps between two lines of progress.")
@click.option("--save-steps", default=500, type=click.IntRange(min=1), help="Steps between two checkpoints.")
@click.option("--report-to", default="none", type=click.Choice(["none", "tensorboard"]), help="Where curves go.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu"]), help="auto takes GPUs where there are.")
@click.option("--seed", default=0, help="Seeds the order of rows, and dropout.")
@click.option("--resume", is_flag=True, help="Go on from the last whole checkpoint in the output.")
@source_options
@click.option("--overwrite", is_flag=True, help="Write into an output that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print the libraries' messages too, and tracebacks.")
@click.version_option(__version__, prog_name="loraone-train")
def main(verbose: bool, quiet: bool, **options: Any) -> None:
    """Train the adapter of MODEL on DATA, on from where loraone-init left it.

    MODEL and DATA are as for loraone-init, and tokens and label masks too. The output is a PEFT directory; its
    adapter_model.safetensors is our single-file form as well.

    \b
      loraone-train demo examples/gsm8k.jsonl --adapter adapters.safetensors -o trained --max-steps 20
      torchrun --no-python --nproc-per-node 2 loraone-train MODEL DATA --adapter adapters.safetensors -o trained
    """
    with one_line_errors(verbose):
        _run(verbose, quiet, **options)


def _run(
    verbose: bool, quiet: bool, *, model: str, data: str, adapter: Path, output: Path, as_json: bool, **options: Any
) -> None:
    from ..adapter.adapter import Adapter
    from ..adapter.files import check_output, is_single_file
    from ..errors import ConfigError, OutputError
    from ..models.sources import resolve_model
    from ..models.tokenizer import require_tokenizer

    is_main = os.environ.get("RANK", "0") == "0"
    if is_single_file(output):
        raise OutputError(f"{output}: a training writes a directory, with checkpoints; leave .safetensors out")
    if is_main:  # the others would find what this one writes
        check_output(output, options["overwrite"] or options["resume"])
    settings = _train_options(options)
    start_logging(quiet or as_json or not is_main, verbose)
    if find_spec("peft") is None or find_spec("accelerate") is None:
        raise ConfigError('training needs more packages: pip install "loraone-init[train]"')
    from ..training.trainer import train

    start = Adapter.load(adapter)
    if start.task_type not in ("CAUSAL_LM", None):
        raise ConfigError(
            f"{adapter} is for {start.task_type}, and loraone-train trains causal language models only; load it with"
            " PEFT in another trainer"
        )
    source = resolve_model(
        model,
        revision=options["revision"],
        token=options["token"],
        trust_remote_code=options["trust_remote_code"],
    )
    tokenizer = require_tokenizer(source, options["trust_remote_code"])
    rows = _load(data, tokenizer, options, options["split"])
    evaluation = None
    if options["eval_data"] or options["eval_split"]:
        evaluation = _load(options["eval_data"] or data, tokenizer, options, options["eval_split"])
    outcome = train(
        source,
        start,
        rows,
        output,
        settings,
        evaluation=evaluation,
        resume=options["resume"],
        trust_remote_code=options["trust_remote_code"],
    )
    if is_main:
        _finish(outcome, output, as_json)


def _load(data: str, tokenizer: Any, options: dict[str, Any], split: str | None) -> Any:
    from ..data.formats import parse_columns
    from ..data.options import DataOptions
    from ..data.sample import load_batches

    wanted = DataOptions(
        samples=options["samples"] or ALL_ROWS,
        max_length=options["max_length"],
        split=split,
        columns=parse_columns(options["columns"]) if options["columns"] else None,
        completion_only=options["completion_only"],
        assistant_only=options["assistant_only"],
        seed=options["seed"],
    )
    return load_batches(data, tokenizer, wanted, token=options["token"])


def _train_options(options: dict[str, Any]) -> TrainOptions:
    from dataclasses import fields

    from ..training.trainer import TrainOptions

    return TrainOptions(**{field.name: options[field.name] for field in fields(TrainOptions)})


def _finish(outcome: Outcome, output: Path, as_json: bool) -> None:
    """Write the adapter, unless the training is to be resumed, and say so."""
    from ..atomic import atomic_file
    from ..errors import LoraOneError

    if outcome.interrupted:
        raise LoraOneError(
            f"interrupted after step {outcome.steps} of {outcome.total_steps}, which is saved; the same command with"
            " --resume goes on from there"
        )
    outcome.adapter.save(output, overwrite=True)
    with atomic_file(output / "training_log.json") as temporary:
        temporary.write_text(json.dumps(outcome.log, indent=2) + "\n", encoding="utf-8")
    result = {"output": str(output), **(outcome.adapter.training or {})}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    losses = (
        f"loss {result['first_loss']:.4f} → {result['last_loss']:.4f}" if result["first_loss"] else "no loss logged"
    )
    if result["first_eval_loss"] is not None:
        losses += f", evaluation {result['first_eval_loss']:.4f} → {result['last_eval_loss']:.4f}"
    click.echo(f"{outcome.steps} steps, {losses}; written: {output}")


if __name__ == "__main__":
    main()
