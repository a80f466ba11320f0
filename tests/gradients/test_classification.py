"""Classifiers: gradients, losses, checkpoints with a head, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.architectures import CLASSIFIER_CONFIGS, THREE, make_classifier, make_pair_tokenizer, make_texts
from support.causal import reference_gradients, relative_error
from support.commands import Command, Refused
from transformers import AutoModelForSequenceClassification

from loraone_init import Adapter, InitConfig, initialize, open_model
from loraone_init.cli.train import main as train
from loraone_init.data.labels import Labels
from loraone_init.errors import AdapterError, ModelError
from loraone_init.gradients.classification import SequenceClassification
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack
from loraone_init.training.trainer import _pad_id

EXACT = 1e-10
"""fp64 on both sides; what is left is the order of summation."""

FP32 = 1e-5

CPU = torch.device("cpu")
CLASSIFY = ("--task", "sequence-classification")


def reference_loss(model, batches):
    """transformers' own loss; all batches have two rows, so the mean over rows is the mean over batches."""
    return sum(model(**batch).loss for batch in batches) / len(batches)


@pytest.mark.parametrize("name", CLASSIFIER_CONFIGS)
def test_equals_whole_model_autograd(name):
    model, batches = make_classifier(name, num_labels=3).requires_grad_(False), make_texts()
    opened = open_module(model)
    targets = select_targets(model, "all-linear", saved=opened.saved)
    _, gradients = stream_gradients(
        BlockStack.of(opened), targets, SequenceClassification(model, CPU, opened.labels), batches
    )
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    assert not any(
        layer.startswith(("classifier", "score", "pre_classifier", "classification_head")) for layer in targets
    )
    assert {layer: relative_error(found[layer], truth[layer]) < EXACT for layer in targets} == dict.fromkeys(
        targets, True
    )


@pytest.mark.parametrize(
    ("changes", "labels", "problem"),
    [
        ({"num_labels": 3}, None, "single_label_classification"),
        ({"num_labels": 1}, [torch.tensor([[0.5], [-2.0]]), torch.tensor([[3.0], [0.0]])], "regression"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.5]])],
            "multi_label_classification",
        ),
        (
            {"num_labels": 2, "problem_type": "regression"},
            [torch.tensor([[1.0, 0.5], [0.0, -1.0]]), torch.tensor([[2.0, 1.0], [3.0, 1.0]])],
            "regression",
        ),
    ],
)
def test_loss_is_transformers_own(changes, labels, problem):
    model = make_classifier("bert", **changes)
    labels = labels and [label.double() for label in labels]
    batches = make_texts(labels=labels)
    adapter = initialize(model, batches, InitConfig(rank=4, gamma=128.0))
    assert open_module(model).labels.problem == problem
    assert adapter.loss.sample == pytest.approx(reference_loss(model, batches).item(), rel=EXACT)


# Checkpoints with a head.


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a head of three labels that have names, and its tokenizer."""
    directory = tmp_path_factory.mktemp("classifier")
    names = dict(enumerate(THREE.names))
    make_classifier("bert", torch.float32, id2label=names).save_pretrained(directory)
    make_pair_tokenizer().save_pretrained(directory)
    return directory


def test_head_of_the_checkpoint_is_kept(classifier):
    model = open_model(str(classifier), task="sequence-classification", labels=Labels(("x", "y")))
    stored = load_file(classifier / "model.safetensors")
    assert (model.labels, model.saved) == (THREE, ("classifier",))
    assert torch.equal(model.module.classifier.weight, stored["classifier.weight"])
    adapter = initialize(model, make_texts(), InitConfig(rank=4, gamma=128.0))
    assert torch.equal(adapter.saved["classifier"]["weight"], stored["classifier.weight"])


def test_half_a_head_is_an_error(classifier, tmp_path):
    tensors = load_file(classifier / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    with pytest.raises(ModelError, match=r"lacks 1 tensors of BertForSequenceClassification, such as classifier\.bias"):
        open_model(str(tmp_path), task="sequence-classification", labels=THREE)


def test_head_is_no_target(classifier):
    model = open_model(str(classifier), task="sequence-classification")
    with pytest.raises(ModelError, match=r"no layer is called 'classifier'; there are: query \(3\)"):
        initialize(model, make_texts(), InitConfig(rank=4, target_modules=("classifier",), gamma=128.0))


def test_loss_of_ones_own_has_no_head(classifier):
    """With a loss from Python nothing is known of the task: all layers are adapted."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    adapter = initialize(
        model,
        make_texts(),
        InitConfig(rank=2, gamma=128.0),
        loss=lambda m, b: (m(**b).loss * len(b["labels"]), len(b["labels"])),
    )
    assert (adapter.task_type, adapter.saved) == (None, {})
    assert "classifier" in adapter.pairs


