"""Modes of a thread that change what is computed: a block is computed in the driver's, by those of its caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

_AUTOCAST = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """grad: whether gradients are wanted. autocast: (kind of device, dtype) where operations are cast."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def here(cls) -> Modes:
        """Those of the calling thread."""
        kinds = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
        return cls(torch.is_grad_enabled(), tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds))

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Inside, operations are cast as in that thread."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield
