"""The options of each target of `loraone-export` as one value, with how its output is checked and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from loraone_init.exporters.base_model import BaseModel
    from loraone_init.exporters.lora_weights import LoraWeights


_FILES = (".safetensors", ".gguf", ".onnx_adapter")
"""Suffixes of outputs that are files. What a target does not write as a file it has refused by then."""


@dataclass(frozen=True)
class Target(ABC):
    """One field for each argument and option that all targets share; None for what was not given."""

    name: ClassVar[str]
    takes_experts: ClassVar[bool] = False
    """Whether factors of fused experts can be written; they are refused otherwise."""

    model: str
    adapter: Path
    output: Path
    overwrite: bool
    any_base: bool
    revision: str | None
    token: str | None
    trust_remote_code: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def check(self) -> None:
        """Raise a LoraOneError for options that cannot work, or an output that cannot be written."""
        check_directory(self.output, self.overwrite)

    def writes_file(self) -> bool:
        """Whether the output is one file, and no directory."""
        return self.output.suffix in _FILES

    def task_type(self) -> str | None:
        """PEFT's name of the task to open the model for; None for the adapter's."""
        return None

    @abstractmethod
    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        """Write the output, whole or not at all; facts of it, for a report."""


@dataclass(frozen=True)
class Merged(Target):
    name = "merged"
    takes_experts = True

    dtype: Literal["auto", "fp32", "fp16", "bf16"]

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.merged import export_merged

        return export_merged(base, lora, self.output, self.dtype)


@dataclass(frozen=True)
class Peft(Target):
    name = "peft"
    takes_experts = True

    plain_scaling: bool

    def check(self) -> None:
        from ..adapter.files import check_output

        check_output(self.output, self.overwrite)

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.peft import export_peft

        return export_peft(lora, self.output, plain_scaling=self.plain_scaling)


@dataclass(frozen=True)
class Mlx(Target):
    name = "mlx"

    def check(self) -> None:
        from loraone_init.exporters.packages import require_mlx

        super().check()
        require_mlx()

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.mlx import export_mlx

        return export_mlx(base, lora, self.output)


@dataclass(frozen=True)
class Gguf(Target):
    name = "gguf"

    def check(self) -> None:
        from loraone_init.exporters.packages import GGUF, require_gguf

        from ..adapter.files import check_output
        from ..errors import OutputError

        if self.output.suffix != GGUF:
            raise OutputError(f"{self.output}: this target writes one file; name it {self.output.stem}{GGUF}")
        check_output(self.output, self.overwrite, GGUF)
        require_gguf()

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.gguf import export_gguf

        return export_gguf(base, lora, self.output)


@dataclass(frozen=True)
class Onnx(Target):
    name = "onnx"

    engine: Literal["torch", "genai"]
    task: Literal["auto", "text-generation", "feature-extraction", "text-classification", "seq2seq"]
    dtype: str | tuple[str, ...]
    opset: int
    atol: float | None

    def check(self) -> None:
        super().check()
        self._options()

    def task_type(self) -> str | None:
        from loraone_init.exporters.onnx.tasks import TASKS

        return None if self.task == "auto" else TASKS[self.task].task_type

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.onnx.export import export_onnx

        return export_onnx(base, lora, self.output, self._options())

    def _options(self) -> Any:
        from loraone_init.exporters.onnx.options import OnnxOptions

        return OnnxOptions(self.engine, self.dtype, self.opset, self.atol)


@dataclass(frozen=True)
class OnnxAdapter(Target):
    name = "onnx-adapter"

    base_graph: Path | None
    opset: int
    atol: float | None

    def check(self) -> None:
        """A file where a base graph is given, and a directory where it is written."""
        from loraone_init.exporters.packages import ONNX_ADAPTER

        from ..adapter.files import check_output
        from ..errors import ConfigError

        is_file = self.output.suffix == ONNX_ADAPTER
        if is_file:
            check_output(self.output, self.overwrite, ONNX_ADAPTER)
        else:
            super().check()
        if (self.base_graph is not None) != is_file:
            raise ConfigError(
                f"{self.output}: with --base-graph a file {ONNX_ADAPTER} is written, without it a directory"
            )
        if self.base_graph is None:  # else no graph is written
            self._options()

    def write(self, base: BaseModel, lora: LoraWeights) -> dict[str, Any]:
        from loraone_init.exporters.onnx.adapter import export_adapter_file, export_adapter_folder

        if self.base_graph is not None:
            return export_adapter_file(base, lora, self.output, self.base_graph)
        return export_adapter_folder(base, lora, self.output, self._options())

    def _options(self) -> Any:
        from loraone_init.exporters.onnx.options import OnnxOptions

        return OnnxOptions(opset=self.opset, atol=self.atol)


def check_directory(output: Path, overwrite: bool) -> None:
    """Raise OutputError where no directory can be written."""
    from ..adapter.files import check_output, is_single_file
    from ..errors import OutputError

    if is_single_file(output):
        raise OutputError(f"{output}: this target writes a directory; leave .safetensors out")
    check_output(output, overwrite)
