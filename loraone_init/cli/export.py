"""The command `loraone-export`, one subcommand for each target. Heavy imports wait until options have been read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..failures import one_line_errors
from ..version import __version__
from .support import CONTEXT, Command, source_options, start_logging

if TYPE_CHECKING:
    from loraone_init.exporters.base_model import BaseModel
    from loraone_init.exporters.lora_weights import LoraWeights


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What every target gets: the base, the adapter that belongs to it, and where to write."""

    base: BaseModel
    lora: LoraWeights
    output: Path
    overwrite: bool


@click.group("loraone-export", context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loraone-export")
def main() -> None:
    """Bring an adapter into another form: loraone-export TARGET MODEL ADAPTER -o OUT.

    MODEL is as for loraone-init. ADAPTER is what loraone-init or loraone-train wrote, or any LoRA directory of PEFT.

    \b
      loraone-export merged demo adapters.safetensors -o merged
    """


def target(
    name: str,
    *,
    output_help: str = "Directory to write.",
    check: Callable[[Path, bool], None] | None = None,
    takes_experts: bool = False,
    task_type: Callable[[dict[str, Any]], str | None] | None = None,
) -> Callable[[Callable[..., dict[str, Any]]], click.Command]:
    """A subcommand: the options that all share, the adapter and its base opened and checked, the result printed.

    check: raises OutputError where the output cannot be written; by default for a directory.
    takes_experts: whether it can do with factors of fused experts; they are refused otherwise.
    task_type: from the options, PEFT's name of the task to open the model for; by default the adapter's.
    """

    def decorate(run: Callable[..., dict[str, Any]]) -> click.Command:
        @wraps(run)
        def command(
            model: str,
            adapter: Path,
            output: Path,
            overwrite: bool,
            any_base: bool,
            as_json: bool,
            quiet: bool,
            verbose: bool,
            revision: str | None,
            token: str | None,
            trust_remote_code: bool,
            **options: Any,
        ) -> None:
            with one_line_errors(verbose):
                start_logging(quiet or as_json, verbose)
                from ..adapter.inputs import check_apart

                check_apart(output, (model, adapter))
                (check or _check_directory)(output, overwrite)
                from loraone_init.exporters.base_model import open_base
                from loraone_init.exporters.expert_weights import separate_experts
                from loraone_init.exporters.lora_weights import read_lora

                from ..errors import ExportError

                lora = read_lora(adapter)
                base = open_base(
                    model,
                    lora,
                    revision=revision,
                    token=token,
                    trust_remote_code=trust_remote_code,
                    any_base=any_base,
                    task_type=task_type(options) if task_type else None,
                )
                lora = separate_experts(base.module, lora)
                if lora.experts and not takes_experts:
                    raise ExportError(f"{adapter} adapts fused experts, which {name} cannot hold; export merged")
                facts = run(Export(base, lora, output, overwrite), **options)
                _print(output, facts, as_json, quiet)

        return main.command(name, cls=Command, context_settings=CONTEXT)(_shared_options(command, output_help))

    return decorate


def _shared_options(command: Callable[..., None], output_help: str) -> Callable[..., None]:
    """Last first, as decorators are applied; a target's own options come before them in the help."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Print the libraries' messages too, and tracebacks."),
        click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
        click.option("--overwrite", is_flag=True, help="Write into an output that exists."),
        click.option("--any-base", is_flag=True, help="Take a MODEL with other weights than the adapter's."),
        source_options,
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=output_help),
        click.argument("adapter", type=click.Path(path_type=Path)),
        click.argument("model"),
    ):
        command = option(command)
    return command


def _check_directory(output: Path, overwrite: bool) -> None:
    from ..adapter.files import check_output, is_single_file
    from ..errors import OutputError

    if is_single_file(output):
        raise OutputError(f"{output}: this target writes a directory; leave .safetensors out")
    check_output(output, overwrite)


def _check_adapter(output: Path, overwrite: bool) -> None:
    from ..adapter.files import check_output

    check_output(output, overwrite)


def _check_gguf(output: Path, overwrite: bool) -> None:
    from loraone_init.exporters.gguf import SUFFIX

    from ..adapter.files import check_output
    from ..errors import OutputError

    if output.suffix != SUFFIX:
        raise OutputError(f"{output}: this target writes one file; name it {output.stem}{SUFFIX}")
    check_output(output, overwrite, SUFFIX)


def _print(output: Path, facts: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps({"output": str(output), **facts}, indent=2))
    elif not quiet:
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None)
        click.echo(printable(f"written: {output} ({told})"))


@target("merged", takes_experts=True)
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="Of the weights; auto leaves them as they are.",
)
def merged(export: Export, dtype: Any) -> dict[str, Any]:
    """The merged model, W + s·B·A, as a Hugging Face directory.

    Tensor by tensor, so that a model larger than memory is merged too.
    """
    from loraone_init.exporters.merged import export_merged

    return export_merged(export.base, export.lora, export.output, dtype)


@target("peft", output_help="FILE.safetensors, or a PEFT directory.", check=_check_adapter, takes_experts=True)
@click.option("--plain-scaling", is_flag=True, help="Write α' = s·r without rsLoRA, for readers that ignore rsLoRA.")
def peft(export: Export, plain_scaling: bool) -> dict[str, Any]:
    """A PEFT directory from the single file, or the single file from a directory.

    The factors are copied byte for byte, and the record of the initialisation goes along.
    """
    from loraone_init.exporters.peft import export_peft

    return export_peft(export.lora, export.output, plain_scaling=plain_scaling)


@target("mlx")
def mlx(export: Export) -> dict[str, Any]:
    """An adapter directory for mlx-lm's --adapter-path."""
    from loraone_init.exporters.mlx import export_mlx

    return export_mlx(export.base, export.lora, export.output)


@target("gguf", output_help="FILE.gguf to write.", check=_check_gguf)
def gguf(export: Export) -> dict[str, Any]:
    """A LoRA adapter for llama.cpp's --lora, in fp32."""
    from loraone_init.exporters.gguf import export_gguf

    return export_gguf(export.base, export.lora, export.output)


def _task_type(options: dict[str, Any]) -> str | None:
    from loraone_init.exporters.onnx.tasks import TASKS

    return None if options["task"] == "auto" else TASKS[options["task"]].task_type


@target("onnx", task_type=_task_type)
@click.option("--engine", default="torch", type=click.Choice(["torch", "genai"]), help="What writes the graph.")
@click.option(
    "--task",
    default="auto",
    type=click.Choice(["auto", "text-generation", "feature-extraction", "text-classification", "seq2seq"]),
    help="What the graph gives; auto is the adapter's task.",
)
@click.option(
    "--dtype",
    default="fp32",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    help="Of the weights; int8 and int4 by ONNX Runtime's quantizers.",
)
@click.option("--opset", default=20, type=int, help="Version of ONNX's operators, for --engine torch.")
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    help="Largest difference from PyTorch's outputs.  [default: 0.005 for fp32, 0.5 for fp16, else none]",
)
def onnx(export: Export, engine: Any, task: str, dtype: Any, opset: int, atol: float | None) -> dict[str, Any]:
    """The merged model as a folder for ONNX Runtime, compared with PyTorch before it is kept.

    Graph and weights are onnx/model.onnx and onnx/model.onnx_data; parity.json tells the differences.
    """
    from loraone_init.exporters.onnx.export import OnnxOptions, export_onnx

    return export_onnx(export.base, export.lora, export.output, OnnxOptions(engine, dtype, opset, atol))


