"""Names from files of others: in the card they are text, in lines to paste they are strings, on a terminal harmless."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraone_init import Adapter
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.train import main as train
from loraone_init.cli.trainer_lines import lines_for_trainers
from loraone_init.errors import printable

NAMES = [
    "org/model",
    'x"); import os; os.system("id") #',
    "a: b # c",
    "two\nlicense: mit\n---\n# lines",
    "back`tick | cell <script>alert(1)</script>",
    "'; rm -rf ~; '",
    "null",
    "{braces} %s",
    "\x1b[2J\x1b]0;title\x07",
]


def named(initialised: Path, name: str) -> Adapter:
    adapter = Adapter.load(initialised)
    return replace(adapter, base={**adapter.base, "name": name}, sample={**adapter.sample, "source": name})


def opened_by(python: str) -> str:
    """The first argument of `from_pretrained` in the snippet, which must be code of two calls and nothing else."""
    tree = ast.parse(python)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.func.attr for call in calls] == ["from_pretrained"] * 2
    assert {type(node) for node in tree.body} <= {ast.ImportFrom, ast.Assign}
    return ast.literal_eval(calls[0].args[0])


@pytest.mark.parametrize("name", NAMES)
def test_model_card(name: str, initialised: Path, tmp_path: Path) -> None:
    named(initialised, name).save(tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    _, front, body = card.split("---\n", 2) if "\n" not in name else re.split(r"^---\n", card, maxsplit=2, flags=re.M)
    named_there = {"base_model": name, "datasets": [name]} if name in ("org/model", "null") else {}  # else no hub id
    front_matter = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "lora-one"]}
    assert yaml.safe_load(front) == front_matter | named_there
    (python,) = re.findall(r"```python\n(.*?)```", body, re.S)
    assert opened_by(python) == name
    prose = body.partition("## Use")[0]
    assert "<script>" not in re.sub(r"`[^`]*`", "", prose.replace("\\`", ""))
    assert not re.search(r"^(license: mit|# lines)", prose, re.M)
    rows = [re.split(r"(?<!\\)\|", line) for line in prose.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {4}  # two cells each
    assert "\x1b" not in card


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("single", [False, True])
def test_lines_for_trainers(single: bool, name: str, initialised: Path) -> None:
    output = Path("out.safetensors" if single else name)
    lines = lines_for_trainers(named(initialised, name), output)
    assert opened_by(lines["PEFT, TRL"]) == name
    directory = "lora-dir" if single else str(output)
    axolotl = yaml.safe_load(lines["Axolotl"])
    assert axolotl == {"base_model": name, "adapter": "lora", "lora_model_dir": directory}
    assert yaml.safe_load(lines["LLaMA-Factory"])["model_name_or_path"] == name
    assert shlex.split(lines["ms-swift"]) == ["swift", "sft", "--model", name, "--adapters", directory]


def test_directory_is_made_of_a_file_of_any_name(initialised: Path) -> None:
    output = Path('it\'s "$(id)".safetensors')
    python, option, code = shlex.split(lines_for_trainers(named(initialised, "m"), output)["As a directory"])
    assert (python, option) == ("python", "-c")
    assert f"Adapter.load({str(output)!r})" in code


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9b1m\u202ec\ud800") == "a\\x1b[2Jb\\r\\x07\\x9b1m\\u202ec\\ud800"
    assert printable("γ = 128\n\tœ 漢") == "γ = 128\n\tœ 漢"


def test_terminal_gets_no_control_characters(initialised: Path, tmp_path: Path) -> None:
    """A record with a base called like a sequence that clears the screen."""
    file = tmp_path / "hostile.safetensors"
    with safe_open(initialised, "pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["loraone"])
    record["base"]["name"] = NAMES[-1]
    save_file(load_file(initialised), file, metadata | {"loraone": json.dumps(record)})
    done = CliRunner().invoke(inspect, [str(file)])
    assert done.exit_code == 0, done.output
    assert "\\x1b[2J" in done.stdout
    missing = CliRunner().invoke(inspect, [str(tmp_path / "\x1b[2J.safetensors")])
    assert missing.exit_code == 1
    for text in (done.output, missing.output):
        assert not set(text) & {"\x1b", "\x07"}


def test_tables_and_written_lines_have_none(initialised: Path, tmp_path: Path) -> None:
    """Layers, the other adapter and the page have names that clear the screen and ring the bell."""
    other, page = tmp_path / "other\x1b[2J.safetensors", tmp_path / "page\x07.html"
    with safe_open(initialised, "pt") as opened:
        metadata = opened.metadata()
    metadata = {key: value.replace("self_attn", "self\\u001b[2J_attn") for key, value in metadata.items()}
    tensors = {name.replace("self_attn", "self\x1b[2J_attn"): tensor for name, tensor in load_file(initialised).items()}
    save_file(tensors, other, metadata)
    for options in ((), ("--layers",)):
        done = CliRunner().invoke(
            inspect, [*map(str, (other, "--compare", other, "--html", page, "--overwrite")), *options]
        )
        assert done.exit_code == 0, done.output
        told = "".join(done.output.split())
        for name in ("self\\x1b[2J_attn.q_proj", "Against", "other\\x1b[2J.safetensors:principal", "page\\x07.html"):
            assert name in told
        assert not set(done.output) & {"\x1b", "\x07"}


def test_training_is_written_without(initialised: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained\x1b[2J"
    options = ("--adapter", initialised, "-o", output, "--max-steps", 1, "--device", "cpu")
    done = CliRunner().invoke(train, [*map(str, (tiny_model, tiny_data, *options))])
    assert done.exit_code == 0, done.output
    assert "trained\\x1b[2J" in done.stdout
    assert "\x1b" not in done.output
