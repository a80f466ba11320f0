"""The command when it works: what it prints, what it writes, and that it starts quickly."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from support.commands import Command, beside_placement, with_gamma

from loraone_init import Adapter, __version__
from loraone_init.cli.support import parse_modules

TOO_LONG = ("--target-modules", "lm_head", "--gamma", 0.1)
"""The logits' step is long enough to raise the loss several times, short enough for ten doublings to lower it."""


def figures(result: Result) -> dict:
    """What --json printed; anything but JSON on standard output fails."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# The start.


def in_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_import_needs_no_heavy_library() -> None:
    code = "import sys, loraone_init; print(*{'torch', 'transformers', 'onnx', 'matplotlib'} & set(sys.modules))"
    assert in_python(code).split() == []


def test_help_where_the_terminal_lacks_greek() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loraone_init", "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"LoRA's ?" in done.stdout


def test_version(command: Command) -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout


def test_every_option_is_read(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Those that change the adapter reach its record."""
    output = tmp_path / "a.safetensors"
    options = ["--rank", 2, "--alpha", 4, "--gamma", 64, "--scaling", "lora", "--seed", 3, "--samples", 5]
    options += ["--target-modules", "q_proj, v_proj", "--exclude-modules", "model.layers.0.self_attn.q_proj"]
    options += ["--max-length", 5, "--batch-size", 2, "--all-tokens", "--dtype", "float64", "--device", "cpu"]
    options += ["--block-path", "model.layers", "--columns", "text=completion"]
    assert command(tiny_model, tiny_data, "-o", output, *options).exit_code == 0
    adapter = Adapter.load(output)
    config, sample = adapter.config, adapter.sample["options"]
    assert (config.rank, config.alpha, config.gamma, config.scaling, config.seed) == (2, 4.0, 64.0, "lora", 3)
    assert (config.target_modules, config.block_path) == (("q_proj", "v_proj"), "model.layers")
    assert len(adapter.pairs) == 5
    assert adapter.base["dtype"] == "float64"
    assert (sample["samples"], sample["max_length"], sample["batch_size"], sample["seed"]) == (5, 5, 2, 3)
    assert (sample["completion_only"], sample["columns"]) == (False, {"text": "completion"})


def test_underscores_in_option_names(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    result = command(tiny_model, tiny_data, "-o", output, "--max_length", 5, "--target_modules", "q_proj")
    assert result.exit_code == 0, result.stderr
    adapter = Adapter.load(output)
    assert adapter.sample["options"]["max_length"] == 5
    assert adapter.config.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,model.layers.0.mlp.up-proj", ("q_proj", "model.layers.0.mlp.up-proj")),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("layers.[01].*", "layers.[01].*"),
    ],
)
def test_modules_are_names_or_a_regular_expression(value: str | None, expected: str | tuple[str, ...]) -> None:
    assert parse_modules(value) == expected


# What is printed.