def _check_folder_or_adapter(output: Path, overwrite: bool) -> None:
    """What ends in .onnx_adapter is a file."""
    if output.suffix == ".onnx_adapter":
        _check_file(output, overwrite)
    else:
        _check_directory(output, overwrite)


def _check_file(output: Path, overwrite: bool) -> None:
    from ..atomic import check_replaceable
    from ..errors import OutputError

    if output.is_dir():
        raise OutputError(f"{output} is a directory; name a file")
    check_replaceable(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already; choose another output, or pass --overwrite")
    if not output.parent.is_dir():
        raise OutputError(f"there is no directory {output.parent}; make it, or choose another output")


@target(
    "onnx-adapter",
    output_help="Directory to write, or with --base-graph FILE.onnx_adapter.",
    check=_check_folder_or_adapter,
)
@click.option(
    "--base-graph",
    type=click.Path(path_type=Path),
    help="A directory that this command wrote: write the file of one more adapter for the base graph in it.",
)
@click.option("--opset", default=20, type=int, help="Version of ONNX's operators.")
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    help="Largest difference from PyTorch's outputs.  [default: 0.005]",
)
def onnx_adapter(export: Export, base_graph: Path | None, opset: int, atol: float | None) -> dict[str, Any]:
    """A base graph for ONNX Runtime that takes adapters when it runs, and an .onnx_adapter file."""
    from loraone_init.exporters.onnx.adapter import SUFFIX, export_adapter_file, export_adapter_folder
    from loraone_init.exporters.onnx.export import OnnxOptions

    from ..errors import ConfigError

    if (base_graph is not None) != (export.output.suffix == SUFFIX):
        raise ConfigError(f"{export.output}: with --base-graph a file {SUFFIX} is written, without it a directory")
    if base_graph is not None:
        return export_adapter_file(export.base, export.lora, export.output, base_graph)
    return export_adapter_folder(export.base, export.lora, export.output, OnnxOptions(opset=opset, atol=atol))


if __name__ == "__main__":
    main()
