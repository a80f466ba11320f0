"""Every shipped recipe dry-runs on a tiny model of its kind; options and files come before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.architectures import make_classifier, make_pair_tokenizer, make_seq2seq
from support.causal import make_model, make_word_tokenizer
from support.commands import Command, error_line
from support.moe_models import make_moe

from loraone_init.cli.init import main as init
from loraone_init.cli.recipe import recipe_names, recipe_text
from loraone_init.cli.run_config import parse_entries

KINDS = {
    "gemma-3-270m": lambda: make_model("gemma3", torch.float32),
    "llama-2-7b": lambda: make_model("llama", torch.float32),
    "llama-3.2-1b": lambda: make_model("llama", torch.float32),
    "minilm-classifier": lambda: make_classifier("bert", torch.float32).base_model,  # its head is drawn
    "mistral-7b": lambda: make_model("mistral", torch.float32),
    "qwen3-0.6b": lambda: make_model("qwen3", torch.float32),
    "qwen3-30b-a3b": lambda: make_moe("qwen3-moe", torch.float32),
    "smollm2-135m": lambda: make_model("llama", torch.float32),
    "t5-base": lambda: make_seq2seq("t5", torch.float32),
}


def test_every_recipe_has_a_model_here() -> None:
    assert recipe_names() == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_dry_run(command: Command, tiny_data: Path, labelled: Path, tmp_path: Path, name: str) -> None:
    classifies = "classifier" in name
    KINDS[name]().save_pretrained(tmp_path)
    (make_pair_tokenizer() if classifies else make_word_tokenizer()).save_pretrained(tmp_path)
    done = command(tmp_path, labelled if classifies else tiny_data, "--recipe", name, "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["rank"], plan["gamma"]) == (8, "auto")
    assert plan["sample"]["rows_held_out"] > 0
    if name == "qwen3-30b-a3b":
        assert {layer["name"] for layer in plan["layers"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("name", KINDS)
def test_every_value_says_where_it_is_from(name: str) -> None:
    comments = " ".join(line for line in recipe_text(name).splitlines() if line.startswith("#"))
    told = {"model", "task", "target-modules", "gamma"}  # the model's own; "gamma: auto" is the search
    for entry in parse_entries(recipe_text(name), name):
        assert entry.key in told or entry.key in comments or "All else: this program's defaults" in comments, entry.key


def test_list(command: Command) -> None:
    done = command("--recipe", "list")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == recipe_names()
    assert "Qwen/Qwen3-0.6B" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_flags_and_files_come_before_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 32\nrank: 4\n")
    given = ["--config", str(file), "--recipe", "llama-2-7b"]
    for order in (given, given[2:] + given[:2]):
        options = init.make_context("loraone-init", ["rows.jsonl", *order, "-o", "out", "--rank", "2"]).params
        assert (options["rank"], options["alpha"], options["gamma"]) == (2, 32.0, "auto")
        assert (options["model"], options["data"]) == ("meta-llama/Llama-2-7b-hf", "rows.jsonl")
    both = init.make_context("loraone-init", ["mine", "rows.jsonl", *given, "-o", "out"]).params
    assert (both["model"], both["data"]) == ("mine", "rows.jsonl")


def test_unknown_recipe(command: Command) -> None:
    told = error_line(command("rows.jsonl", "--recipe", "lama-2-7b", "-o", "out").stderr)
    assert told == "Error: there is no recipe 'lama-2-7b'; did you mean llama-2-7b? (--recipe list shows all)"
