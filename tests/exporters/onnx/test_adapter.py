"""`loraone-export onnx-adapter`: one base graph, adapters switched from run to run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result
from peft import PeftModel
from support.causal import make_model
from support.commands import content, error_line
from support.exports import export, save_base, save_peft
from support.onnx_runs import empty_caches
from support.paths import ROOT
from transformers import AutoModelForCausalLM

PAGE = ROOT / "docs" / "onnx.md"
ROUNDING = 2e-5  # of logits of size 3 after sums in fp32 in another order
PROMPT = [5, 17, 40, 3, 66, 21, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Result]:
    """base, adapters first (all layers, rank 4) and second (q_proj, rank 7, rsLoRA), and what the commands said."""
    directory = tmp_path_factory.mktemp("adapters")
    save_peft(directory / "first", save_base(directory / "base"))
    options = {"r": 7, "use_rslora": True, "target_modules": ["q_proj"]}
    save_peft(directory / "second", make_model("llama", torch.float32), **options)
    first = export("onnx-adapter", directory / "base", directory / "first", "-o", directory / "out")
    file = directory / "second.onnx_adapter"
    second = export(
        "onnx-adapter", directory / "base", directory / "second", "-o", file, "--base-graph", directory / "out"
    )
    return directory, first, second


def run_options(adapter: Path) -> tuple[onnxruntime.RunOptions, onnxruntime.LoraAdapter]:
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(adapter))
    options.add_active_adapter(loaded)
    return options, loaded


def open_base_graph(directory: Path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(directory / "out" / "onnx" / "model.onnx", settings)


def test_base_alone_and_two_adapters_in_turn(folder: tuple[Path, Result, Result]) -> None:
    """In one session, against PEFT; a run without adapter after one with it is the base again."""
    directory, first, second = folder
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    session, ids = open_base_graph(directory), np.array([PROMPT])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(PROMPT))[None]}
    inputs |= empty_caches(session, 1)
    files = {"first": directory / "out" / "first.onnx_adapter", "second": directory / "second.onnx_adapter"}
    seen = []
    for name in (None, "first", "second", None):
        base = AutoModelForCausalLM.from_pretrained(directory / "base")
        model = base if name is None else PeftModel.from_pretrained(base, directory / name)
        options, _adapter = (None, None) if name is None else run_options(files[name])
        (logits,) = session.run(["logits"], inputs, options)
        expected = model.eval()(input_ids=torch.from_numpy(ids)).logits.detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING)
        seen.append(logits)
    assert np.array_equal(seen[0], seen[3])
    assert min(np.abs(seen[0] - seen[1]).max(), np.abs(seen[0] - seen[2]).max()) > 100 * ROUNDING


def test_factors_are_inputs_with_empty_defaults(folder: tuple[Path, Result, Result]) -> None:
    values = {value.name: value.shape for value in open_base_graph(folder[0]).get_overridable_initializers()}
    assert len(values) == 2 * 3 * 7
    name = "model.layers.1.mlp.down_proj"
    assert values[f"{name}.lora_A"] == [48, f"{name}.rank"]
    assert values[f"{name}.lora_B"] == [f"{name}.rank", 32]


def test_scale_is_in_b(folder: tuple[Path, Result, Result]) -> None:
    """s = 8/√7, and (in, r) and (r, out) as a product of rows takes them."""
    loaded = onnxruntime.AdapterFormat.read_adapter(str(folder[0] / "second.onnx_adapter")).get_parameters()
    name = "model.layers.0.self_attn.q_proj"
    base = AutoModelForCausalLM.from_pretrained(folder[0] / "base")
    layer = PeftModel.from_pretrained(base, folder[0] / "second").base_model.model.get_submodule(name)
    change = loaded[f"{name}.lora_A"].numpy() @ loaded[f"{name}.lora_B"].numpy()
    np.testing.assert_allclose(change.T, layer.get_delta_weight("default").detach().numpy(), rtol=0, atol=1e-6)


def test_adapter_with_other_layers_is_refused(folder: tuple[Path, Result, Result], tmp_path: Path) -> None:
    save_peft(tmp_path / "third", make_model("llama", torch.float32), target_modules=["lm_head"])
    before = content(tmp_path)
    arguments = (folder[0] / "base", tmp_path / "third", "-o", tmp_path / "third.onnx_adapter")
    result = export("onnx-adapter", *arguments, "--base-graph", folder[0] / "out")
    assert result.exit_code == 1
    assert "lm_head" in error_line(result.stderr)
    assert content(tmp_path) == before


def test_another_base_is_refused(folder: tuple[Path, Result, Result], tmp_path: Path) -> None:
    make_model("llama", torch.float32, seed=5).save_pretrained(tmp_path / "other")
    arguments = (tmp_path / "other", folder[0] / "second", "-o", tmp_path / "x.onnx_adapter")
    result = export("onnx-adapter", *arguments, "--base-graph", folder[0] / "out")
    assert result.exit_code == 1
    assert "other weights" in error_line(result.stderr)
    assert not (tmp_path / "x.onnx_adapter").exists()


@pytest.mark.parametrize("output", ["x", "x.onnx_adapter"])
def test_output_has_to_fit_what_is_written(output: str, folder: tuple[Path, Result, Result], tmp_path: Path) -> None:
    more = ("--base-graph", folder[0] / "out") if output == "x" else ()
    result = export("onnx-adapter", folder[0] / "base", folder[0] / "second", "-o", tmp_path / output, *more)
    assert result.exit_code == 1
    assert ".onnx_adapter" in error_line(result.stderr)
    assert content(tmp_path) == {}


def test_no_folder_with_a_base_graph(folder: tuple[Path, Result, Result], tmp_path: Path) -> None:
    arguments = (folder[0] / "base", folder[0] / "second", "-o", tmp_path / "x.onnx_adapter")
    result = export("onnx-adapter", *arguments, "--base-graph", tmp_path)
    assert result.exit_code == 1
    assert "no folder with a base graph" in error_line(result.stderr)


def test_nothing_is_overwritten_unasked(folder: tuple[Path, Result, Result]) -> None:
    directory = folder[0]
    file = directory / "second.onnx_adapter"
    before = file.read_bytes()
    arguments = (directory / "base", directory / "first", "-o", file, "--base-graph", directory / "out")
    result = export("onnx-adapter", *arguments)
    assert result.exit_code == 1
    assert "--overwrite" in error_line(result.stderr)
    assert file.read_bytes() == before


def test_example_of_the_page_runs(folder: tuple[Path, Result, Result], tmp_path: Path) -> None:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "LoraAdapter" in block]
    shutil.copytree(folder[0] / "out", tmp_path / "onnx-base")
    (tmp_path / "onnx-base" / "first.onnx_adapter").rename(tmp_path / "onnx-base" / "lora-dir.onnx_adapter")
    shutil.copy(folder[0] / "second.onnx_adapter", tmp_path / "other.onnx_adapter")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "onnx-base/lora-dir.onnx_adapter",
        "other.onnx_adapter",
    ]
