"""The README tells the truth: its Python runs, its commands parse, its help text is the command's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.paths import ROOT
from torch.distributed.run import get_args_parser

from loraone_init.cli.export import main as export
from loraone_init.cli.init import main
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.train import main as train

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(program: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{program} ")]


def python_in(directory: Path, code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    (directory / "examples").symlink_to(ROOT / "examples")
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HOME": str(directory)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_first_python_example(smollm2, tmp_path):
    done = python_in(tmp_path, blocks("python")[1], smollm2.parent.parent)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([8, 576]) torch.Size([576, 8])" in done.stdout


def test_python_example_with_a_module_of_ones_own(tmp_path):
    done = python_in(tmp_path, blocks("python")[2], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("loraone-init"))
def test_command_lines_parse(command):
    context = main.make_context("loraone-init", shlex.split(command)[1:])
    assert str(context.params["output"]) in command


@pytest.mark.parametrize("command", commands("loraone-inspect"))
def test_inspect_command_lines_parse(command):
    context = inspect.make_context("loraone-inspect", shlex.split(command)[1:])
    assert str(context.params["adapter"]) in command


@pytest.mark.parametrize("command", commands("loraone-export"))
def test_export_command_lines_parse(command):
    _, target, *arguments = shlex.split(command)
    context = export.commands[target].make_context(target, arguments)
    assert str(context.params["output"]) in command


@pytest.mark.parametrize("command", commands("loraone-train"))
def test_train_command_lines_parse(command):
    context = train.make_context("loraone-train", shlex.split(command)[1:])
    assert str(context.params["output"]) in command


@pytest.mark.parametrize("command", commands("torchrun"))
def test_torchrun_lines_parse(command):
    launch, program, arguments = re.split(r" (loraone-\w+) ", command)
    given = get_args_parser().parse_args([*shlex.split(launch)[1:], program, *shlex.split(arguments)])
    assert (given.no_python, given.training_script) == (True, program)
    context = {"loraone-init": main, "loraone-train": train}[program].make_context(program, given.training_script_args)
    assert str(context.params["output"]) in command


def test_node_programs_exist():
    assert all((ROOT / command.split()[1]).is_file() for command in commands("node"))


def test_figures_are_those_of_the_benchmark():
    spec = importlib.util.spec_from_file_location("init_benchmark", ROOT / "benchmarks" / "init.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    table = benchmark.markdown(json.loads((ROOT / "benchmarks" / "results" / "init.json").read_text()))
    assert len(table.splitlines()) == 2 + 4 + 2
    assert table in README


def test_comparison_is_that_of_the_records():
    from finetuning.presets import PRESETS
    from finetuning.records import read_records
    from finetuning.report import markdown

    records = read_records(ROOT / "benchmarks" / "results" / "finetune.jsonl", PRESETS["cpu"])
    assert markdown(records) in README


def test_demo_command_runs(smollm2, tmp_path, monkeypatch):
    """The very line, on fewer and shorter rows."""
    (command,) = [line for line in commands("loraone-init") if " demo " in line]
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2.parent.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    arguments = [*shlex.split(command)[1:], "--samples", "4", "--max-length", "64"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "adapters.safetensors").stat().st_size > 9_000_000


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in commands("make")} <= set(targets)


def test_help_text_is_the_commands():
    help_text = CliRunner().invoke(main, ["--help"]).output
    assert help_text[help_text.index("Options:") :].strip() in README


def test_every_option_has_help():
    assert [option.name for option in main.params if option.param_type_name == "option" and not option.help] == []


def test_links_to_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
