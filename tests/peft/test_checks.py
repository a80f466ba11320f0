"""What `initialize_peft` cannot do exactly is refused by name, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from support.causal import make_batches, make_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from loraone_init.errors import ConfigError, DataError, LoraOneError, ModelError
from loraone_init.peft import initialize_peft

BATCHES = make_batches((6,))


def with_lora(**options):
    settings = {"r": 2, "target_modules": ["q_proj"]} | options
    return get_peft_model(make_model("llama", torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings))


def merged():
    model = with_lora()
    model.merge_adapter()
    return model


def several_active():
    model = with_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def prefix():
    return get_peft_model(
        make_model("llama", torch.float32), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


def masked():
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return get_peft_model(BertForMaskedLM(config), LoraConfig(r=2, target_modules=["query"]))


def marked(attribute):
    """A parameter as DeepSpeed leaves it."""
    model = with_lora()
    setattr(next(model.parameters()), attribute, 1)
    return model


def on_meta():
    model = with_lora()
    model.get_base_model().lm_head.weight = nn.Parameter(torch.empty(97, 32, device="meta"))
    return model


class Wrapping(nn.Module):
    """As DistributedDataParallel and other wrappers hold a model."""

    def __init__(self):
        super().__init__()
        self.module = with_lora()


REFUSED = {
    "pissa": (lambda: with_lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "olora": (lambda: with_lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "orthogonal": (lambda: with_lora(init_lora_weights="orthogonal"), "init_lora_weights='orthogonal'"),
    "eva": (lambda: with_lora(init_lora_weights="eva"), "init_lora_weights='eva'"),
    "prefix tuning": (prefix, "PREFIX_TUNING"),
    "merged": (merged, "unmerge_adapter()"),
    "several active": (several_active, "active at once"),
    "trained": (lambda: with_lora(init_lora_weights=False), "overwrite=True"),
    "bias": (lambda: with_lora(lora_bias=True), "lora_bias"),
    "embedding": (lambda: with_lora(target_modules=["embed_tokens"]), "embed_tokens is a Embedding"),
    "tokens": (lambda: with_lora(trainable_token_indices=[3]), "trainable_token_indices"),
    "replicated": (lambda: with_lora(layer_replication=[(0, 2), (1, 3)]), "layer_replication"),
    "alora": (lambda: with_lora(alora_invocation_tokens=[3]), "PEFT's ALoraLinear"),
    "rank": (lambda: with_lora(r=33), "rank 33"),
    "ZeRO-3": (lambda: marked("ds_id"), "ZeRO-3"),
    "DeepSpeed's copies": (lambda: marked("_hp_mapping"), "DeepSpeed"),
    "meta": (on_meta, "lm_head.weight is not in memory"),
    "a masked language model": (masked, "pass loss="),
    "a plain model": (lambda: make_model("llama", torch.float32), "get_peft_model"),
    "a wrapped model": (Wrapping, "pass its .module"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, told = REFUSED[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    with pytest.raises(LoraOneError) as refusal:
        initialize_peft(model, BATCHES, gamma=64)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_adapter_that_is_not_there():
    with pytest.raises(ConfigError, match="no adapter 'other'; there are: default"):
        initialize_peft(with_lora(), BATCHES, adapter_name="other")


def test_files_are_for_load_sample():
    with pytest.raises(DataError, match="load_sample"):
        initialize_peft(with_lora(), "rows.jsonl")


def test_a_single_row_leaves_none_to_hold_out(caplog):
    assert not initialize_peft(with_lora(), make_batches((6,), rows=1)).loss.held_out
    assert "γ" in caplog.text  # it was searched on that row
    with pytest.raises(DataError, match="2 rows, of which 2"):
        initialize_peft(with_lora(), BATCHES, held_out=2)


def test_a_tensor_parallel_model(monkeypatch):
    from loraone_init.peft import checks

    model = with_lora()
    monkeypatch.setattr(checks, "DTensor", nn.Parameter)
    with pytest.raises(ModelError, match="spread over several devices"):
        initialize_peft(model, BATCHES)
