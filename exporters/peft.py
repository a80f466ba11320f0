"""PEFT directories and our single file, each made of the other. The tensors are copied byte for byte."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraone_init.adapter.files import CARD, CONFIG, WEIGHTS, is_single_file, read_tensors
from loraone_init.adapter.model_card import model_card
from loraone_init.adapter.peft_config import name_in_peft, scale_of
from loraone_init.adapter.record_file import write_record
from loraone_init.adapter.schema import read_peft_config
from loraone_init.atomic import atomic_directory, atomic_file
from loraone_init.errors import ExportError
from loraone_init.layers.patterns import patterns
from loraone_init.safetensors_files import read_header, write_header

from .lora_weights import LoraWeights


def export_peft(lora: LoraWeights, output: Path, *, plain_scaling: bool = False) -> dict[str, Any]:
    """Write our single file if `output` ends in .safetensors, else a PEFT directory; whole or not at all.

    plain_scaling: the configuration says `use_rslora: false` and α' = s·r, for readers that know no other scale than
    α/r. The factors and s stay as they are.
    Raises ExportError for a single file of an adapter without our record, or of a directory whose configuration has
    been edited to another scale than that record's.
    """
    config = plain_config(lora) if plain_scaling else dict(lora.peft_config)
    if is_single_file(output):
        _check_record(lora)
        with atomic_file(output) as temporary:
            _copy_weights(lora, config, temporary)
    else:
        with atomic_directory(output) as directory:
            _copy_weights(lora, config, directory / WEIGHTS)
            if lora.record is not None:
                card = model_card(lora.record, lora.peft_config)
                (directory / CARD).write_text(card, encoding="utf-8")
                write_record(directory, *read_tensors(directory / WEIGHTS))
            (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"layers": len(lora.pairs) + len(lora.experts), "scaling": "α/√r" if config.get("use_rslora") else "α/r"}


def plain_config(lora: LoraWeights) -> dict[str, Any]:
    """PEFT's configuration with α' = s·r and no rsLoRA; layers with another α' are in its `alpha_pattern`.

    The common α' belongs to the configuration's r, so that a reader that ignores the patterns finds the common s too.
    """
    scales = {name_in_peft(module, lora.peft_config): lora.scales[module] for module in lora.pairs}
    ranks = {name_in_peft(module, lora.peft_config): len(pair.A) for module, pair in lora.pairs.items()}
    scales |= {parameter: stack.scale for parameter, stack in lora.experts.items()}
    ranks |= {parameter: stack.rank for parameter, stack in lora.experts.items()}
    ((scale, _),) = Counter(scales.values()).most_common(1)
    common = _number(scale * lora.peft_config["r"])
    alphas = {name: _number(scales[name] * ranks[name]) for name in scales}
    config = dict(lora.peft_config) | {"lora_alpha": common, "use_rslora": False}
    if any(alpha != common for alpha in alphas.values()) or config.get("alpha_pattern"):
        config["alpha_pattern"] = patterns(alphas, common)
    return config


def _number(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _check_record(lora: LoraWeights) -> None:
    if lora.record is None:
        raise ExportError(
            f"{lora.path} was not written by loraone-init: it has no record of an initialisation, which the single file"
            " must hold; name a directory as output"
        )
    recorded = read_peft_config(lora.metadata.get("peft_config", "{}"), "lora_alpha")
    for module, pair in lora.pairs.items():
        scale = scale_of(name_in_peft(module, recorded), len(pair.A), recorded)
        if not math.isclose(lora.scales[module], scale):
            raise ExportError(
                f"{lora.path / CONFIG} has been edited: layer {module} has scale {lora.scales[module]:g} by it,"
                f" {scale:g} by the record beside the factors; name a directory as output"
            )


def _copy_weights(lora: LoraWeights, config: Mapping[str, Any], target: Path) -> None:
    """A copy of the file; where its header is to hold another configuration, or the record, with these in it."""
    start, header = read_header(lora.file)
    wanted = dict(lora.metadata)
    if "peft_config" in wanted and json.loads(wanted["peft_config"]) != config:
        wanted["peft_config"] = json.dumps(config)
    if wanted == header.get("__metadata__", {}):
        shutil.copyfile(lora.file, target)
        return
    header["__metadata__"] = dict(sorted(({"format": "pt"} | wanted).items()))
    with open(lora.file, "rb") as old, open(target, "wb") as new:
        old.seek(start)
        write_header(new, header)
        shutil.copyfileobj(old, new)
