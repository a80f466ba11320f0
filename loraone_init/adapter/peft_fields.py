"""Which of PEFT's configurations describe plain LoRA, that is W + s·B·A on the unchanged base and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "modules_to_save", "target_modules", "target_parameters",
}  # fmt: skip
"""Fields that this package reads, or that the names and shapes of the file's tensors say as well."""

_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Fields that change nothing in a trained adapter's outputs. The last four are of initialisations: those that change
the base are told by `init_lora_weights`."""

_WORDS = {
    "use_dora": "DoRA",
    "layer_replication": "replication",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "biases of the factors",
}

_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations by name that leave the base's weights as they are."""


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise AdapterError, naming the field, where PEFT would compute something else than plain LoRA.

    Fields that are not known here are refused too, unless they are off (null, false, 0 or empty).
    """
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _KEEP_THE_BASE:
        raise AdapterError(
            f"it was initialised with {start} (init_lora_weights), which changes the base's weights too; let PEFT"
            " convert it to plain LoRA (save_pretrained's path_initial_model_for_weight_conversion), or merge it"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(f"it trains biases of the base (bias {bias!r}), which is more than LoRA; merge it with PEFT")
    for name, value in config.items():
        if value and name not in {*_READ, *_WITHOUT_EFFECT, "init_lora_weights", "bias"}:
            what = _WORDS.get(name, "a setting of PEFT that is not known here")
            raise AdapterError(f"it uses {what} ({name}), which is more than LoRA; merge it with PEFT")
