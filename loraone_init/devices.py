"""The device that is computed on."""

from __future__ import annotations

import torch

from .errors import ConfigError


def select_device(device: str) -> torch.device:
    """The torch device for an option's value, checked to be there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}; use auto, cpu, cuda or cuda:1") from error
    if place.type == "meta":
        raise ConfigError("device 'meta' holds no numbers; use auto, cpu or cuda")
    return place
