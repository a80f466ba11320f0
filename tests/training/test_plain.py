"""Adapters that PEFT alone has written are trained as PEFT trains them, and end as PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.commands import error_line
from support.exports import save_peft
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from loraone_init import load_sample
from loraone_init.cli.train import main
from loraone_init.data.batches import collate

ONE_STEP = 1e-6
"""Absolute; a step of Adam moves each number by 1e-2, and the same sums are formed in another order."""
LOSS = 1e-6
"""Relative; rounding in fp32 through three blocks."""
RATE = 1e-2
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    save_peft(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tiny_model))
    return tmp_path / "adapter"


def run(model: Path, data: Path, adapter: Path, output: Path, *more: object) -> Result:
    steps = ("--max-steps", 4, "--batch-size", 2, "--logging-steps", 1, "--device", "cpu")
    arguments = (model, data, "--adapter", adapter, "-o", output, *steps, "--save-steps", 2, *more)
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def edit_config(adapter: Path, **changes: object) -> dict[str, Any]:
    config = json.loads((adapter / CONFIG).read_text()) | changes
    (adapter / CONFIG).write_text(json.dumps(config))
    return config


def step_of_peft(model: Path, data: Path, adapter: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss on all rows, and the factors, as PEFT saves them, after one step of torch's AdamW; ours has no part."""
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter, is_trainable=True)
    sample = load_sample(str(data), AutoTokenizer.from_pretrained(model))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    wrapped.train()
    loss = wrapped(**collate(sample.rows, pad_id=sample.pad_id)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    optimizer.step()
    wrapped.save_pretrained(adapter.parent / "by-peft")
    return loss.item(), load_file(adapter.parent / "by-peft" / WEIGHTS)


def save_gpt2(directory: Path, tokenizer: Path) -> Path:
    """Its layers are Conv1D, whose weights are transposed: `fan_in_fan_out`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    "layers by a pattern": {"target_modules": r".*layers\.[02]\..*(q|up)_proj"},
    "fan in, fan out": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_step_is_pefts(name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "gpt2", tiny_model) if name == "fan in, fan out" else tiny_model
    start, output = tmp_path / "adapter", tmp_path / "trained"
    save_peft(start, AutoModelForCausalLM.from_pretrained(model), **SETTINGS[name])
    loss, expected = step_of_peft(model, tiny_data, start)
    step = ("--max-steps", 1, "--batch-size", 12, "--optimizer", "adamw", "--learning-rate", RATE)
    done = run(model, tiny_data, start, output, *step)
    assert done.exit_code == 0, done.output
    first = json.loads((output / "training_log.json").read_text())[0]
    assert first["loss"] == pytest.approx(loss, rel=LOSS)  # Adam's first step tells nothing of the scale; the loss does
    before, found = load_file(start / WEIGHTS), load_file(output / WEIGHTS)
    assert found.keys() == expected.keys() == before.keys()
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=ONE_STEP)
        assert (found[tensor] - before[tensor]).abs().max() > RATE / 2


def test_result_is_pefts_directory(adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The configuration as it was, no record, the history beside it; PEFT loads it, and a training goes on from it."""
    output = tmp_path / "trained"
    done = run(tiny_model, tiny_data, adapter, output)
    assert done.exit_code == 0, done.output
    assert "is another tool's adapter" in done.stderr
    assert "4 steps, loss" in done.stdout
    assert sorted(file.name for file in output.iterdir() if file.is_file()) == [
        CONFIG,
        WEIGHTS,
        "loraone-train.yaml",
        "training_log.json",
    ]
    assert json.loads((output / CONFIG).read_text()) == json.loads((adapter / CONFIG).read_text())
    log = json.loads((output / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    loaded = dict(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), output).named_parameters()
    )
    for name, tensor in load_file(output / WEIGHTS).items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)
    again = run(tiny_model, tiny_data, output, tmp_path / "again")
    assert again.exit_code == 0, again.output