def test_file_that_lacks_its_head_is_refused(classifier, tmp_path):
    model = open_model(str(classifier), task="sequence-classification")
    adapter = initialize(model, make_texts(), InitConfig(rank=4, gamma=128.0))
    adapter.save(tmp_path / "a.safetensors")
    tensors = {n: t for n, t in load_file(tmp_path / "a.safetensors").items() if "classifier" not in n}
    save_file(tensors, tmp_path / "b.safetensors", metadata=adapter.metadata())
    with pytest.raises(AdapterError, match="no tensor of classifier, which its configuration says it saves"):
        Adapter.load(tmp_path / "b.safetensors")


# The command.


def test_dry_run_and_table(command: Command, classifier: Path, labelled: Path, tmp_path: Path) -> None:
    planned = command(classifier, labelled, *CLASSIFY, "--dry-run")
    done = command(classifier, labelled, *CLASSIFY, "-o", tmp_path / "a.safetensors")
    assert planned.exit_code == done.exit_code == 0, planned.stderr + done.stderr
    for printed in (planned.stdout, done.stdout):
        assert "3 labels (bad, good, so-so)" in " ".join(printed.split())
        assert "19 of rank 8" in printed  # six in each of three blocks, and the pooler


def test_gamma_is_searched_for_with_rows_held_out(
    command: Command, classifier: Path, labelled: Path, out: Path
) -> None:
    options = ("--json", "--gamma", "auto", "--samples", 8, "--held-out", 4)
    result = command(classifier, labelled, *CLASSIFY, *options, "-o", out / "a.safetensors")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    losses = {gamma: loss for gamma, loss in found["loss"]["curve"]}
    assert found["loss"]["after"] == losses[found["gamma"]] == min(losses.values())
    assert (found["loss"]["rows"], found["sample"]["num_label_tokens"]) == (4, 8)


def test_reference_trainer_is_for_causal_models(command: Command, classifier: Path, labelled: Path, out: Path) -> None:
    adapter = out / "a.safetensors"
    assert command(classifier, labelled, *CLASSIFY, "-o", adapter).exit_code == 0
    arguments = [classifier, labelled, "--adapter", adapter, "-o", out / "trained"]
    done = CliRunner().invoke(train, [str(argument) for argument in arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is for SEQ_CLS, and loraone-train trains causal language models only; load it with PEFT" in done.stderr
    assert not (out / "trained").exists()


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "w1"}, [], "row 1 has the columns text; a classification needs text and label"),
        (
            {"prompt": "w1", "label": 1},
            [],
            "row 1 has the columns prompt, label; a classification needs text and label",
        ),
        ({"text": "w1", "label": "worse"}, [], "row 1: label 'worse' is not one of the model's: 0 to 2, or bad, good"),
        ({"text": "w1", "label": 3}, [], "row 1: label 3 is not one of the model's: 0 to 2, or bad, good, so-so"),
        ({"text": ["w1"], "label": 1}, [], "row 1: column 'text' is list, expected a string"),
        ({"text": "w1", "label": None}, [], "row 1: label null is not one of the model's"),
        (
            {"text": "w1 " * 80, "label": 1},
            [],
            "a row has 82 tokens, but the model has 64 positions; use --max-length 64",
        ),
        ({"text": "w1", "label": 1}, ["--all-tokens"], "completion_only is for causal language models"),
        (
            {"text": "w1", "label": 1},
            ["--columns", "prompt=text"],
            "cannot name 'prompt'; expected one of text, text_pair",
        ),
    ],
)
def test_what_does_not_go_together(
    row: dict, options: list[str], expected: str, classifier: Path, refused: Refused, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({"text": "w1", "label": 0}) + "\n")
    assert expected in refused(*CLASSIFY, *options, model=classifier, data=file)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_the_loss_does_not_depend_on_what_fills_up_rows(name):
    """Models pool by their own padding token, whatever the tokenizer pads with; here with </s>, as many do."""
    model, batches = make_classifier(name, num_labels=3, pad_token_id=0), make_texts()
    filled = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 1)} for b in batches]
    plain, other = (initialize(model, rows, InitConfig(rank=4, gamma=128.0)) for rows in (batches, filled))
    assert other.loss.sample == pytest.approx(plain.loss.sample, rel=EXACT)
    assert all(torch.equal(plain.pairs[layer].B, other.pairs[layer].B) for layer in plain.pairs)


def test_a_classifier_is_trained_with_its_own_padding():
    model, rows = make_classifier("gpt2", pad_token_id=0), SimpleNamespace(pad_id=1, labels=THREE)
    assert _pad_id(model, rows) == 0
    rows.labels = None
    assert _pad_id(model, rows) == 1
