"""Packages of the extras: one wording for what is missing, and asked before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.commands import Command, error_line

import loraone_init.training.trainer  # noqa: F401  transformers imports its Trainer while PEFT is there
from loraone_init.cli.train import main as train
from loraone_init.errors import MissingPackageError
from loraone_init.extras import require

MISSING = "there is neither this model nor this adapter"


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_what_is_installed_passes() -> None:
    require("train", "torch", "click", by="anything")
    with pytest.raises(MissingPackageError):  # the same call, for one that is not
        require("train", "torch", "no_such_package", by="anything")


def test_one_wording() -> None:
    with pytest.raises(MissingPackageError) as caught:
        require("mlx", "torch", "no_such_package", by="an adapter for mlx-lm")
    assert str(caught.value) == (
        "an adapter for mlx-lm needs no-such-package, which is not installed: in the clone of loraone-init,"
        ' pip install ".[mlx]"'
    )


def test_several_packages() -> None:
    with pytest.raises(MissingPackageError, match="needs no-a and no-b, which are not installed"):
        require("mlx", "no_a", "no_b", by="this")


@pytest.mark.parametrize(
    ("data", "package"), [("rows.parquet", "pyarrow"), ("org/name", "datasets")], ids=["parquet", "hub"]
)
def test_init_asks_before_the_model_is_opened(
    data: str, package: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, package)
    result = command(MISSING, data, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 1
    assert f"needs {package}, which is not installed" in error_line(result.stderr)


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ((), "peft"),
        *((("--report-to", name), name) for name in ("tensorboard", "trackio", "wandb")),
        (("--eval-data", "e.parquet"), "pyarrow"),
    ],
)
def test_train_asks_before_the_adapter_is_read(
    options: tuple[str, ...], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, package)
    arguments = [MISSING, "rows.jsonl", "--adapter", MISSING, "-o", str(tmp_path / "trained"), *options]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 1
    assert f"needs {package}, which is not installed" in error_line(result.stderr)
