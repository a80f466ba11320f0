"""`--rank-budget` as a user meets it: the commands that make, tell of, train and export an adapter of several ranks."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from support.architectures import THREE, make_classifier, make_pair_tokenizer
from support.causal import make_word_tokenizer, relative_error
from support.commands import Command, Refused, beside_placement, with_gamma
from support.exports import ROUNDING, export, logits_of, peft_logits
from support.moe_models import make_moe
from support.rank_processes import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraone_init import Adapter
from loraone_init.adapter.files import DIRECTORY_FILES
from loraone_init.cli.inspect import main as inspect
from loraone_init.cli.train import main as train

MLX = 1e-4  # relative; other kernels in fp32


@pytest.fixture(scope="module")
def budgeted(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory of 21 layers with 84 ranks."""
    from loraone_init.cli.init import main

    directory = tmp_path_factory.mktemp("budgeted") / "lora"
    done = CliRunner().invoke(main, with_gamma(tiny_model, tiny_data, "-o", directory, "--rank-budget", 4, "-q"))
    assert done.exit_code == 0, done.output
    return directory


# Making one.


def test_summary(command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", tmp_path / "a.safetensors", "--rank_budget", "total:84", "--json")
    assert (result.exit_code, beside_placement(result.stderr)) == (0, "")
    told, adapter = json.loads(result.stdout), Adapter.load(tmp_path / "a.safetensors")
    ranks = sorted(adapter.ranks.values())
    assert told["ranks"] == {"min": ranks[0], "median": ranks[10], "max": ranks[-1], "total": 84}
    assert (told["rank"], told["parameters"]) == (4, adapter.num_parameters)
    table = command(tiny_model, tiny_data, "-o", tmp_path / "b.safetensors", "--rank-budget", "4")
    assert f"21 of rank {ranks[0]} to {ranks[-1]} (median {ranks[10]}, 84 together)" in " ".join(table.stdout.split())


def test_average_and_total_give_the_same_bytes_but_for_the_record(
    budgeted: Path, command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    assert command(tiny_model, tiny_data, "-o", tmp_path / "lora", "--rank-budget", "total:84").exit_code == 0
    config = "adapter_config.json"
    assert (tmp_path / "lora" / config).read_bytes() == (budgeted / config).read_bytes()
    first, second = Adapter.load(budgeted), Adapter.load(tmp_path / "lora")
    assert all(torch.equal(pair.B, second.pairs[name].B) for name, pair in first.pairs.items())


def test_dry_run(command: Command, tiny_model: Path, tiny_data: Path) -> None:
    arguments = [tiny_model, tiny_data, "--dry-run", "--rank-budget", "4"]
    told = json.loads(command(*arguments, "--json").stdout)
    uniform = json.loads(command(*arguments[:3], "--rank", "4", "--json").stdout)
    assert told["rank_budget"] == {"total": 84, "least": 1, "most": 16}
    assert uniform["rank_budget"] is None
    assert told["parameters"] == uniform["parameters"]
    text = " ".join(command(*arguments).stdout.split())
    assert "21 of 84 ranks together, 1 to 16 each" in text
    assert f"{told['parameters']:,} if all ranks were equal" in text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("total:20", "20 ranks are too few for 21 layers"),
        ("total:5000", "5000 ranks are more than the 21 layers may get by their shapes"),
        ("40", "840 ranks are more than"),
        ("8.5", "an average rank such as 8, or a sum such as total:1680"),
        ("0", "at least 1"),
    ],
)
def test_impossible_budgets(value: str, told: str, refused: Refused) -> None:
    assert told in refused("--rank-budget", value)


def test_rank_and_budget_exclude_each_other(command: Command, tiny_model: Path, tiny_data: Path, out: Path) -> None:
    result = command(tiny_model, tiny_data, "-o", out / "a.safetensors", "--rank", 8, "--rank-budget", 8)
    assert (result.exit_code, list(out.iterdir())) == (2, [])
    assert "--rank and --rank-budget exclude each other" in result.stderr


