"""Bases, adapters and their logits for the tests of `loraone_init.exporters`."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraone_init.cli.export import main
from support.causal import VOCABULARY, make_batches, make_model
from support.commands import content, error_line

ROUNDING = 1e-5  # of sums in fp32 through three blocks, relative


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save_base(directory: Path, name: str = "llama", **options: object) -> PreTrainedModel:
    model = make_model(name, torch.float32)
    model.save_pretrained(directory, **options)
    return model


def save_peft(directory: Path, model: PreTrainedModel, **options: object) -> None:
    """An adapter of random factors, as PEFT writes it."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(directory)


def check_refusal(target: str, output: str, name: str, settings: dict[str, object], told: str, tmp_path: Path) -> None:
    """The export ends in one line that says `told` and points to `export merged`; nothing is written."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base, name), **settings)
    before = content(tmp_path)
    result = export(target, base, adapter, "-o", tmp_path / output)
    assert result.exit_code == 1
    message = error_line(result.stderr)
    assert told in message
    assert "export merged" in message
    assert content(tmp_path) == before


def make_moe(name: str) -> PreTrainedModel:
    """Two blocks of four experts each."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts" if name == "qwen3_moe" else "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    batch = make_batches()[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())
