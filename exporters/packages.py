"""What targets need installed, and what the names of their files end in. No torch: the command asks this first."""

from __future__ import annotations

from loraone_init.extras import require

GGUF = ".gguf"
ONNX_ADAPTER = ".onnx_adapter"


def require_mlx() -> None:
    """Raise MissingPackageError where MLX or mlx-lm is not installed."""
    require("mlx", "mlx", "mlx_lm", by="an adapter for mlx-lm")


def require_gguf() -> None:
    """Raise MissingPackageError where a package is not installed that writes the file."""
    require("gguf", "gguf", by="an adapter for llama.cpp")
