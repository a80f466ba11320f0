"""`--samples auto`: a sample grows until it has settled, and its adapter is that of the size it settled at."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.causal import VOCABULARY, make_model, make_word_tokenizer, relative_error
from support.commands import Command, Refused
from support.moe_models import UNMET, make_moe
from support.rank_processes import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from loraone_init import Adapter, DataOptions, InitConfig, initialize, load_batches
from loraone_init.choosing.growing import grow
from loraone_init.choosing.sample_size import Growth
from loraone_init.cli.inspect import main as inspect
from loraone_init.errors import DataError

SAME_STEP = 1e-5
"""Relative, of B·A: fp32 sums of other order."""

SAME_LOSS = 1e-6
LENGTH = 12
RANK4 = InitConfig(rank=4, gamma=128.0)


def rows_of(number: int, seed: int | None) -> list[dict[str, torch.Tensor]]:
    """Batches of one row: the same one always, or noise."""
    generators = [torch.Generator().manual_seed(0 if seed is None else seed + row) for row in range(number)]
    ids = [torch.randint(3, VOCABULARY, (1, LENGTH), generator=generator) for generator in generators]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


@pytest.fixture(scope="session")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of several lengths, and five without a token to train on."""
    file = tmp_path_factory.mktemp("many-rows") / "rows.jsonl"
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(45):
        words = torch.randint(0, 90, (8 + i % 5,), generator=draw).tolist()
        text = " ".join(f"w{word}" for word in words)
        rows.append({"prompt": f"w{i}" * (20 if i % 9 == 8 else 1), "completion": f" {text}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def same_adapter(found: Adapter, wanted: Adapter) -> None:
    assert found.pairs.keys() == wanted.pairs.keys()
    for name, pair in wanted.pairs.items():
        other = found.pairs[name]
        assert relative_error(other.B.double() @ other.A.double(), pair.B.double() @ pair.A.double()) < SAME_STEP, name
    assert (found.loss.sample, found.loss.before, found.loss.after) == pytest.approx(
        (wanted.loss.sample, wanted.loss.before, wanted.loss.after), rel=SAME_LOSS
    )
    assert found.loss.rows == wanted.loss.rows
    assert found.sample == wanted.sample


def sizes(adapter: Adapter) -> list[int]:
    assert adapter.growth is not None
    return [stage.samples for stage in adapter.growth.stages]


@dataclass(frozen=True)
class Layer:
    agreement: tuple[float, float] | None
    captured_energy: float = 0.9


@dataclass(frozen=True)
class Taken:
    """What a pass would give; `layers` is all that the growth looks at."""

    batches: list[int]
    layers: dict[str, Layer]


@pytest.mark.parametrize(("agreements", "wanted"), [([0.5, 0.5, 0.8], 8), ([0.5, 0.5, 0.5, 0.5], 11), ([0.8, 0.8], 4)])
def test_each_size_is_taken_until_the_sample_has_settled(agreements: list[float], wanted: int) -> None:
    """Sizes are 2, 4, 8 and all 11; halves have to agree to 0.7."""
    taken: list[Taken] = []

    def take(batches: list[int]) -> Taken:
        agreement = agreements[len(taken)]
        taken.append(Taken(batches, {"layer": Layer((agreement, 1.0))}))
        return taken[-1]

    sample, result, report = grow(list(range(11)), Growth(0.3, start=2), take)
    assert [each.batches for each in taken] == [list(range(size)) for size in (2, 4, 8, 11)[: len(agreements)]]
    assert sample == list(range(wanted))
    assert result is taken[-1]
    assert report is not None
    assert [stage.agreement_median for stage in report.stages] == agreements
    assert (report.settled, report.available, report.tolerance) == (wanted != 11, 11, 0.3)


def test_without_growth_all_is_taken_at_once() -> None:
    taken: list[Taken] = []

    def take(batches: list[int]) -> Taken:
        taken.append(Taken(batches, {}))
        return taken[-1]

    assert grow([1, 2, 3], None, take) == ([1, 2, 3], Taken([1, 2, 3], {}), None)
    assert len(taken) == 1


def test_one_repeated_row_settles_at_once() -> None:
    adapter = initialize(make_model("llama"), rows_of(32, None), RANK4, growth=Growth(0.01, start=4))
    assert adapter.growth is not None
    assert adapter.growth.settled
    assert sizes(adapter) == [4, 8]  # the energy has to be seen twice
    assert adapter.growth.stages[0].agreement_min == pytest.approx(1.0, abs=1e-6)


def test_noise_goes_to_the_maximum(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        adapter = initialize(make_model("llama"), rows_of(24, 1), RANK4, growth=Growth(0.01, start=4))
    assert adapter.growth is not None
    assert not adapter.growth.settled
    assert sizes(adapter) == [4, 8, 16, 24]
    assert caplog.messages[-1].startswith(
        "the sample has not settled at 24, all that it may have: its halves agree to 0."
    )
    said = [message.split(":")[0] for message in caplog.messages[:-1]]
    assert said == ["Schedule", *(f"{n} samples" for n in (4, 8, 16, 24))]


@pytest.mark.parametrize("by_row", [True, False], ids=["rows alternate", "micro-batches alternate"])
def test_adapter_is_that_of_the_size_it_settled_at(by_row: bool, many_rows: Path) -> None:
    """Of any part of the sample, drawn as if it had been asked for, with its losses on the same rows."""
    model = make_model("llama", torch.float32)

    def loss(module: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"), int(
            (labels != -100).sum()
        )

    def adapter(samples: int, growth: Growth | None) -> Adapter:
        sample = load_batches(str(many_rows), make_word_tokenizer(), DataOptions(samples=samples, max_length=15))
        return initialize(model, sample, RANK4, growth=growth, loss=None if by_row else loss)

    grown = adapter(40, Growth(0.95, start=6))
    assert grown.growth is not None
    assert grown.growth.settled
    assert 6 < sizes(grown)[-1] < 40
    same_adapter(grown, adapter(sizes(grown)[-1], None))


def test_agreement_is_kept_by_layer() -> None:
    adapter = initialize(make_model("llama"), rows_of(8, 1), RANK4, growth=Growth(0.5, start=8))
    assert adapter.growth is not None
    worse = sorted(min(layer.agreement or (9.0,)) for layer in adapter.layers.values())
    assert adapter.growth.stages[-1].agreement_median == worse[len(worse) // 2]
    assert adapter.growth.stages[-1].agreement_min == worse[0]
    assert 0 < worse[0] < worse[-1] < 1


def test_layers_of_lower_rank_are_left_out_and_counted() -> None:
    """Rows of three tokens, two in each half: six tokens do not reach rank 8; and no token meets one expert."""
    short = [{key: value[:, :3] for key, value in row.items()} for row in rows_of(4, 1)]
    adapter = initialize(make_model("llama"), short, InitConfig(rank=8, gamma=128.0), growth=Growth(start=4))
    assert adapter.growth is not None
    [stage] = adapter.growth.stages
    assert (stage.agreement_median, stage.layers_left_out) == (None, 21)
    assert not adapter.growth.settled
    experts = initialize(make_moe("qwen3-moe"), rows_of(8, 1), InitConfig(rank=2, gamma=128.0), growth=Growth(start=8))
    unmet = [layer for name, layer in experts.layers.items() if "layers.1" in name and name.endswith(f"_proj.{UNMET}")]
    assert [(layer.init, layer.agreement) for layer in unmet] == [("standard", None)] * 2
    assert experts.growth is not None
    assert 2 <= experts.growth.stages[0].layers_left_out < len(experts.layers)


def test_any_module_with_a_loss_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12))
    batches = [torch.randn(8, 20) @ torch.diag(1.0 / torch.arange(1, 21)) for _ in range(64)]

    def loss(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (module(x) - x[:, :12]).square().sum(), len(x)

    growth = Growth(0.2, start=2)
    adapter = initialize(model, batches, InitConfig(rank=2, gamma=128.0), loss=loss, growth=growth)
    assert adapter.growth is not None
    assert adapter.growth.settled
    assert 2 < sizes(adapter)[-1] < 64
    same_adapter(adapter, initialize(model, batches[: sizes(adapter)[-1]], InitConfig(rank=2, gamma=128.0), loss=loss))


def test_one_row_alone() -> None:
    with pytest.raises(DataError, match="a sample of 1 row has no two halves"):
        initialize(make_model("llama"), rows_of(1, 1), RANK4, growth=Growth())


# The command.

AUTO = ("--samples", "auto", "--rank", 4)


def test_command(command: Command, tiny_model: Path, many_rows: Path, out: Path) -> None:
    grown, fixed = out / "grown.safetensors", out / "fixed.safetensors"
    result = command(tiny_model, many_rows, "-o", grown, *AUTO, "--sample-tolerance", 0.95, "--json")
    assert result.exit_code == 0, result.stderr
    growth = json.loads(result.stdout)["growth"]
    assert growth["settled"]
    assert [stage["samples"] for stage in growth["stages"]] == [16, 32]
    assert growth["tolerance"] == 0.95
    assert "16 samples: halves agree to 0." in result.stderr
    assert command(tiny_model, many_rows, "-o", fixed, "--samples", 32, "--rank", 4).exit_code == 0
    adapter = Adapter.load(grown)
    assert adapter.growth is not None
    assert [stage.samples for stage in adapter.growth.stages] == [16, 32]
    same_adapter(adapter, Adapter.load(fixed))


def test_with_a_search_for_gamma(command: Command, tiny_model: Path, many_rows: Path, out: Path) -> None:
    """On rows that no sample has, the same for every size."""
    options = (*AUTO, "--sample-tolerance", 0.95, "--max-samples", 34, "--gamma", "auto", "--held-out", 4)
    result = command(tiny_model, many_rows, "-o", out / "a.safetensors", *options)
    assert result.exit_code == 0, result.stderr
    adapter = Adapter.load(out / "a.safetensors")
    assert sizes(adapter) == [16, 32]
    assert (adapter.loss.held_out, adapter.loss.rows, adapter.sample["rows_held_out"]) == (True, 4, 4)
    sample = load_batches(str(many_rows), make_word_tokenizer(), DataOptions(samples=34, held_out=4))
    contents = {row.to_bytes() for row in sample.first(32).rows}
    assert len(contents) == 32
    assert not contents & {row.to_bytes() for row in sample.held_out}
    assert adapter.sample["sha256"] == sample.first(32).sha256


def test_command_says_where_it_has_not_settled(command: Command, tiny_model: Path, many_rows: Path, out: Path) -> None:
    options = (*AUTO, "--max-samples", 20, "--sample-tolerance", 0.01)
    result = command(tiny_model, many_rows, "-o", out / "a.safetensors", *options)
    assert result.exit_code == 0, result.stderr
    assert "Warning: the sample has not settled at 20, all that it may have: its halves agree to 0." in result.stderr
    assert "20, not settled at all that it may have; agreement of halves 16: 0." in " ".join(result.stdout.split())
    assert Adapter.load(out / "a.safetensors").sample["rows_used"] == 20


def test_dry_run_tells_the_sizes(command: Command, tiny_model: Path, many_rows: Path) -> None:
    options = ("--dry-run", "--max-samples", 40, *AUTO)
    result = command(tiny_model, many_rows, "--json", *options)
    assert json.loads(result.stdout)["growth"] == {"samples": [16, 32, 40], "tolerance": 0.4}
    fixed = command(tiny_model, many_rows, "--json", "--dry-run", "--rank", 4, "--samples", 40)
    memory = [json.loads(run.stdout)["memory_bytes"]["gradients"] for run in (result, fixed)]
    assert memory[1] < memory[0] < 2 * memory[1]  # the sums are there twice, but one SVD runs at a time
    table = " ".join(command(tiny_model, many_rows, *options).stdout.split())
    assert "samples 16, 32, 40, until two halves agree to 0.6" in table
    assert "time at most about" in table


@pytest.mark.parametrize("option", [("--max-samples", 100), ("--sample-tolerance", 0.2)])
def test_options_of_auto_alone(option: tuple[str, Any], command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", *option)
    assert result.exit_code == 2
    assert "--max-samples and --sample-tolerance are for --samples auto" in result.stderr


@pytest.mark.parametrize("value", ["0", "some", "1.5"])
def test_wrong_number_of_samples(value: str, command: Command, tiny_model: Path, tiny_data: Path) -> None:
    result = command(tiny_model, tiny_data, "--dry-run", "--samples", value)
    assert result.exit_code == 2
    assert "Invalid value for '--samples'" in result.stderr


def test_data_of_one_row(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"text": "w1 w2 w3"}) + "\n")
    assert "no two halves to compare; give more rows, or --samples 1" in refused("--samples", "auto", data=file)


def test_several_processes_decide_alike(
    command: Command, tiny_model: Path, many_rows: Path, tmp_path: Path, out: Path
) -> None:
    together, alone = out / "together.safetensors", out / "alone.safetensors"
    arguments = [str(tiny_model), str(many_rows), *map(str, AUTO), "--sample-tolerance", "0.95", "--device", "cpu"]
    ended = run_ranks(2, tmp_path, [*arguments, "--quiet", "-o", str(together)])
    assert [(rank.code, rank.stderr) for rank in ended] == [(0, ""), (0, "")]
    assert command(*arguments, "-o", alone).exit_code == 0
    found, wanted = Adapter.load(together), Adapter.load(alone)
    same_adapter(found, wanted)
    assert found.growth is not None
    assert wanted.growth is not None
    assert found.growth.settled == wanted.growth.settled
    for one, other in zip(found.growth.stages, wanted.growth.stages, strict=True):
        assert (one.samples, one.layers_left_out) == (other.samples, other.layers_left_out)
        assert one.agreement_median == pytest.approx(other.agreement_median, abs=1e-3)


def test_inspect_shows_the_growth(command: Command, tiny_model: Path, many_rows: Path, out: Path) -> None:
    grown, page = out / "grown.safetensors", out / "page.html"
    assert command(tiny_model, many_rows, "-o", grown, *AUTO, "--sample-tolerance", 0.95).exit_code == 0
    shown = CliRunner().invoke(inspect, [str(grown), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "samples 32, settled; agreement of halves 16: 0." in " ".join(shown.stdout.split())
    assert re.search(r"^halves of the sample agree +outputs +inputs +least +left out$", shown.stdout, re.M)
    assert re.search(r"^  mlp\.up_proj( +0\.\d\d){3} +0$", shown.stdout, re.M)
    assert "<h2>Sample</h2>" in page.read_text()
    told = json.loads(CliRunner().invoke(inspect, [str(grown), "--json"]).stdout)
    assert [stage["samples"] for stage in told["growth"]["stages"]] == [16, 32]
    assert all(0 < value < 1 for layer in told["layers"].values() for value in layer["agreement"])
