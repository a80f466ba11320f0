"""Options of the targets for ONNX Runtime, checked where they are made. No torch: the help reads the defaults here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraone_init.errors import ConfigError
from loraone_init.extras import require
from loraone_init.json_files import shown
from loraone_init.ranges import check_range

Engine = Literal["torch", "genai"]
DType = Literal["fp32", "fp16", "int8", "int4"]

DEFAULT_OPSET = 20

ATOL = {"fp32": 5e-3, "fp16": 0.5}
"""Allowed by default. Quantized weights have no limit but the one that is asked for: it depends on the model."""


@dataclass(frozen=True)
class OnnxOptions:
    """engine: what writes the graph. dtype: of the weights; several give several graphs. opset: of the torch engine.
    atol: on outputs; None for the default of each dtype.

    Raises ConfigError for what cannot work, MissingPackageError for a package that is not installed.
    """

    engine: Engine = "torch"
    dtype: DType | tuple[DType, ...] = "fp32"
    opset: int = DEFAULT_OPSET
    atol: float | None = None

    def __post_init__(self) -> None:
        if "bf16" in self.dtypes:  # offered on the command line, to say why not
            raise ConfigError("ONNX Runtime's CPU provider has no kernels for bf16; take fp32, fp16, int8 or int4")
        if self.engine == "genai" and len(self.dtypes) > 1:
            raise ConfigError('engine "genai" writes one graph; give one dtype, or take engine "torch"')
        if not 18 <= self.opset <= 23:
            raise ConfigError(f"opset {shown(self.opset)} is not one that torch exports to; take 18 to 23")
        if self.atol is not None:
            check_range("atol", self.atol)
        require_packages(self.engine)

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """Without repetitions, in the order given."""
        return tuple(dict.fromkeys((self.dtype,) if isinstance(self.dtype, str) else self.dtype))


def require_packages(engine: Engine) -> None:
    """Raise MissingPackageError where a package is not installed that the engine needs."""
    if engine == "torch":
        require("onnx", "onnxscript", "onnx_ir", by="an export to ONNX")
    else:
        require("genai", "onnxruntime_genai", "onnx_ir", by="the engine genai")
