"""The methods compared: where each starts from, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Start = Literal["plain", "pissa", "lora-ga", "loraone", "random"]

ALPHA = 16


@dataclass(frozen=True)
class Method:
    """label: in tables. gamma: of the starts "loraone" and "random". trained: or evaluated at its start only."""

    label: str
    start: Start
    scaling: Literal["lora", "rslora"] = "rslora"
    gamma: float | Literal["auto"] | None = None
    preconditioned: bool = False
    trained: bool = True


METHODS = {
    "step-128": Method("the step alone, γ = 128", "loraone", gamma=128.0, trained=False),
    "step": Method("the step alone, γ = auto", "loraone", gamma="auto", trained=False),
    "lora": Method("LoRA, s = α/r", "plain", scaling="lora"),
    "rslora": Method("rsLoRA", "plain"),
    "rslora+prec": Method("rsLoRA, preconditioned", "plain", preconditioned=True),
    "lora-ga": Method("PEFT lora_ga", "lora-ga"),
    "pissa": Method("PiSSA", "pissa"),
    "random": Method("random directions, γ = auto", "random", gamma="auto"),
    "loraone-128": Method("LoRA-One, γ = 128", "loraone", gamma=128.0),
    "loraone-128+prec": Method("LoRA-One, γ = 128, preconditioned", "loraone", gamma=128.0, preconditioned=True),
    "loraone": Method("LoRA-One, γ = auto", "loraone", gamma="auto"),
    "loraone+prec": Method("LoRA-One, γ = auto, preconditioned", "loraone", gamma="auto", preconditioned=True),
}
"""By name in the records."""