def test_table(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors")
    assert (result.exit_code, beside_placement(result.stderr)) == (0, "")
    assert "21 of rank 8" in result.stdout
    assert "all 12 rows (prompt-completion)" in result.stdout


def test_json_is_all_that_is_printed(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    result = command(tiny_model, tiny_data, "-o", output, "--json")
    found, adapter = figures(result), Adapter.load(output)
    assert beside_placement(result.stderr) == ""
    assert set(found) == {
        *("output", "output_bytes", "base", "layers", "experts", "parameters", "rank", "ranks", "alpha", "gamma"),
        *("scaling", "captured_energy_min", "captured_energy_median", "largest_sine", "layers_without_gap", "growth"),
        *(
            "layers_not_spectral",
            "vision_layers_left_out",
            "sample",
            "loss",
            "schedule",
            "warning",
            "seconds",
            "processes",
            "peak_memory_bytes",
            "peak_device_memory_bytes",
            "trainers",
            "published",
        ),
    }
    assert (found["output"], found["output_bytes"]) == (str(output), output.stat().st_size)
    assert (found["layers"], found["parameters"]) == (len(adapter.pairs), adapter.num_parameters)
    assert found["vision_layers_left_out"] == 0
    assert (found["rank"], found["alpha"], found["gamma"], found["scaling"]) == (8, 16.0, 128.0, "rslora")
    assert found["loss"]["before"] == adapter.loss.before > adapter.loss.after == found["loss"]["after"]
    assert found["base"] == str(tiny_model.resolve())
    assert found["sample"]["sha256"] == adapter.sample["sha256"]


@pytest.mark.parametrize("name", ["a.safetensors", "lora"])
def test_lines_for_trainers(name: str, command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    """They name base and adapter; for a single file there is one that makes the directory they need, and it works."""
    lines = figures(command(tiny_model, tiny_data, "-o", out / name, "--json"))["trainers"]
    directory = str(out / "lora") if name == "lora" else "lora-dir"
    assert list(lines)[-4:] == ["PEFT, TRL", "Axolotl", "LLaMA-Factory", "ms-swift"]
    assert all(str(tiny_model) in lines[trainer] and directory in lines[trainer] for trainer in list(lines)[-4:])
    assert ("As a directory" in lines) == (name == "a.safetensors")
    if name == "a.safetensors":
        program, flag, code = shlex.split(lines["As a directory"])
        assert (program, flag) == ("python", "-c")
        subprocess.run([sys.executable, flag, code], cwd=out, check=True, timeout=120)
        assert (out / "lora-dir" / "adapter_config.json").is_file()


def test_in_a_thread_that_may_not_set_signal_handlers(
    command: Command, tiny_model: Path, tiny_data: Path, out: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(command, tiny_model, tiny_data, "-o", out / "a.safetensors", "-q").result()
    assert (result.exit_code, beside_placement(result.stderr)) == (0, "")


def test_lines_for_peft_run(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    """They are what docs/training.md shows, and train all factors."""
    lines = figures(command(tiny_model, tiny_data, "-o", out / "lora", "--json"))["trainers"]["PEFT, TRL"]
    names: dict[str, Any] = {}
    exec(lines, names)
    trainable = [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 21


def test_json_from_a_process_of_its_own(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """No library has a word to say on either stream."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "loraone_init",
            *with_gamma(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", "--json"),
        ],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert (done.returncode, beside_placement(done.stderr.decode())) == (0, "")
    assert json.loads(done.stdout)["layers"] == 21


@pytest.mark.parametrize("output", ["a.safetensors", "peft"])
def test_quiet_prints_nothing(
    output: str,
    command: Command,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_data.parent)  # absolute paths would be warned of
    result = command(tiny_model, tiny_data.name, "-o", tmp_path / output, "--quiet", "--base-name", "someone/tiny")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / output).exists()


# What is written.


def test_both_forms_hold_the_same_adapter(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    file, directory = tmp_path / "new" / "a.safetensors", tmp_path / "other" / "new" / "peft"
    for output in (file, directory):
        assert command(tiny_model, tiny_data, "-o", output).exit_code == 0
    single, peft = Adapter.load(file), Adapter.load(directory)
    assert list(single.pairs) == list(peft.pairs)
    assert len(single.pairs) == 21
    for name, pair in single.pairs.items():
        assert torch.equal(pair.A, peft.pairs[name].A)
        assert torch.equal(pair.B, peft.pairs[name].B)
    assert sorted(os.listdir(file.parent)) == ["a.config.yaml", "a.safetensors"]
    assert os.listdir(directory.parent) == ["peft"]
    assert sorted(os.listdir(directory)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraone-init.yaml",
        "loraone.json",
    ]
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_others_may_read_what_is_written(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Temporary files are for their owner only; the results have the modes that the umask gives."""
    before = os.umask(0o022)
    try:
        for output in ("a.safetensors", "peft"):
            assert command(tiny_model, tiny_data, "-o", tmp_path / output).exit_code == 0
    finally:
        os.umask(before)
    directory = tmp_path / "peft"
    assert directory.stat().st_mode & 0o777 == 0o755
    for file in (tmp_path / "a.safetensors", *directory.iterdir()):
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_same_command_writes_the_same_bytes(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    directories = [tmp_path / name for name in ("c", "d")]
    for output in (*files, *directories):
        assert command(tiny_model, tiny_data, "-o", output).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    for file in directories[0].iterdir():
        assert file.read_bytes() == (directories[1] / file.name).read_bytes(), file.name


def test_the_seed_draws_the_rows(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    digests = set()
    for seed in range(3):
        options = ("-o", tmp_path / f"{seed}.safetensors", "--json", "--samples", 4, "--seed", seed)
        digests.add(figures(command(tiny_model, tiny_data, *options))["sample"]["sha256"])
    assert len(digests) == 3


def test_empty_directory_is_filled(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    assert command(tiny_model, tiny_data, "-o", tmp_path / "peft").exit_code == 0
    assert len(Adapter.load(tmp_path / "peft").pairs) == 21


def test_overwrite_replaces_a_file(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    output.write_text("before")
    assert command(tiny_model, tiny_data, "-o", output, "--overwrite").exit_code == 0
    assert len(Adapter.load(output).pairs) == 21
    assert sorted(os.listdir(tmp_path)) == ["a.config.yaml", "a.safetensors"]


def test_overwrite_keeps_other_files_of_a_directory(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "peft"
    (directory / "checkpoint").mkdir(parents=True)
    (directory / "checkpoint" / "state").write_text("kept")
    (directory / "adapter_model.safetensors").write_text("before")
    assert command(tiny_model, tiny_data, "-o", directory, "--overwrite").exit_code == 0
    assert len(Adapter.load(directory).pairs) == 21
    assert (directory / "checkpoint" / "state").read_text() == "kept"
    assert len(os.listdir(directory)) == 6


# A step that is too long.


def test_step_that_raises_the_loss(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """It is said loudly, and the γ that is suggested does lower the loss, to what was promised."""
    output = tmp_path / "a.safetensors"
    result = command(tiny_model, tiny_data, "-o", output, "--json", *TOO_LONG)
    loss = figures(result)["loss"]
    assert loss["after"] > 2 * loss["before"]
    assert "WARNING: the step RAISES the loss" in result.stderr
    assert f"Try --gamma {loss['suggested_gamma']:g}" in " ".join(result.stderr.split())

    gamma = loss["suggested_gamma"]
    result = command(tiny_model, tiny_data, "-o", output, "--json", "--overwrite", *TOO_LONG, "--gamma", gamma)
    lowered = figures(result)["loss"]
    assert beside_placement(result.stderr) == ""
    assert lowered["after"] < lowered["before"]
    assert lowered["after"] == pytest.approx(loss["suggested_loss"], rel=1e-5)  # factors are scaled in fp32


def test_quiet_keeps_the_warning(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    result = command(tiny_model, tiny_data, "-o", output, "--quiet", *TOO_LONG)
    assert result.stdout == ""
    assert "RAISES the loss" in result.stderr


def test_json_of_a_loss_that_is_no_number(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", "--json", "--gamma", 1e-30)
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["loss"]["after"] is None
