"""Lines for the configuration of common trainers that make them go on from an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

from ..adapter.adapter import Adapter
from ..adapter.files import is_single_file
from ..adapter.model_card import opening_lines
from ..adapter.wording import quoted, yaml_value

_DIRECTORY = "lora-dir"


def lines_for_trainers(adapter: Adapter, output: Path, opened_from: str | None = None) -> dict[str, str]:
    """Ready to paste, by trainer. All read a PEFT directory: for a single file, the first says how to make one of it.

    Axolotl's lora_model_dir, LLaMA-Factory's adapter_name_or_path and ms-swift's --adapters go on from an adapter.
    opened_from: the base on this machine, where the adapter calls it by a name that does not open.
    Those three train language models: other adapters get PEFT's lines only.
    """
    model, single = opened_from or adapter.base.get("name") or "MODEL", is_single_file(output)
    directory = _DIRECTORY if single else str(output)
    lines = {
        "PEFT, TRL": (
            f"from peft import PeftModel\n{opening_lines(model, adapter.task_type, adapter.sample)}\n"
            f"model = PeftModel.from_pretrained(base, {quoted(directory)}, is_trainable=True)"
        ).replace("\n\n", "\n"),
        "Axolotl": f"base_model: {yaml_value(model)}\nadapter: lora\nlora_model_dir: {yaml_value(directory)}",
        "LLaMA-Factory": (
            f"model_name_or_path: {yaml_value(model)}\nfinetuning_type: lora\n"
            f"adapter_name_or_path: {yaml_value(directory)}"
        ),
        "ms-swift": f"swift sft --model {quote(model)} --adapters {quote(directory)}",
    }
    if adapter.task_type != "CAUSAL_LM":
        lines = {"PEFT": lines["PEFT, TRL"]}
    if not single:
        return lines
    path = str(output)
    convert = f"from loraone_init import Adapter; Adapter.load({path!r}).save('{_DIRECTORY}')"
    plain = f'python -c "{convert}"' if re.fullmatch(r"[\w./ -]+", path) else f"python -c {quote(convert)}"
    return {"As a directory": plain, **lines}
