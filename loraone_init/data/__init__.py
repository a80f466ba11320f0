"""DATA read, encoded, sampled, and cut into micro-batches and shares.

May import none of the other packages.
"""

from __future__ import annotations

from .classification_rows import read_labels
from .labels import Labels
from .options import DataOptions
from .sample import Sample, load_batches, load_sample

__all__ = ["DataOptions", "Labels", "Sample", "load_batches", "load_sample", "read_labels"]
