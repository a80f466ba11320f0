"""Opening a model: what is streamed from disk equals what transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.causal import CAUSAL_CONFIGS, make_batches, make_model
from transformers import AutoModelForCausalLM

from loraone_init.errors import ConfigError, ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_losses
from loraone_init.models.opening import open_model
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.checkpoint import Checkpoint
from loraone_init.weights.disk import DiskStore

FP32 = 1e-6
"""Both sides compute the same in fp32; a block alone may be summed in another order."""


def save(model, directory, **options) -> Path:
    model.save_pretrained(directory, **options)
    return Path(directory)


def losses_of(opened, batches):
    with torch.no_grad():
        return torch.cat(
            [
                rows.sums
                for rows in stream_losses(BlockStack.of(opened), CausalLM(opened.module, opened.device), batches)
            ]
        )


def whole_losses(directory, batches):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sums = []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        sums.append(loss.double().sum(1))
    return torch.cat(sums)


@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_streamed_from_disk_equals_from_pretrained(name, tmp_path):
    directory = save(make_model(name, torch.float32), tmp_path)
    opened = open_model(str(directory))
    assert isinstance(opened.store, DiskStore)
    torch.testing.assert_close(
        losses_of(opened, make_batches()), whole_losses(directory, make_batches()), rtol=FP32, atol=0
    )


def test_blocks_have_no_storage_outside_of_their_use(tmp_path):
    opened = open_model(str(save(make_model("llama", torch.float32), tmp_path)))
    losses_of(opened, make_batches())
    kinds = {name: p.device.type for name, p in opened.module.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".layers." in name} == {"meta"}
    assert {kind for name, kind in kinds.items() if ".layers." not in name} == {"cpu"}


def test_several_shards(tmp_path):
    model = make_model("llama", torch.float32)
    one = open_model(str(save(model, tmp_path / "one")))
    many = open_model(str(save(model, tmp_path / "many", max_shard_size="20KB")))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(losses_of(one, make_batches()), losses_of(many, make_batches()))
    assert one.fingerprint == many.fingerprint


def test_tied_embeddings_share_one_tensor(tmp_path):
    directory = save(make_model("llama", torch.float32, tie_word_embeddings=True), tmp_path)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    module = open_model(str(directory)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_bf16_checkpoint_is_computed_in_fp32_on_the_cpu(tmp_path):
    directory = save(make_model("llama", torch.bfloat16), tmp_path)
    opened = open_model(str(directory))
    assert {p.dtype for p in opened.module.parameters()} == {torch.float32}
    torch.testing.assert_close(
        losses_of(opened, make_batches()), whole_losses(directory, make_batches()), rtol=FP32, atol=0
    )


def test_dtype_can_be_chosen(tmp_path):
    opened = open_model(str(save(make_model("llama", torch.float32), tmp_path)), dtype="bfloat16")
    assert {p.dtype for p in opened.module.parameters()} == {torch.bfloat16}


def test_names_without_the_models_prefix(tmp_path):
    """A base model's checkpoint opened with a head: names get their prefix, as transformers does."""
    directory = save(make_model("gpt2", torch.float32), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    before = losses_of(open_model(str(directory)), make_batches())
    save_file(stripped, directory / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(losses_of(open_model(str(directory)), make_batches()), before)


def test_fingerprint_changes_with_the_weights(tmp_path):
    directory = save(make_model("llama", torch.float32), tmp_path)
    before = Checkpoint(directory).fingerprint()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(directory).fingerprint() != before


def test_hub_id_from_a_local_cache(tmp_path, monkeypatch):
    """The hub's cache layout, as huggingface_hub reads it offline."""
    import huggingface_hub.constants as constants

    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    save(make_model("llama", torch.float32), snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    opened = open_model("someone/tiny")
    assert opened.name == "someone/tiny"
    assert open_model("someone/tiny", revision="main").revision == "main"
    torch.testing.assert_close(
        losses_of(opened, make_batches()), whole_losses(snapshot, make_batches()), rtol=FP32, atol=0
    )


def test_hub_id_that_is_not_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="someone/other is neither a local directory nor"):
        open_model("someone/other")


def test_gguf_is_converted_once(smollm2):
    """The packaged model: a Q4_1 GGUF file whose tensors become fp32 safetensors."""
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 30)
    from loraone_init.models.sources import _demo_file, convert_gguf

    written = (smollm2 / "model.safetensors").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(smollm2.parent.parent))
        assert convert_gguf(_demo_file()) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == written


def test_missing_tensor_is_named(tmp_path):
    directory = save(make_model("llama", torch.float32), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(str(directory))


def test_model_without_recognisable_blocks_needs_a_block_path(tmp_path, monkeypatch):
    monkeypatch.setattr("loraone_init.models.blocks.is_checkpointing_layer", lambda module: False)
    directory = save(make_model("llama", torch.float32), tmp_path)
    monkeypatch.setattr("loraone_init.models.blocks.unsplit_classes", lambda model: set())
    assert open_model(str(directory), weights=False).blocks == tuple(f"model.layers.{i}" for i in range(3))
    monkeypatch.setattr("loraone_init.models.blocks._alike", lambda model, at_least: [])
    with pytest.raises(ModelError, match=r"`block_path`.*model\.layers \(3\)"):
        open_model(str(directory))
    assert open_model(str(directory), block_path="model.layers").blocks == (*(f"model.layers.{i}" for i in range(3)),)


def test_code_that_comes_with_a_model_runs_only_on_request(tmp_path):
    directory = save(make_model("llama", torch.float32), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelError, match="`trust_remote_code=True` runs it"):
        open_model(str(directory))
    opened = open_model(str(directory), trust_remote_code=True)
    assert type(opened.module).__name__ == "OwnModel"
    assert len(opened.blocks) == 3


def test_unknown_device():
    with pytest.raises(ConfigError, match="device 'tpu9'"):
        open_model("demo", device="tpu9")


def test_copy_of_the_directory_has_the_same_fingerprint(tmp_path):
    directory = save(make_model("llama", torch.float32), tmp_path / "a")
    shutil.copytree(directory, tmp_path / "b")
    assert Checkpoint(tmp_path / "a").fingerprint() == Checkpoint(tmp_path / "b").fingerprint()
