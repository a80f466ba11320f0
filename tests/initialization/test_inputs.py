"""What `initialize` takes: ids, paths, rows and batches, each read once; options by name, none of them ignored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from support.causal import make_batches, make_model, make_word_tokenizer
from support.commands import Command
from torch import nn
from torch.utils.data import DataLoader

from loraone_init import Adapter, DataOptions, Growth, InitConfig, initialize, load_sample, open_model
from loraone_init.data.options import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, HELD_OUT
from loraone_init.errors import ConfigError, DataError, LoraOneError, ModelError
from loraone_init.initialization.inputs import OPTIONS

SMALL: dict[str, Any] = {"rank": 2, "target_modules": ("q_proj",), "gamma": 128.0}
"""Enough of an adapter to tell what it was made from."""


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def saved(adapter: Adapter, path: Path) -> bytes:
    adapter.save(path)
    return path.read_bytes()


def with_options_of(file: Path, adapter: Adapter) -> Adapter:
    """An adapter made in Python has no options of a command; all else of its file is as the command's."""
    return replace(adapter, run=Adapter.load(file).run)


def same_factors(adapter: Adapter, other: Adapter) -> bool:
    return all(
        torch.equal(pair.A, other.pairs[name].A) and torch.equal(pair.B, other.pairs[name].B)
        for name, pair in adapter.pairs.items()
    )


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--gamma 128", {"gamma": 128}),
        (
            "--rank 4 --alpha 32 --gamma 256 --samples 5 --seed 3 --target-modules q_proj,v_proj",
            {"rank": 4, "alpha": 32, "gamma": 256, "samples": 5, "seed": 3, "target_modules": ("q_proj", "v_proj")},
        ),
        ("--gamma auto --max-length 5 --dtype float64", {"gamma": "auto", "max_length": 5, "dtype": "float64"}),
        (
            "--held-out 2 --all-tokens --batch-size 3 --gamma 128",
            {"held_out": 2, "completion_only": False, "batch_size": 3, "gamma": 128},
        ),
        (
            "--columns text=prompt --block-path model.layers --gamma 128",
            {"columns": {"text": "prompt"}, "block_path": "model.layers", "gamma": 128},
        ),
    ],
)
def test_paths_and_options_give_the_bytes_of_the_command(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path, flags: str, options: dict[str, Any]
) -> None:
    file = tmp_path / "by-command.safetensors"
    assert command(tiny_model, tiny_data, "-o", file, *flags.split()).exit_code == 0
    adapter = initialize(str(tiny_model), str(tiny_data), **options)
    assert saved(with_options_of(file, adapter), tmp_path / "by-python.safetensors") == file.read_bytes()


