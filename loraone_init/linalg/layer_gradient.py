"""One layer's gradient as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of one layer, fp32 (fp64 for an fp64 model): what each half of the sample adds to it, or all."""

    name: str
    parts: tuple[torch.Tensor, ...]

    @property
    def G(self) -> torch.Tensor:  # noqa: N802
        """∇_W L (out, in), the sum of the parts; of two, a new tensor each time."""
        return self.parts[0] if len(self.parts) == 1 else torch.add(*self.parts)

    @property
    def numel(self) -> int:
        """The number of elements of G."""
        return self.parts[0].numel()
