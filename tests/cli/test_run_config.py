"""`--config`: options from a file, what it refuses, and what every run writes down of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from support.commands import Command, error_line
from support.exports import export

from loraone_init import Adapter
from loraone_init.cli.init import main as init
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.run_config import known_keys, read_entries
from loraone_init.cli.train import main as train

OPTIONS = """\
rank: 3
target_modules: [q_proj, v_proj]   # a list stands for names with commas
columns: {text: prompt}
gamma: 2e2                         # no number to YAML 1.1
max-length: 64
completion_only: null
assistant-only: no
"""


def test_file_gives_options_and_flags_win(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path, out: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{OPTIONS}model: {tiny_model}\ndata: nowhere.jsonl\noutput: {out / 'file.safetensors'}\n")
    done = command("--config", file, tiny_model, tiny_data, "--rank", 2, "-o", out / "flag.safetensors")
    assert done.exit_code == 0, done.stderr
    adapter = Adapter.load(out / "flag.safetensors")
    assert (adapter.config.rank, adapter.config.gamma) == (2, 200.0)
    assert adapter.config.target_modules == ("q_proj", "v_proj")
    assert adapter.sample["options"]["columns"] == {"text": "prompt"}
    assert adapter.sample["options"]["max_length"] == 64
    assert not (out / "file.safetensors").exists()


@pytest.mark.parametrize("source", ["a.config.yaml", "a.safetensors", "peft/loraone-init.yaml"])
def test_the_record_of_a_run_repeats_it(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path, source: str
) -> None:
    """To the byte, with γ and the number of rows that were searched for, whatever was left to defaults."""
    options = ("--samples", "auto", "--gamma", "auto", "--held-out", 4, "--rank-budget", 2, "--all-tokens")
    output = source.partition("/")[0].replace("a.config.yaml", "a.safetensors")
    first = command(tiny_model, tiny_data, "-o", tmp_path / output, *options, "--token", "hf_secret", "--seed", 3)
    assert first.exit_code == 0, first.stderr
    again = command("--config", tmp_path / source, "-o", tmp_path / "again" / output)
    assert again.exit_code == 0, again.stderr
    weights = f"{output}/adapter_model.safetensors" if output == "peft" else output
    assert (tmp_path / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    recorded = Adapter.load(tmp_path / output).run
    assert recorded["gamma"] == recorded["samples"] == "auto"
    assert recorded["completion-only"] is False
    assert not {"token", "output", "placement", "rank"} & recorded.keys()


def test_an_adapter_of_a_stranger_does_not_say_where_to_write_or_what_to_run(
    command: Command, initialised: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    adapter = Adapter.load(initialised)
    for run, expected in (({"push-to-hub": "evil/repo"}, "push-to-hub"), ({"output": "/etc/x.safetensors"}, "output")):
        file = tmp_path / f"{expected}.safetensors"
        replace(adapter, run=run).save(file)
        result = command("--config", file, tiny_model, tiny_data, "-o", tmp_path / "a.safetensors")
        assert result.exit_code == 1
        assert f"asks for --{expected}, which is not taken from an adapter" in result.stderr
    replace(adapter, run={"trust-remote-code": True, "rank": 3}).save(tmp_path / "code.safetensors")
    done = command("--config", tmp_path / "code.safetensors", tiny_model, tiny_data, "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 0, done.stderr
    made = Adapter.load(tmp_path / "a.safetensors")
    assert (made.config.rank, made.run["trust-remote-code"]) == (3, False)


def test_flag_takes_the_place_of_a_budget_in_the_file(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank-budget: 4\n")
    done = command(tiny_model, tiny_data, "--config", file, "-r", 2, "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 0, done.stderr
    config = Adapter.load(tmp_path / "a.safetensors").config
    assert (config.rank, config.rank_budget) == (2, None)
    file.write_text("rank-budget: 4\nrank: 8\n")
    both = command(tiny_model, tiny_data, "--config", file, "-o", tmp_path / "b.safetensors")
    assert both.exit_code == 2
    assert "exclude each other" in both.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank: 8\nranks: 8", "line 2: loraone-init has no option 'ranks'; did you mean rank?"),
        ("token_: x", "did you mean token?"),
        ("config: other.yaml", "has no option 'config'"),
        ("rank: 8.5", "line 1: rank: '8.5' is not a valid integer range."),
        ("rank: yes", "rank: 'true' is not a valid integer range."),
        ("overwrite: 3", "overwrite is '3', expected true or false"),
        ("dtype: float31", "dtype: 'float31' is not one of 'auto', 'float32'"),
        ("gamma: {a: {b: 1}}", "gamma is nested"),
        ("rank: 8\nrank: 9", "line 2: rank is there twice"),
        ("all-tokens: yes\ncompletion-only: yes", "line 2: completion-only and all-tokens are one option"),
        ("rank: [1", "is no YAML"),
        ("- rank", "holds no options"),
        ("split: !!python/object/apply:os.system [false]", "split has the tag python/object/apply:os.system"),
        ("rank: \x00", "is no YAML"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_refused_in_one_line(command: Command, tmp_path: Path, out: Path, text: str | bytes, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = command("nowhere", "rows.jsonl", "-o", out / "a", "--config", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert told in error_line(done.stderr)
    assert list(out.iterdir()) == []


def test_files_that_are_no_configuration(command: Command, initialised: Path, tiny_model: Path, tmp_path: Path) -> None:
    for file, told in (
        (tmp_path / "nowhere.yaml", "cannot be read"),
        (tmp_path, "is a directory; name the YAML file in it"),
        (tiny_model / "model.safetensors", "holds no record of loraone-init"),
        (initialised, "was not made by the command"),
    ):
        done = command("m", "d", "-o", tmp_path / "a.safetensors", "--config", file)
        assert (done.exit_code, told in error_line(done.stderr)) == (1, True), done.stderr


def test_a_file_of_that_name_is_not_replaced(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path, out: Path
) -> None:
    """Not without --overwrite, and one that we did not write not at all."""
    (out / "a.config.yaml").write_text("mine: true\n")
    run = (tiny_model, tiny_data, "-o", out / "a.safetensors")
    for options in ((), ("--overwrite",)):
        assert "was not written by this command" in error_line(command(*run, *options).stderr)
    assert [file.name for file in out.iterdir()] == ["a.config.yaml"]
    (out / "a.config.yaml").unlink()
    assert command(*run).exit_code == 0
    (out / "a.safetensors").unlink()
    assert "a.config.yaml exists already" in error_line(command(*run).stderr)
    assert command(*run, "--overwrite", "--rank", 2).exit_code == 0
    assert yaml.safe_load((out / "a.config.yaml").read_text())["rank"] == 2


def test_exported_run_is_repeated(initialised: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = ("--dtype", "fp16", "--token", "hf_secret")
    assert export("merged", tiny_model, initialised, "-o", tmp_path / "m", *options).exit_code == 0
    again = export("merged", "--config", tmp_path / "m" / "loraone-export.yaml", "-o", tmp_path / "m2")
    assert again.exit_code == 0, again.stderr
    assert "hf_secret" not in (tmp_path / "m" / "loraone-export.yaml").read_text()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "m2" / "model.safetensors").read_bytes()


def test_inspect_takes_a_file_and_does_not_write_over_it(initialised: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.yaml"
    file.write_text(f"adapter: {initialised}\nhtml: {file}\noverwrite: true\njson: true\n")
    done = CliRunner().invoke(inspect, ["--config", str(file)])
    assert "is an input" in error_line(done.stderr)
    done = CliRunner().invoke(inspect, ["--config", str(file), "--html", str(tmp_path / "page.html")])
    assert (done.exit_code, '"layers"' in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("command", [init, train, inspect], ids=lambda command: command.name)
def test_every_option_is_a_key(command: click.Command) -> None:
    missing = {param.name for param in command.params} - {param.name for param in known_keys(command).values()}
    assert missing - {"recipe"} == {"config", "version"}


def test_home_directory_and_text_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("revision: 010\nmodel: ~/model\ndata: x\nsplit: on\n")
    assert [(entry.key, entry.value) for entry in read_entries(file)] == [
        ("revision", "010"),
        ("model", "~/model"),
        ("data", "x"),
        ("split", True),
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    given = init.make_context("loraone-init", ["--config", str(file), "-o", "out"]).params
    assert (given["model"], given["revision"], given["split"]) == (str(tmp_path / "model"), "010", "true")