def test_growing_draws_as_many_rows_as_the_command(
    command: Command, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "by-command.safetensors"
    assert command(tiny_model, tiny_data, "-o", file, "--samples", "auto", "--rank", 2).exit_code == 0
    adapter = initialize(tiny_model, tiny_data, growth=Growth(), rank=2, gamma=128.0)
    assert saved(with_options_of(file, adapter), tmp_path / "by-python.safetensors") == file.read_bytes()


def test_rows_from_python_give_the_factors_of_the_file(tiny_model: Path, tiny_data: Path) -> None:
    """A list, a generator, a data set and a loader that gives rows: read once, and recorded as what they are."""
    rows = rows_of(tiny_data)
    model = open_model(str(tiny_model))
    expected = initialize(model, tiny_data, samples=5, **SMALL)
    loader = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    for given in (
        rows,
        (row for row in rows),
        Dataset.from_list(rows),
        Dataset.from_list(rows).with_format("torch"),
        loader,
    ):
        adapter = initialize(model, given, samples=5, **SMALL)
        assert same_factors(adapter, expected)
        assert adapter.sample == {**expected.sample, "source": "rows from Python"}


def test_sample_of_rows_from_python(tiny_data: Path) -> None:
    tokenizer = make_word_tokenizer()
    rows = rows_of(tiny_data)
    sample = load_sample(iter(rows), tokenizer, DataOptions(samples=5))
    assert sample.sha256 == load_sample(tiny_data, tokenizer, DataOptions(samples=5)).sha256
    assert (sample.source, sample.rows_available) == ("rows from Python", len(rows))


def test_classes_of_rows_from_python(tiny_model: Path, labelled: Path) -> None:
    """The labels of a head that the checkpoint lacks are those of the rows, though these can be read only once."""
    options = {"task": "sequence-classification", "rank": 2}
    adapter = initialize(tiny_model, (row for row in rows_of(labelled)), **options)
    assert adapter.sample["labels"] == ["bad", "good", "so-so"]
    assert same_factors(adapter, initialize(tiny_model, labelled, **options))


def test_batches_from_a_generator_and_a_loader() -> None:
    model, batches = make_model("llama"), make_batches((9, 12))
    expected = initialize(model, batches, InitConfig(**SMALL))
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    class Indexed:
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return batches[index]

    for given in (iter(batches), loader, tuple(batches), Indexed()):
        assert same_factors(initialize(model, given, **SMALL), expected)


def test_held_out_batches_from_a_generator() -> None:
    model, batches, others = make_model("llama"), make_batches((9,)), make_batches((12, 7))
    adapter = initialize(model, batches, held_out=iter(others), **{**SMALL, "gamma": "auto"})
    assert (adapter.loss.held_out, adapter.loss.rows) == (True, 4)


def test_a_number_in_a_row_makes_it_no_batch(tiny_model: Path, labelled: Path) -> None:
    """As pandas gives them."""
    rows = [{**row, "length": np.int64(3)} for row in rows_of(labelled)]
    assert initialize(tiny_model, rows, **SMALL).sample["format"] == "text"


def test_held_out_sample(tiny_model: Path, tiny_data: Path) -> None:
    """None of the rows that are drawn is held out as well."""
    others = load_sample(tiny_data, make_word_tokenizer(), DataOptions(samples=3))
    adapter = initialize(tiny_model, tiny_data, held_out=others, **{**SMALL, "gamma": "auto"})
    assert (adapter.loss.held_out, adapter.loss.rows) == (True, 3)
    assert adapter.sample["rows_used"] == 12


def test_with_a_loss_dicts_are_batches() -> None:
    def loss(model: nn.Module, batch: dict[str, list[float]]) -> tuple[torch.Tensor, int]:
        return model(torch.tensor(batch["x"])).square().sum(), 1

    adapter = initialize(nn.Linear(2, 2), ({"x": [1.0, 2.0]} for _ in range(2)), rank=1, loss=loss, gamma=128.0)
    assert adapter.sample == {}


def test_rows_need_a_tokenizer(tiny_data: Path) -> None:
    model = make_model("llama", torch.float32)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM from Python has no tokenizer .*; pass tokenizer="):
        initialize(model, rows_of(tiny_data), **SMALL)
    adapter = initialize(model, rows_of(tiny_data), tokenizer=make_word_tokenizer(), **SMALL)
    assert adapter.sample["rows_used"] == 12


def test_options_come_before_the_configuration() -> None:
    model, batches = make_model("llama"), make_batches((9,))
    adapter = initialize(model, batches, InitConfig(rank=4, alpha=3.0, target_modules=("q_proj",), gamma=128.0), rank=2)
    assert (adapter.config.rank, adapter.config.alpha) == (2, 3.0)


def test_seed_of_a_configuration_is_that_of_the_draw(tiny_model: Path, tiny_data: Path) -> None:
    model = open_model(str(tiny_model))
    by_config = initialize(model, tiny_data, InitConfig(seed=5, **SMALL), samples=4)
    assert by_config.sample == initialize(model, tiny_data, seed=5, samples=4, **SMALL).sample
    assert by_config.sample["sha256"] != initialize(model, tiny_data, samples=4, **SMALL).sample["sha256"]


def test_rows_held_out_for_a_search() -> None:
    assert DataOptions().for_gamma("auto").held_out == HELD_OUT == 8
    assert DataOptions().for_gamma(128.0).held_out == 0
    assert DataOptions(held_out=3).for_gamma("auto").held_out == 3


def test_tokens_of_a_batch_are_those_that_suit_the_device(tiny_data: Path) -> None:
    """Twelve rows of seven tokens: 8192 tokens hold all of them, if as many rows may go together."""
    sample = load_sample(tiny_data, make_word_tokenizer(), DataOptions(batch_size=1000))
    on_gpu, on_cpu = (sample.for_device(kind).facts()["options"]["batch_tokens"] for kind in ("cuda", "cpu"))
    assert (on_gpu, on_cpu) == (GPU_BATCH_TOKENS, CPU_BATCH_TOKENS) == (8192, 512)
    given = load_sample(tiny_data, make_word_tokenizer(), DataOptions(batch_size=1000, batch_tokens=14))
    assert given.for_device("cuda") is given
    assert max(batch["input_ids"].numel() for batch in given.batches) <= 14


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ranks", "did you mean rank?"), ("max_len", "did you mean max_length?"), ("gama", "did you mean gamma?"),
     ("xyz", "there are: config, held_out")],
)  # fmt: skip
def test_unknown_option(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        initialize("no such model", "no such data", **{name: 1})
    assert str(caught.value).startswith(f"initialize has no option {name!r}; ")
    assert hint in str(caught.value)


IGNORED_OPTIONS = {
    **{"device": "cpu", "dtype": "float32", "placement": "disk", "revision": "main", "trust_remote_code": True},
    **{"token": "secret", "samples": 3, "max_length": 9, "batch_tokens": 9, "columns": {}, "split": "train"},
    **{"held_out": 3, "tokenizer": None},
}
"""Of no use for a module and batches."""


@pytest.mark.parametrize(("option", "value"), IGNORED_OPTIONS.items())
def test_option_that_would_be_ignored(option: str, value: object) -> None:
    model, batches = make_model("llama"), make_batches((9,))
    with pytest.raises(ConfigError, match=rf"^{option}(=3)? cannot be taken into account: the (model|data) "):
        initialize(model, batches, **{option: value})


def test_options_of_a_sample_and_of_an_open_model(tiny_model: Path, tiny_data: Path) -> None:
    model = open_model(str(tiny_model))
    sample = load_sample(tiny_data, model.tokenizer)
    with pytest.raises(ConfigError, match=r"samples cannot .*: the data are a Sample, .*; pass it to load_sample"):
        initialize(model, sample, samples=3, gamma=128.0)
    with pytest.raises(ConfigError, match=r"dtype cannot .*: the model is open already; pass it to open_model"):
        initialize(model, sample, dtype="float32", gamma=128.0)
    with pytest.raises(ConfigError, match=r"task is 'seq2seq-lm', but the model that was given is for 'causal-lm'"):
        initialize(model, sample, task="seq2seq-lm", gamma=128.0)


def test_split_is_for_hub_data_sets(tiny_model: Path, tiny_data: Path) -> None:
    for given in (tiny_data, rows_of(tiny_data), Dataset.from_list(rows_of(tiny_data))):
        with pytest.raises(ConfigError, match="is for hub data sets"):
            initialize(tiny_model, given, split="train", gamma=128.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there are no batches"),
        (iter(()), "there are no batches"),
        (3, "data are expected as a path, a hub id or a list, got one int"),
        ({"input_ids": torch.ones(1, 2)}, "got one dict"),
        (DatasetDict({"train": Dataset.from_list([{"text": "w1"}])}), r"got one DatasetDict; take .* data\['train'\]"),
        ([{"text": "w1 w2"}, "w3 w4"], "row 2 is not a dict but string"),
        ([{"text": "w1 w2"}, {"body": "w3 w4"}], "row 2 has no column 'text'; it has body"),
        ([{"body": "w1"}], "no known format: row 1 has the columns body"),
        ([{"input_ids": [1, 2]}], "no known format: row 1 has the columns input_ids"),
        (["w1 w2"], "row 1 is not a dict but string; expected column: value, as"),
    ],
)
def test_data_that_are_no_data(tiny_model: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        initialize(tiny_model, data, gamma=128.0)


@pytest.mark.parametrize("held_out", ["rows.jsonl", [{"text": "w1"}], True, 3.5, {"input_ids": torch.ones(1, 2)}])
def test_what_cannot_be_held_out(held_out: Any) -> None:
    with pytest.raises(DataError, match="held_out is a number of rows to draw, a Sample"):
        initialize(make_model("llama"), make_batches((9,)), held_out=held_out, gamma=128.0)


def test_a_configuration_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="config must be an InitConfig, got DataOptions"):
        initialize(make_model("llama"), make_batches((9,)), DataOptions())  # type: ignore[arg-type]


def test_rows_are_read_once(tiny_model: Path, tiny_data: Path) -> None:
    starts = []

    class Once:
        def __iter__(self) -> Iterator[dict[str, str]]:
            starts.append(1)
            return iter(rows_of(tiny_data))

    initialize(tiny_model, Once(), **{**SMALL, "gamma": "auto"})
    assert len(starts) == 1


def test_options_are_those_of_what_they_are_handed_to() -> None:
    """So that an option that is added there is one here."""
    opening = {
        name for name in inspect.signature(open_model).parameters if name not in ("model", "weights", "max_memory")
    }
    drawing = {field.name for field in fields(DataOptions)} - {"held_out"}  # which is a parameter
    assert set(OPTIONS) == opening | drawing | {field.name for field in fields(InitConfig)} | {"tokenizer"}


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match="model is a list; expected a path, a hub id"):
        initialize([], make_batches((9,)), gamma=128.0)  # type: ignore[arg-type]


def test_errors_are_all_of_one_kind() -> None:
    with pytest.raises(LoraOneError, match="there is no model directory"):
        initialize("./nowhere", [{"text": "w1"}], gamma=128.0)
