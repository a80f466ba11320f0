"""The LoRA-One start inside of Axolotl."""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..errors import ConfigError
from ..transformers.callback import LoraOneCallback

_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LoraOneArgs(BaseModel):  # type: ignore[misc]
    """Keys of Axolotl's YAML; see `LoraOneCallback`."""

    loraone_samples: int = 64
    loraone_gamma: float | Literal["auto"] = "auto"
    loraone_optimizer: bool = True


class LoraOnePlugin(BasePlugin):  # type: ignore[misc]
    """Has a training with `adapter: lora` or `qlora` begin with the LoRA-One step, from its own rows.

    The losses and γ go to Axolotl's loggers. Raises ConfigError, before the model is loaded, for settings with which
    the gradient is not that of the layers: packed samples, fused LoRA kernels, other tasks than supervised fine-tuning.
    """

    def register(self, cfg: Any) -> None:
        """Fused LoRA kernels, which Axolotl switches on by itself, stay off unless the YAML names them."""
        for kernel in _KERNELS:
            if cfg.get(kernel) is None:
                cfg[kernel] = False

    def get_input_args(self) -> str:
        return "loraone_init.axolotl.LoraOneArgs"

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.adapter not in ("lora", "qlora"):
            raise ConfigError(f"LoraOnePlugin needs `adapter: lora` or `qlora`, got {cfg.adapter!r}")
        if cfg.lora_model_dir:
            raise ConfigError("lora_model_dir has a start of its own; leave it out, or leave LoraOnePlugin out")
        if cfg.rl or cfg.reward_model or cfg.process_reward_model:
            raise ConfigError(
                "LoraOnePlugin is for supervised fine-tuning; for others, initialise with loraone-init first"
            )
        if cfg.sample_packing:
            raise ConfigError(
                "sample_packing puts rows together in a way of Axolotl's own; set `sample_packing: false`, or"
                " initialise with loraone-init first and name its directory in lora_model_dir"
            )
        if used := [kernel for kernel in _KERNELS if cfg[kernel]]:
            raise ConfigError(f"{', '.join(used)} read weights without calling their layers; set them to false")

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[LoraOneCallback]:
        return [
            LoraOneCallback(
                samples=cfg.loraone_samples,
                gamma=cfg.loraone_gamma,
                optimizer=cfg.loraone_optimizer,
                trainer=trainer,
            )
        ]
