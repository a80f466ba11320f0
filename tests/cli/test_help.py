"""The help of all commands: quick, in groups, readable at 80 columns, with the defaults of the packages below."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from loraone_init.cli.export import main as export
from loraone_init.cli.export_targets import Gguf, Merged, Mlx, Onnx, OnnxAdapter, Peft
from loraone_init.cli.init import main as init
from loraone_init.cli.init_options import InitOptions
from loraone_init.cli.inspect import InspectOptions
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.train import main as train
from loraone_init.cli.train_options import TrainCommand
from loraone_init.config import InitConfig
from loraone_init.data.options import DataOptions
from loraone_init.exporters.onnx.options import OnnxOptions
from loraone_init.training.options import TrainOptions

VALUES = {init: InitOptions, train: TrainCommand, inspect: InspectOptions}
VALUES |= {export.commands[target.name]: target for target in (Merged, Peft, Mlx, Gguf, Onnx, OnnxAdapter)}
every_command = pytest.mark.parametrize("command", VALUES, ids=lambda command: command.name)

HELP_SECONDS = 2.0
"""An import of torch alone takes longer than what --help may take, even on a loaded machine."""


def help_of(command: click.Command) -> str:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0, result.output
    return result.stdout


def options_of(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


@pytest.mark.parametrize("arguments", [["init"], ["train"], ["inspect"], ["export"], ["export", "onnx"]], ids=" ".join)
def test_help_is_quick_and_needs_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from loraone_init.cli.{arguments[0]} import main;"
        f"main({[*arguments[1:], '--help']}, standalone_mode=False);"
        "print(*{'torch', 'transformers', 'onnx', 'numpy', 'rich'} & set(sys.modules), sep='', end='|')"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - start < HELP_SECONDS
    assert done.stdout.startswith("Usage:")
    assert done.stdout.endswith("\n|")


@every_command
def test_lines_fit_into_80_columns(command: click.Command) -> None:
    assert [line for line in help_of(command).splitlines() if len(line) > 80] == []


@every_command
def test_every_option_stands_once_and_under_a_heading(command: click.Command) -> None:
    text = help_of(command)
    for option in options_of(command):
        shown = re.findall(rf"^  (?:-\w, )?{re.escape(option.opts[-1])}(?![\w-])", text, re.M)
        assert len(shown) == 1, option.name
    headings = re.findall(r"^([A-Z][\w ]+):$", text, re.M)
    assert "Options" not in headings
    assert headings[-1] == "Other"
    others = text[text.index("Other:") :].split()
    assert [word for word in others if word.startswith("--")] in (["--version", "--help"], ["--help"])


def test_groups_of_init_begin_with_what_is_used_most() -> None:
    text = help_of(init)
    firsts = re.findall(r"^([A-Z][\w ]+):\n  (?:-\w, )?(--[\w-]+)", text, re.M)
    assert firsts[:5] == [
        ("Output", "--output"),
        ("What is adapted", "--rank"),
        ("Data", "--samples"),
        ("Step", "--gamma"),
        ("Memory and speed", "--device"),
    ]


@every_command
def test_every_option_is_a_field_of_one_value(command: click.Command) -> None:
    given = {param.name for param in command.params if param.expose_value}
    assert {field.name for field in dataclasses.fields(VALUES[command])} == given


@every_command
def test_every_option_has_help(command: click.Command) -> None:
    for option in options_of(command):
        assert option.help, option.name
        assert option.help.endswith((".", "]", "…")), "help is a sentence"


@pytest.mark.parametrize(
    ("command", "below"),
    [
        (init, InitConfig()),
        (init, DataOptions()),
        (train, TrainOptions()),
        (export.commands["onnx"], OnnxOptions()),
        (export.commands["onnx-adapter"], OnnxOptions()),
    ],
    ids=lambda value: value.name if isinstance(value, click.Command) else type(value).__name__,
)
def test_defaults_are_those_of_python(command: click.Command, below: object) -> None:
    """But for what is found out later, and then None here."""
    defaults = {
        option.name: option.default for option in options_of(command) if isinstance(option.default, (int, float, str))
    }
    same = {name for name in defaults if hasattr(below, name)}
    assert same
    assert {name: defaults[name] for name in same} == {name: getattr(below, name) for name in same}
