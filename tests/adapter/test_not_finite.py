"""Adapters with NaN or infinity in them are neither written nor read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import error_line
from support.exports import export

from loraone_init import Adapter
from loraone_init.cli.inspect import main as inspect
from loraone_init.errors import NumericalError
from loraone_init.linalg.factors import LoraPair


@pytest.mark.parametrize("name", ["a.safetensors", "peft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_is_not_written(value: float, name: str, initialised: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(initialised)
    last = [*adapter.pairs][-1]
    pair = adapter.pairs[last]
    B = pair.B.clone()
    B[-1, -1] = value
    broken = replace(adapter, pairs={**adapter.pairs, last: LoraPair(pair.A, B)})
    with pytest.raises(NumericalError, match=f"{last}.lora_B.weight is not finite"):
        broken.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_is_not_read(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    """By no command: exports would copy it, the inspection end in a LinAlgError."""
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(initialised)
    name = sorted(tensors)[-1]
    tensors[name].fill_(torch.nan)
    with safe_open(initialised, "pt") as file:
        save_file(tensors, broken, file.metadata())
    shown = CliRunner().invoke(inspect, [str(broken)])
    for done in (shown, export("peft", tiny_model, broken, "-o", tmp_path / "out")):
        assert done.exit_code == 1
        assert f"tensor {name} holds numbers that are not finite" in error_line(done.stderr)
    assert not (tmp_path / "out").exists()
