"""DATA read, encoded, sampled, and cut into micro-batches and shares.

May import none of the other packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .classification_rows import read_labels
    from .labels import Labels
    from .options import DataOptions
    from .sample import Sample, load_batches, load_sample

__getattr__ = hand_on(
    __name__,
    {
        "DataOptions": "options",
        "Labels": "labels",
        "Sample": "sample",
        "load_batches": "sample",
        "load_sample": "sample",
        "read_labels": "classification_rows",
    },
)

__all__ = ["DataOptions", "Labels", "Sample", "load_batches", "load_sample", "read_labels"]
