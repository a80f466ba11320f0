"""Which layers get an adapter: PEFT's rules."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from support.causal import make_model
from torch import nn

from loraone_init.errors import ConfigError, ModelError
from loraone_init.layers.targets import layer_shape, select_targets
from loraone_init.models.blocks import find_blocks


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *[(name, "all-linear") for name in ("llama", "gemma3", "gpt2", "opt")],
        *[(name, r".*(q_proj|c_proj|c_attn)") for name in ("llama", "gemma3", "gpt2", "opt")],
        ("llama", ("q_proj", "self_attn.v_proj")),
        ("gpt2", ("c_attn", "mlp.c_proj")),
    ],
)
def test_same_layers_as_peft(name, wanted):
    model = make_model(name)
    ours = set(select_targets(model, wanted))
    peft = get_peft_model(model, LoraConfig(target_modules=list(wanted) if isinstance(wanted, tuple) else wanted))
    theirs = {key.removeprefix("base_model.model.") for key in peft.targeted_module_names}
    assert ours == {key.removeprefix("base_model.model.") for key in theirs}


def test_excluded_names_are_left_out():
    targets = select_targets(make_model("llama"), "all-linear", ("q_proj", "down_proj"))
    assert {name.rpartition(".")[2] for name in targets} == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_conv1d_shape_is_out_in():
    targets = select_targets(make_model("gpt2"), ("c_attn",))
    assert {layer_shape(module) for module in targets.values()} == {(96, 32)}


def test_no_match_lists_the_candidates():
    with pytest.raises(ModelError, match=r"'quer.'.*q_proj \(3\), k_proj \(3\)"):
        select_targets(make_model("llama"), "quer.")


def test_regular_expression_for_part_of_a_name_is_told_that_it_has_to_match_all():
    with pytest.raises(ModelError, match=r"it has to match a whole name, as '\.\*\(q_proj\|v_proj\)' does"):
        select_targets(make_model("llama"), "q_proj|v_proj")


@pytest.mark.parametrize("names", [("q_proj", "v_porj"), ("v_porj",)])
def test_every_name_has_to_match_a_layer(names):
    with pytest.raises(ModelError, match=r"'v_porj'; there are: q_proj \(3\), k_proj \(3\)"):
        select_targets(make_model("llama"), names)


def test_every_excluded_name_has_to_match_a_module():
    model = make_model("llama")
    assert select_targets(model, "all-linear", ("embed_tokens", "lm_head")) == select_targets(model, "all-linear")
    with pytest.raises(ModelError, match="'lm_hed'"):
        select_targets(model, "all-linear", ("lm_hed",))


def test_bad_regular_expression():
    with pytest.raises(ConfigError, match="not a regular expression"):
        select_targets(make_model("llama"), "*q_proj")


def test_blocks_by_no_split_modules():
    class Layer(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Layer(), Layer())
    model._no_split_modules = ["Layer"]
    assert find_blocks(model) == ["1", "2"]


def test_blocks_by_path():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert find_blocks(model) == []
    assert find_blocks(model, "0") == ["0.0", "0.1"]


def test_unknown_block_path_lists_the_module_lists():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"'blocks' names no module list; there are: 0 \(2\)"):
        find_blocks(model, "blocks")


class Router(nn.Linear):
    def forward(self, input):
        return super().forward(input).topk(1)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2.0 * super().forward(input)


def test_linear_layers_of_other_forms_are_left_out(caplog):
    """By their shapes: what keeps them is as linear as any other."""
    model = nn.ModuleDict({"a": Router(4, 3), "b": Router(4, 3), "c": Scaled(4, 3), "d": nn.Linear(4, 3)})
    assert list(select_targets(model, "all-linear")) == ["c", "d"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a and all other Router are left out"
    ]
    with pytest.raises(ModelError, match=r"layer a, a Router, is no plain linear layer.*`exclude_modules=\"a\"`"):
        select_targets(model, ("a", "d"))
    assert list(select_targets(model, ("a", "d"), ("a",))) == ["d"]