def test_resumed_is_as_if_never_interrupted(adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With the adapter's own dropout, whose numbers go on too."""
    edit_config(adapter, lora_dropout=0.3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        assert run(tiny_model, tiny_data, adapter, output).exit_code == 0
    state = cut / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-1])
    resumed = run(tiny_model, tiny_data, adapter, cut, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Going on after step 2" in resumed.stderr
    assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    edit_config(adapter, lora_alpha=16)
    other = run(tiny_model, tiny_data, adapter, cut, "--resume", "-q")
    assert "is of another training: adapter was" in error_line(other.stderr)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "it uses DoRA (use_dora)"),
        ({"init_lora_weights": "pissa"}, "it was initialised with pissa"),
        ({"bias": "lora_only"}, "it trains biases of the base"),
        ({"modules_to_save": ["lm_head"]}, "it holds lm_head whole (modules_to_save)"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "is no LoRA factor"),
    ],
)
def test_more_than_factors(
    settings: dict[str, Any], told: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    save_peft(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tiny_model), **settings)
    done = run(tiny_model, tiny_data, tmp_path / "adapter", tmp_path / "trained", "-q")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"Error: {tmp_path / 'adapter'}: " in error_line(done.stderr)
    assert told in error_line(done.stderr)
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rsLoRA_of_tomorrow": True}, "rsLoRA_of_tomorrow"),
        ({"init_lora_weights": "of_tomorrow"}, "it was initialised with of_tomorrow"),
        ({"task_type": "SEQ_CLS"}, "is for SEQ_CLS"),
        ({"peft_type": "IA3"}, "is no LoRA adapter but IA3"),
        ({"target_modules": ["q_proj"]}, "is none of the model's"),
        ({"r": 8}, "the adapter does not fit"),
        ({"lora_dropout": "half"}, "the adapter does not fit"),
        ({"target_parameters": ["mlp.experts"]}, "it has factors of experts (target_parameters)"),
    ],
)
def test_configurations_that_do_not_fit(
    changes: dict[str, Any], told: str, adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    edit_config(adapter, **changes)
    done = run(tiny_model, tiny_data, adapter, tmp_path / "trained", "-q")
    assert (done.exit_code, done.stdout) == (1, "")
    assert told in error_line(done.stderr)


def test_expressions_that_never_end(adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """PEFT would search with them; it gets the layers that they stand for."""
    endless = r"(\w+\.?)+!|" * 3
    edit_config(adapter, target_modules=endless + ".*", exclude_modules=endless, alpha_pattern={endless + "x": 4})
    output = tmp_path / "trained"
    done = run(tiny_model, tiny_data, adapter, output)
    assert done.exit_code == 0, done.output
    config = json.loads((output / CONFIG).read_text())
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in load_file(adapter / WEIGHTS)}
    assert (set(config["target_modules"]), config["exclude_modules"], config["alpha_pattern"]) == (layers, None, {})


def test_a_layer_without_factors(adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """PEFT would start it anew, and only warn."""
    tensors = load_file(adapter / WEIGHTS)
    left = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    assert len(left) == len(tensors) - 2
    save_file(left, adapter / WEIGHTS, {"format": "pt"})
    done = run(tiny_model, tiny_data, adapter, tmp_path / "trained", "-q")
    assert done.exit_code == 1
    assert "layers.1.mlp.up_proj" in error_line(done.stderr)
    assert "in its configuration, but not among its factors" in error_line(done.stderr)


@pytest.mark.parametrize(
    ("dtype", "taken"), [(torch.bfloat16, True), (torch.float8_e4m3fn, True), (torch.int32, False), (torch.bool, False)]
)
def test_factors_of_other_dtypes(
    dtype: torch.dtype, taken: bool, adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Factors of few bits are trained in fp32, as PEFT does; whole numbers are no factors."""
    cast = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(cast, adapter / WEIGHTS, {"format": "pt"})
    done = run(tiny_model, tiny_data, adapter, tmp_path / "trained", "-q")
    if taken:
        assert done.exit_code == 0, done.output
        for name, tensor in load_file(tmp_path / "trained" / WEIGHTS).items():
            assert tensor.dtype == torch.float32
            assert 0 < (tensor - cast[name].float()).abs().max() < 4 * RATE
    else:
        assert "in floating point" in error_line(done.stderr)


def test_factors_of_rank_0(adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    empty = {name: t[:0] if "lora_A" in name else t[:, :0] for name, t in load_file(adapter / WEIGHTS).items()}
    save_file({name: tensor.contiguous() for name, tensor in empty.items()}, adapter / WEIGHTS, {"format": "pt"})
    done = run(tiny_model, tiny_data, adapter, tmp_path / "trained", "-q")
    assert done.exit_code == 1
    assert "has no factors (r, in)" in error_line(done.stderr)


def test_record_of_another_adapter_is_not_left_beside_it(
    adapter: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "trained"
    output.mkdir()
    (output / "loraone.json").write_text("{}")
    done = run(tiny_model, tiny_data, adapter, output, "--overwrite", "-q")
    assert done.exit_code == 1
    assert "loraone.json is the record of another adapter" in error_line(done.stderr)
    assert [file.name for file in output.iterdir()] == ["loraone.json"]
