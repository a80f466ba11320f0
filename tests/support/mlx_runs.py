"""What mlx-lm computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from support.causal import make_batches


def mlx_logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    model, _ = load_model(base)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
        model.eval()
    return torch.from_numpy(np.array(model(mx.array(inputs().numpy())).astype(mx.float32)))


def inputs() -> torch.Tensor:
    return make_batches()[0]["input_ids"][:1]  # the row without padding: mlx-lm's models take no mask
