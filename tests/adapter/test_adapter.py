"""The adapter file and the PEFT directory: round trips, and use without this package."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.causal import make_batches, make_model, reference_loss

from loraone_init import Adapter, InitConfig, initialize, open_model
from loraone_init.adapter.files import tensor_names
from loraone_init.errors import AdapterError, OutputError
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import layer_shape, select_targets
from loraone_init.linalg.factors import LoraPair

FP32 = 1e-5
"""The same products in another order."""


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def case(request, tmp_path_factory):
    """(model directory, adapter): GPT-2 has Conv1D layers, Gemma tied embeddings."""
    directory = tmp_path_factory.mktemp(request.param)
    make_model(request.param, torch.float32).save_pretrained(directory)
    return directory, initialize(open_model(str(directory)), make_batches(), InitConfig(rank=4, gamma=64.0))


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_directory"])
def test_round_trip_is_bit_exact(case, name, tmp_path):
    _, adapter = case
    adapter.save(tmp_path / name)
    again = Adapter.load(tmp_path / name)
    assert list(again.pairs) == list(adapter.pairs)
    for module, pair in adapter.pairs.items():
        assert torch.equal(again.pairs[module].A, pair.A)
        assert torch.equal(again.pairs[module].B, pair.B)
    assert (again.config, again.layers, again.loss, again.base, again.sample, again.preconditioner) == (
        adapter.config,
        adapter.layers,
        adapter.loss,
        adapter.base,
        adapter.sample,
        adapter.preconditioner,
    )
    assert again.metadata() == adapter.metadata()


def test_factors_of_any_layout_are_saved(case, tmp_path):
    """Those that a user computed may be transposed views."""
    _, adapter = case
    turned = {name: LoraPair(pair.A.T.contiguous().T, pair.B.T.contiguous().T) for name, pair in adapter.pairs.items()}
    replace(adapter, pairs=turned).save(tmp_path / "turned.safetensors")
    adapter.save(tmp_path / "straight.safetensors")
    assert (tmp_path / "turned.safetensors").read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def peft_logits(directory, peft_directory, batch):
    """What PEFT computes with our directory, and all it warned of."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, peft_directory, is_trainable=True)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # PEFT's own use of what transformers deprecates is not about the adapter.
    about_us = [warning for warning in caught if not issubclass(warning.category, FutureWarning | DeprecationWarning)]
    return model, logits, [str(warning.message) for warning in about_us]


def test_peft_loads_every_tensor_without_a_warning(case, tmp_path, caplog):
    directory, adapter = case
    adapter.save(tmp_path / "peft")
    model, _, caught = peft_logits(directory, tmp_path / "peft", make_batches()[0])
    assert caught == []
    assert caplog.records == []
    loaded = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(loaded) == 2 * len(adapter.pairs)
    for module, pair in adapter.pairs.items():
        name_a, name_b = (name.replace(".weight", ".default.weight") for name in tensor_names(module))
        assert torch.equal(loaded[name_a], pair.A)
        assert torch.equal(loaded[name_b], pair.B)


def test_peft_computes_the_same_logits(case, tmp_path):
    from transformers import AutoModelForCausalLM

    directory, adapter = case
    adapter.save(tmp_path / "peft")
    batch = make_batches()[0]
    _, theirs, _ = peft_logits(directory, tmp_path / "peft", batch)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), applied(adapter.pairs, select_targets(base, "all-linear"), adapter.config.scale):
        ours = base(**inputs).logits
    with torch.no_grad():
        plain = base(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=FP32, atol=FP32)
    assert (plain - theirs).abs().max() > 100 * FP32  # the adapter does something


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3n", "gemma4", "mistral", "granite", "opt"])
def test_peft_computes_the_loss_after_the_step(name, tmp_path):
    """Four rows: one is evaluated, by the model's own attention on both sides."""
    make_model(name, torch.float32).save_pretrained(tmp_path / "model")
    adapter = initialize(open_model(str(tmp_path / "model")), make_batches((9, 12)), InitConfig(rank=4, gamma=64.0))
    adapter.save(tmp_path / "peft")
    model, _, caught = peft_logits(tmp_path / "model", tmp_path / "peft", make_batches()[0])
    rows = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in make_batches((9, 12))
        for row in range(2)
    ]
    with torch.no_grad():
        losses = [reference_loss(model.eval(), [row]).item() for row in rows]
    assert caught == []
    assert min(abs(loss - adapter.loss.after) for loss in losses) < FP32 * adapter.loss.after


