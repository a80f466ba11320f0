"""llama.cpp with our adapters against PyTorch with PEFT. llama-cpp-python builds from source in minutes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.causal import VOCABULARY, relative_error
from support.exports import export, save_base, save_peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraone_init.models.sources import _demo_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="llama-cpp-python is not installed: pip install --no-deps llama-cpp-python diskcache",
    ),
]

FP32 = 1e-5  # relative; other kernels, in fp32 with a cache of fp32
GELU = 1e-3  # relative; llama.cpp looks it up in a table of fp16
QUANTIZED = 0.1  # relative; activations are rounded to 8 bits for every product with a Q4_1 weight
PROMPT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def logits(base: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("name", "tolerance"), [("llama", FP32), ("qwen3", FP32), ("gpt2", GELU)])
def test_tiny_model_in_fp32(name: str, tolerance: float, tmp_path: Path) -> None:
    from support.gguf_models import llama_cpp_logits, write_model

    base, adapter, model, file = (tmp_path / part for part in ("base", "adapter", "model.gguf", "adapter.gguf"))
    torch_model = save_base(base, name)
    write_model(model, torch_model)
    save_peft(adapter, torch_model, use_rslora=True, rank_pattern={"v_proj": 2}, lora_alpha=4)
    assert export("gguf", base, adapter, "-o", file).exit_code == 0
    ids = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = logits(base, ids, adapter)
    assert relative_error(llama_cpp_logits(model, ids), logits(base, ids)) < tolerance
    assert relative_error(llama_cpp_logits(model, ids, file), expected) < tolerance
    assert relative_error(llama_cpp_logits(model, ids), expected) > 0.01


def test_smollm2_as_it_is_packaged(smollm2: Path, tmp_path: Path) -> None:
    """Against PyTorch on the dequantized weights."""
    from support.gguf_models import llama_cpp_logits

    adapter, file = tmp_path / "adapter", tmp_path / "adapter.gguf"
    save_peft(adapter, AutoModelForCausalLM.from_pretrained(smollm2), r=8, lora_alpha=2, use_rslora=True)
    assert export("gguf", smollm2, adapter, "-o", file).exit_code == 0
    ids = AutoTokenizer.from_pretrained(smollm2)(PROMPT).input_ids
    plain, adapted = llama_cpp_logits(_demo_file(), ids), llama_cpp_logits(_demo_file(), ids, file)
    expected = logits(smollm2, ids, adapter)
    assert relative_error(plain, logits(smollm2, ids)) < QUANTIZED
    assert relative_error(adapted, expected) < QUANTIZED
    assert relative_error(plain, expected) > 2 * QUANTIZED
