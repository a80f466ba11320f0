"""`loraone.json` in a PEFT directory: our record, kept where other trainers, which write the factors anew, lose it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import AdapterError
from ..json_files import read_json
from .files import CONFIG, PREFIX, RECORD

_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_TRAINED = {"by": "another trainer"} | dict.fromkeys(
    ("steps", "first_loss", "last_loss", "first_eval_loss", "last_eval_loss")
)


def write_record(directory: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the header's metadata, and a digest of the tensors that they were written with, into a file of its own."""
    content = {
        "format_version": metadata["format_version"],
        "tensors": digest_tensors(tensors),
        "peft_config": json.loads(metadata["peft_config"]),
        "loraone": json.loads(metadata["loraone"]),
    }
    (directory / RECORD).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def find_record(directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The metadata of a file whose header has lost them, from `loraone.json` beside it; {} where there is none.

    Where the tensors are not the ones it was written with, the record says that another trainer trained them.
    Raises AdapterError where it cannot be read, or the configuration's scale or ranks are no longer the record's.
    """
    file = directory / RECORD
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
        record, before = dict(content["loraone"]), content["peft_config"]
        now = read_json(directory / CONFIG)
        changed = [name for name in _SCALE if (before.get(name) or None) != (now.get(name) or None)]
        recorded = content["tensors"]
        version = str(content["format_version"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of these JsonError
        raise AdapterError(
            f"{file} cannot be understood ({error!r}); without it this is another tool's adapter"
        ) from error
    if changed:
        raise AdapterError(
            f"{changed[0]} was {before.get(changed[0])!r} when {file} was written, and {CONFIG} says"
            f" {now.get(changed[0])!r}: it belongs to another adapter; remove it"
        )
    if digest_tensors(tensors) != recorded:
        record["training"] = _TRAINED
    return {"format_version": version, "peft_config": json.dumps(before), "loraone": json.dumps(record)}


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hexadecimal, of the names and values; whatever else a file has in its header."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.removeprefix(PREFIX).encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