def test_header_and_tensors_are_enough_without_this_package(case, tmp_path):
    """A reader that knows docs/format.md only: s·B·A of a layer, from the file alone."""
    _, adapter = case
    adapter.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
        config, record = json.loads(metadata["peft_config"]), json.loads(metadata["loraone"])
        for module in config["target_modules"]:
            A = file.get_tensor(f"base_model.model.{module}.lora_A.weight")
            B = file.get_tensor(f"base_model.model.{module}.lora_B.weight")
            assert A.shape == (config["r"], record["layers"][module]["shape"][1])
            assert B.shape == (record["layers"][module]["shape"][0], config["r"])
            assert A.dtype == B.dtype == torch.float32
            top = config["lora_alpha"] / math.sqrt(config["r"]) * torch.linalg.matrix_norm(B @ A, 2)
            assert top.item() == pytest.approx(record["scale"] / record["config"]["gamma"], rel=1e-4)
    assert metadata["format_version"] == "1"
    assert config["use_rslora"] is True


def test_metadata_names_every_field_of_the_format(case):
    _, adapter = case
    record = json.loads(adapter.metadata()["loraone"])
    assert set(record) == {
        "method",
        "created_by",
        "scale",
        "config",
        "base",
        "sample",
        "growth",
        "loss",
        "preconditioner",
        "layers",
        "experts",
        "training",
        "run",
    }
    layer = next(iter(record["layers"].values()))
    assert set(layer) == {
        "shape",
        "singular_values",
        "rank",
        "gradient_norm",
        "captured_energy",
        "residual",
        "sine",
        "agreement",
        "svd_method",
        "svd_iterations",
        "init",
    }
    assert set(record["preconditioner"]) == {"kind", "damping", "order"}
    assert record["base"]["fingerprint"]


def test_peft_configuration_has_only_keys_that_peft_knows(case):
    from peft import LoraConfig

    _, adapter = case
    assert set(adapter.peft_config()) <= set(LoraConfig().to_dict()) | {"peft_type"}


def test_layers_have_the_shapes_of_the_modules(case):
    directory, adapter = case
    module = open_model(str(directory)).module
    targets = select_targets(module, "all-linear")
    assert {name: report.shape for name, report in adapter.layers.items()} == {
        name: layer_shape(target) for name, target in targets.items()
    }


def test_directory_has_a_model_card_with_the_citation(case, tmp_path):
    directory, adapter = case
    adapter.save(tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraone.json",
    ]
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"`{directory}`" in card
    assert "base_model:" not in card  # the hub would take a path for a name
    assert "@inproceedings" in card
    assert f"{adapter.loss.after:.4f} after it" in card


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_nothing_is_overwritten_unless_asked(case, name, tmp_path):
    _, adapter = case
    adapter.save(tmp_path / name)
    with pytest.raises(OutputError, match="exists already"):
        adapter.save(tmp_path / name)
    adapter.save(tmp_path / name, overwrite=True)


def test_file_without_our_metadata_is_refused(case, tmp_path):
    _, adapter = case
    adapter.save(tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"b\.safetensors: it has no loraone metadata"):
        Adapter.load(tmp_path / "b.safetensors")


def test_factor_without_its_partner_is_refused(case, tmp_path):
    _, adapter = case
    adapter.save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    del tensors[next(iter(tensors))]
    save_file(tensors, tmp_path / "b.safetensors", metadata=adapter.metadata())
    with pytest.raises(AdapterError, match="lacks its partner"):
        Adapter.load(tmp_path / "b.safetensors")


def test_later_format_is_refused(case, tmp_path):
    _, adapter = case
    adapter.save(tmp_path / "a.safetensors")
    metadata = {**adapter.metadata(), "format_version": "2"}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(AdapterError, match="format version 2, this release reads 1"):
        Adapter.load(tmp_path / "b.safetensors")


def test_not_a_safetensors_file(tmp_path):
    (tmp_path / "a.safetensors").write_text("hello")
    with pytest.raises(AdapterError, match="no safetensors file"):
        Adapter.load(tmp_path / "a.safetensors")
