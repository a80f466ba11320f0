"""After PEFT or TRL has written an adapter anew, its record is found again beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from support.commands import error_line
from support.exports import export
from transformers import AutoModelForCausalLM

from loraone_init import Adapter
from loraone_init.cli.inspect import main as inspect
from loraone_init.errors import AdapterError


@pytest.fixture
def trained(tiny_model: Path, initialised: Path, tmp_path: Path) -> Path:
    """A directory that PEFT loaded, trained (every factor is doubled) and saved in the same place."""
    directory = tmp_path / "trained"
    Adapter.load(initialised).save(directory)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), directory, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(2.0)
    model.save_pretrained(directory)
    return directory


def test_record_is_found_again(trained: Path, initialised: Path) -> None:
    before, after = Adapter.load(initialised), Adapter.load(trained)
    assert (after.layers, after.config, after.loss, after.base) == (
        before.layers,
        before.config,
        before.loss,
        before.base,
    )
    assert after.training is not None
    assert after.training["by"] == "another trainer"
    for name, pair in after.pairs.items():
        assert pair.B.equal(2.0 * before.pairs[name].B)


def test_saved_as_it_was_it_is_untrained(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    Adapter.load(initialised).save(directory)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), directory).save_pretrained(directory)
    assert Adapter.load(directory).training is None


def test_commands_take_it(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(inspect, [str(trained), "--html", str(tmp_path / "page.html")])
    assert shown.exit_code == 0, shown.output
    assert "by another trainer" in shown.stdout
    single, again = tmp_path / "single.safetensors", tmp_path / "again"
    for source, output in ((trained, single), (trained, again), (single, tmp_path / "more")):
        done = export("peft", tiny_model, source, "-o", output)
        assert done.exit_code == 0, done.output
        assert Adapter.load(output).training == Adapter.load(trained).training
    assert "by another trainer" in (again / "README.md").read_text()
    found = Adapter.load(trained)
    assert repr(found).endswith(", trained by another trainer)")
    assert "by another trainer" in found.summary()
    assert "by another trainer" in found._repr_html_()


def test_record_of_another_adapter(trained: Path) -> None:
    file = trained / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(AdapterError, match=r"lora_alpha was 16 when .* it belongs to another adapter"):
        Adapter.load(trained)


@pytest.mark.parametrize("text", ["", "[]", '{"loraone": 3}', "[" * 100_000])
def test_record_that_cannot_be_read(text: str, trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    (trained / "loraone.json").write_text(text)
    done = export("merged", tiny_model, trained, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "loraone.json cannot be understood" in error_line(done.stderr)


def test_without_it_the_adapter_is_another_tools(trained: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(trained, plain)
    (plain / "loraone.json").unlink()
    with pytest.raises(AdapterError, match="it has no loraone metadata"):
        Adapter.load(plain)