def test_gamma_is_searched_with_these_ranks(
    budgeted: Path, command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options = ["--rank-budget", 4, "--gamma", "auto", "--held-out", 4, "--samples", 8]
    assert command(tiny_model, tiny_data, "-o", tmp_path / "auto", *options).exit_code == 0
    adapter = Adapter.load(tmp_path / "auto")
    assert sum(adapter.ranks.values()) == 84
    for name, pair in adapter.pairs.items():
        assert float(torch.linalg.matrix_norm(pair.B @ pair.A, 2)) == pytest.approx(1 / adapter.gamma, rel=1e-4), name


def test_several_processes_decide_alike(budgeted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    together = tmp_path / "together.safetensors"
    arguments = [str(tiny_model), str(tiny_data), "-o", str(together), "--rank-budget", "4", "--device", "cpu", "-q"]
    assert [rank.code for rank in run_ranks(2, tmp_path, arguments)] == [0, 0]
    assert Adapter.load(together).ranks == Adapter.load(budgeted).ranks


# Using it.


def test_inspect(budgeted: Path, tmp_path: Path) -> None:
    ranks = Adapter.load(budgeted).ranks
    page = tmp_path / "report.html"
    done = CliRunner().invoke(inspect, [str(budgeted), "--html", str(page), "--compare", str(budgeted), "--layers"])
    assert done.exit_code == 0, done.output
    assert f"21 of rank {min(ranks.values())} to {max(ranks.values())}" in done.stdout
    for name, rank in ranks.items():
        assert re.search(rf"^  {re.escape(name.removeprefix('model.layers.'))} +1 +\S+ +{rank} ", done.stdout, re.M), (
            name
        )
        assert f"<title>{name}: rank {rank}</title>" in page.read_text()


def test_compared_with_equal_ranks(
    budgeted: Path, command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """As many angles as the smaller rank has; what both have is the same: the one is a part of the other."""
    assert command(tiny_model, tiny_data, "-o", tmp_path / "equal", "--rank", 4).exit_code == 0
    done = CliRunner().invoke(inspect, [str(budgeted), "--compare", str(tmp_path / "equal"), "--json"])
    assert done.exit_code == 0, done.output
    compared = json.loads(done.stdout)["comparison"]["layers"]
    for name, rank in Adapter.load(budgeted).ranks.items():
        angles = compared[name]["output_angles"]
        assert len(angles) == min(rank, 4)
        assert max(angles) < 0.1  # degrees


def test_five_preconditioned_steps(budgeted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "5", "--batch-size", "4", "--device", "cpu", "--learning-rate", "1e-2", "-q"]
    arguments = [str(tiny_model), str(tiny_data), "--adapter", str(budgeted), "-o", str(tmp_path / "trained"), *options]
    done = CliRunner().invoke(train, [*arguments, "--logging-steps", "1"])
    assert done.exit_code == 0, done.output
    start, trained = Adapter.load(budgeted), Adapter.load(tmp_path / "trained")
    assert trained.ranks == start.ranks
    assert trained.training is not None
    assert trained.training["optimizer"] == "preconditioned"
    assert trained.training["last_loss"] < trained.training["first_loss"]
    assert all(not torch.equal(pair.A, start.pairs[name].A) for name, pair in trained.pairs.items())


@pytest.mark.parametrize("plain", [False, True], ids=["rslora", "plain scaling"])
def test_merged_equals_peft(budgeted: Path, plain: bool, tiny_model: Path, tmp_path: Path) -> None:
    """The exporter reads the patterns by itself; from a configuration of plain scales, too."""
    expected = peft_logits(tiny_model, budgeted)
    adapter = budgeted
    if plain:
        adapter = tmp_path / "plain"
        assert export("peft", tiny_model, budgeted, "-o", adapter, "--plain-scaling").exit_code == 0
        config = json.loads((adapter / "adapter_config.json").read_text())
        s = Adapter.load(budgeted).config.scale
        assert config["lora_alpha"] / config["r"] == pytest.approx(s)  # what a reader without patterns computes
        assert relative_error(peft_logits(tiny_model, adapter), expected) < ROUNDING
    assert export("merged", tiny_model, adapter, "-o", tmp_path / "merged").exit_code == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert relative_error(merged, expected) < ROUNDING
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(tiny_model)), expected) > 0.01


@pytest.mark.parametrize("plain", [False, True], ids=["rslora", "plain scaling"])
def test_merged_experts_equal_peft(plain: bool, command: Command, tiny_data: Path, tmp_path: Path) -> None:
    """Experts, and dense layers that PEFT has to be told of by their weight's name."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_moe("qwen3-moe", torch.float32).save_pretrained(base)
    make_word_tokenizer().save_pretrained(base)
    assert command(base, tiny_data, "-o", adapter, "--rank-budget", "total:121", "--gamma", 8).exit_code == 0
    ranks = Adapter.load(adapter).ranks
    assert sum(ranks.values()) == 121
    assert len({ranks[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down")} | {5}) > 1
    expected = peft_logits(base, adapter)
    if plain:
        adapter = tmp_path / "plain"
        assert export("peft", base, tmp_path / "adapter", "-o", adapter, "--plain-scaling").exit_code == 0
        assert relative_error(peft_logits(base, adapter), expected) < ROUNDING
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected) < ROUNDING
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.01


def test_a_classifiers_head_is_kept_beside_the_ranks(command: Command, labelled: Path, tmp_path: Path) -> None:
    """PEFT's `modules_to_save` and patterns together."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_classifier("bert", torch.float32, id2label=dict(enumerate(THREE.names))).save_pretrained(base)
    make_pair_tokenizer().save_pretrained(base)
    options = ["--task", "sequence-classification", "--rank-budget", 3, "--gamma", 8]
    done = command(base, labelled, "-o", adapter, *options)
    assert done.exit_code == 0, done.output
    assert len(set(Adapter.load(adapter).ranks.values())) > 1
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    original, found = (AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (base, merged))
    ids = torch.tensor([[5, 17, 40, 3]])
    with torch.no_grad():
        logits, plain = found(input_ids=ids).logits, original(input_ids=ids).logits
        expected = PeftModel.from_pretrained(original, adapter).eval()(input_ids=ids).logits
    assert relative_error(logits, expected) < ROUNDING
    assert relative_error(plain, expected) > 0.01


def test_single_file_and_back(budgeted: Path, tiny_model: Path, tmp_path: Path) -> None:
    file, again = tmp_path / "a.safetensors", tmp_path / "again"
    assert export("peft", tiny_model, budgeted, "-o", file).exit_code == 0
    assert export("peft", tiny_model, file, "-o", again).exit_code == 0
    for name in DIRECTORY_FILES:
        assert (again / name).read_bytes() == (budgeted / name).read_bytes()


def test_llama_cpp(budgeted: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It scales by α over each tensor's own rank."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "a.gguf"
    assert export("gguf", tiny_model, budgeted, "-o", file).exit_code == 0
    reader, adapter = gguf.GGUFReader(file), Adapter.load(budgeted)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    for block in range(3):
        A, B = (tensors[f"blk.{block}.ffn_up.weight.lora_{side}"] for side in "ab")
        pair = adapter.pairs[f"model.layers.{block}.mlp.up_proj"]
        assert A.shape == pair.A.shape
        assert relative_error(alpha / len(A) * (B @ A), adapter.config.scale * (pair.B @ pair.A)) < ROUNDING


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
def test_mlx(budgeted: Path, tiny_model: Path, tmp_path: Path) -> None:
    from support.mlx_runs import mlx_logits

    assert export("mlx", tiny_model, budgeted, "-o", tmp_path / "mlx").exit_code == 0
    assert relative_error(mlx_logits(tiny_model, tmp_path / "mlx"), peft_logits(tiny_model, budgeted)[:1]) < MLX


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.parametrize("target", ["onnx", "onnx-adapter"])
def test_onnx_runtime(target: str, budgeted: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The exporter compares with PyTorch by itself, and writes nothing where they differ."""
    result = export(target, tiny_model, budgeted, "-o", tmp_path / "folder")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "folder" / "parity.json").is_file()
