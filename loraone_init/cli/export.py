"""The command `loraone-export`, one subcommand for each target. Heavy imports wait until options have been read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraone_init.exporters.onnx.options import ATOL, OnnxOptions

from ..errors import printable
from ..failures import one_line_errors
from ..version import __version__
from .export_targets import Gguf, Merged, Mlx, Onnx, OnnxAdapter, Peft, Target
from .run_config import config_in_use, config_option
from .support import CONTEXT, Command, OneOrSeveral, message_options, source_options, start_logging, together, under
from .waiting import LIBRARIES, OPENING, Waiting

if TYPE_CHECKING:
    from loraone_init.exporters.base_model import BaseModel
    from loraone_init.exporters.lora_weights import LoraWeights

_output, _form, _base = under("Output"), under("Form"), under("Base")


@click.group("loraone-export", context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loraone-export")
def main() -> None:
    """Bring an adapter into another form: loraone-export TARGET MODEL ADAPTER -o OUT.

    MODEL is as for loraone-init. ADAPTER is what loraone-init or loraone-train wrote, or any LoRA directory of PEFT.

    \b
      loraone-export merged demo adapters.safetensors -o merged
    """


def target(name: str, output_help: str = "Directory to write.") -> Callable[[Callable[..., None]], click.Command]:
    """A subcommand, with the arguments and the options of the output."""
    options = together(
        click.argument("model"),
        click.argument("adapter", type=click.Path(path_type=Path)),
        _output("-o", "--output", required=True, type=click.Path(path_type=Path), help=output_help),
        _output("--overwrite", is_flag=True, help="Write into an output that exists."),
    )

    def decorate(function: Callable[..., None]) -> click.Command:
        return main.command(name, cls=Command, context_settings=CONTEXT)(options(function))

    return decorate


base_options = together(
    _base("--any-base", is_flag=True, help="Take a MODEL with other weights than the adapter's."),
    source_options,
    config_option("loraone-export"),
    message_options,
)
"""Of all targets, after their own."""


@target("merged")
@_form(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="Of the weights; auto leaves them as they are.",
)
@base_options
def merged(**given: Any) -> None:
    """The merged model, W + s·B·A, as a Hugging Face directory.

    Tensor by tensor, so that a model larger than memory is merged too.
    """
    _run(Merged(**given))


@target("peft", output_help="FILE.safetensors, or a PEFT directory.")
@_form("--plain-scaling", is_flag=True, help="Write α' = s·r without rsLoRA, for readers that ignore rsLoRA.")
@base_options
def peft(**given: Any) -> None:
    """A PEFT directory from the single file, or the single file from a directory.

    The factors are copied byte for byte, and the record of the initialisation goes along.
    """
    _run(Peft(**given))


@target("mlx")
@base_options
def mlx(**given: Any) -> None:
    """An adapter directory for mlx-lm's --adapter-path."""
    _run(Mlx(**given))


@target("gguf", output_help="FILE.gguf to write.")
@base_options
def gguf(**given: Any) -> None:
    """A LoRA adapter for llama.cpp's --lora, in fp32."""
    _run(Gguf(**given))


@target("onnx")
@_form(
    "--task",
    default="auto",
    type=click.Choice(["auto", "text-generation", "feature-extraction", "text-classification", "seq2seq"]),
    help="What the graph gives; auto is the adapter's task.",
)
@_form(
    "--dtype",
    default=OnnxOptions.dtype,
    type=OneOrSeveral(["fp32", "fp16", "bf16", "int8", "int4"]),
    help="Of the weights; int8 and int4 by ONNX Runtime's quantizers. Several with commas: a graph of each.",
)
@_form("--engine", default=OnnxOptions.engine, type=click.Choice(["torch", "genai"]), help="What writes the graph.")
@_form("--opset", default=OnnxOptions.opset, type=int, help="Version of ONNX's operators, for --engine torch.")
@_form(
    "--atol",
    type=click.FloatRange(min=0),
    help="Largest difference from PyTorch's outputs.  "
    f"[default: {ATOL['fp32']} for fp32, {ATOL['fp16']} for fp16, else none]",
)
@base_options
def onnx(**given: Any) -> None:
    """The merged model as a folder for ONNX Runtime, compared with PyTorch before it is kept.

    Graph and weights are onnx/model.onnx and onnx/model.onnx_data, in fewer bits onnx/model_q4.onnx and the like;
    parity.json tells the differences.
    """
    _run(Onnx(**given))


@target("onnx-adapter", output_help="Directory to write, or with --base-graph FILE.onnx_adapter.")
@_form(
    "--base-graph",
    type=click.Path(path_type=Path),
    help="A directory that this command wrote: write the file of one more adapter for the base graph in it.",
)
@_form("--opset", default=OnnxOptions.opset, type=int, help="Version of ONNX's operators.")
@_form(
    "--atol",
    type=click.FloatRange(min=0),
    help=f"Largest difference from PyTorch's outputs.  [default: {ATOL['fp32']}]",
)
@base_options
def onnx_adapter(**given: Any) -> None:
    """A base graph for ONNX Runtime that takes adapters when it runs, and an .onnx_adapter file."""
    _run(OnnxAdapter(**given))


def _run(options: Target) -> None:
    """Open the base and the adapter, write the target and say so."""
    with one_line_errors(options.verbose):
        start_logging(options.quiet or options.as_json, options.verbose)
        from ..adapter.files import weights_file
        from ..adapter.inputs import check_apart
        from ..models.sources import check_model

        check_apart(options.output, (options.model, options.adapter, config_in_use()))
        options.check()
        from .run_record import check_record, record_file, recorded_options, write_record

        file = record_file(options.output, is_file=options.writes_file())
        check_record(file, options.overwrite)
        check_model(options.model, options.revision)
        weights_file(options.adapter)
        base, lora = _read(options)
        facts = options.write(base, lora)
        write_record(file, recorded_options(options))
        _print(options, facts)


def _read(options: Target) -> tuple[BaseModel, LoraWeights]:
    """The base, checked to be the adapter's, and the adapter."""
    from ..errors import ExportError
    from ..libraries import import_transformers

    with Waiting(shown=not (options.quiet or options.as_json)) as waiting:
        waiting.say(LIBRARIES)
        import_transformers(options.verbose, options.quiet or options.as_json)
        from loraone_init.exporters.base_model import open_base
        from loraone_init.exporters.expert_weights import separate_experts
        from loraone_init.exporters.lora_weights import read_lora

        waiting.say(OPENING)
        lora = read_lora(options.adapter)
        base = open_base(
            options.model,
            lora,
            revision=options.revision,
            token=options.token,
            trust_remote_code=options.trust_remote_code,
            any_base=options.any_base,
            task_type=options.task_type(),
        )
    lora = separate_experts(base.module, lora)
    if lora.experts and not options.takes_experts:
        raise ExportError(f"{options.adapter} adapts fused experts, which {options.name} cannot hold; export merged")
    return base, lora


def _print(options: Target, facts: dict[str, Any]) -> None:
    if options.as_json:
        click.echo(json.dumps({"output": str(options.output), **facts}, indent=2))
    elif not options.quiet:
        told = ", ".join(
            f"{key.replace('_', ' ')} {_short(value)}" for key, value in facts.items() if value is not None
        )
        click.echo(printable(f"written: {options.output} ({told})"))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
