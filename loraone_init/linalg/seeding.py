"""Seeds of random numbers by layer."""

from __future__ import annotations

import hashlib

import torch


def layer_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator seeded by sha256 of seed and layer name: its numbers do not depend on layer order or device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # the Mersenne twister takes 32 bits
