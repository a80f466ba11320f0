"""`torch.onnx.export` of one module, without its chatter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraone_init.errors import ExportError, describe

if TYPE_CHECKING:
    import onnx_ir as ir


_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


def torch_export(
    module: nn.Module, tensors: Sequence[Tensor], axes: Sequence[Mapping[int, Any]], opset: int
) -> ir.Model:
    """The module's graph as torch gives it: initializers share the memory of its parameters.

    module: takes `tensors`, one argument each. axes: the dynamic ones of every tensor.
    Raises ExportError where torch cannot trace it.
    """
    with _silence():
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(tensors),
                dynamic_shapes=(tuple(axes),),
                opset_version=opset,
                optimize=False,
                verbose=False,
                dynamo=True,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ExportError(
                f"torch cannot export {type(module).__name__} to ONNX: {describe(cause)[:300]}; try --engine genai,"
                " which knows some architectures by name"
            ) from error
    assert program is not None
    return program.model


def dynamic_axes(*examples: Sequence[Tensor]) -> list[dict[int, Any]]:
    """The axes of each tensor that differ between the examples."""
    dynamic = torch.export.Dim.DYNAMIC
    return [
        {axis: dynamic for axis in range(first.ndim) if first.shape[axis] != other.shape[axis]}
        for first, other in zip(*examples, strict=True)
    ]


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter warns of operators that are not installed, and of its own internals."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
