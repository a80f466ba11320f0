"""What belongs to a model beside its weights: configurations, tokenizer, chat template."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from loraone_init.errors import ExportError
from loraone_init.weights.checkpoint import INDEX

COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")


def copy_companions(source: Path, directory: Path, patterns: Iterable[str] = COMPANIONS) -> None:
    """Copy the files of the model directory `source` that match, but for the index of its weights.

    Raises ExportError for what is no file, and for a link that leads out of `source`: a model directory from somebody
    else must not make this program copy a private file into a directory that is then published. The hub's cache, whose
    snapshots are links to its blobs, is the exception.
    """
    root = source.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in sorted({file for pattern in patterns for file in source.glob(pattern)}):
        if file.name == INDEX or file.is_dir():
            continue
        target = file.resolve()
        if not target.is_file():
            raise ExportError(f"{file} is no file that can be copied; remove it from the model directory")
        if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
            raise ExportError(f"{file} is a link to {target}, outside of the model directory; it is not copied")
        shutil.copyfile(target, directory / file.name)
