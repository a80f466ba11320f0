"""Graphs of onnxruntime-genai's builder, and genai_config.json: run by both runtimes, against PyTorch."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.commands import content, error_line
from support.exports import export, save_base, save_peft
from support.onnx_runs import PROMPT, empty_caches, onnx_tokens, open_graph, pytorch_tokens, run
from transformers import AutoTokenizer

from loraone_init.errors import ExportError
from loraone_init.exporters.onnx.genai import build_genai
from loraone_init.exporters.onnx.genai_config import write_genai_config

TOKENS = 40
ROUNDING = 1e-3  # of logits up to 30 in fp32; a row that attends to padding is off by more than 1


@pytest.fixture(scope="module")
def expected(smollm2: Path, smollm2_adapter: Path) -> list[int]:
    return pytorch_tokens(smollm2, smollm2_adapter, PROMPT, TOKENS)


def genai_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by onnxruntime-genai."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def test_the_adapter_changes_the_tokens(smollm2: Path, expected: list[int]) -> None:
    """What makes the comparisons below mean something."""
    assert pytorch_tokens(smollm2, None, PROMPT, TOKENS) != expected
    assert len(set(expected)) > TOKENS // 4


def test_onnxruntime_genai_gives_pytorchs_tokens(smollm2_genai: Path, expected: list[int]) -> None:
    assert genai_tokens(smollm2_genai, PROMPT, TOKENS) == expected


def test_plain_onnxruntime_gives_pytorchs_tokens(smollm2_genai: Path, expected: list[int]) -> None:
    assert onnx_tokens(smollm2_genai, PROMPT, TOKENS) == expected


def test_names_and_files_are_those_that_readers_look_for(smollm2_genai: Path) -> None:
    session = open_graph(smollm2_genai)
    caches = [f"past_key_values.{layer}.{kind}" for layer in range(30) for kind in ("key", "value")]
    assert {value.name for value in session.get_inputs()} == {"input_ids", "attention_mask", *caches}
    presents = [name.replace("past_key_values", "present") for name in caches]
    assert {value.name for value in session.get_outputs()} == {"logits", *presents}
    assert sorted(file.name for file in (smollm2_genai / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    config = json.loads((smollm2_genai / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "onnx/model.onnx"


def test_shorter_rows_are_padded_on_the_right(smollm2_genai: Path) -> None:
    """Fused attention counts the mask's ones; on the left, padding would be attended to."""
    session = open_graph(smollm2_genai)
    short, padding = PROMPT[3:], [2] * 3

    def last_logits(rows: list[list[int]], mask: list[list[int]], row: int, position: int) -> np.ndarray:
        caches = empty_caches(session, len(rows))
        return run(session, np.array(rows), np.array(mask), caches)["logits"][row, position]

    alone = last_logits([short], [[1] * 10], 0, -1)
    right = last_logits([PROMPT, short + padding], [[1] * 13, [1] * 10 + [0] * 3], 1, 9)
    left = last_logits([PROMPT, padding + short], [[1] * 13, [0] * 3 + [1] * 10], 1, -1)
    assert np.abs(right - alone).max() < ROUNDING
    assert np.abs(left - alone).max() > 1


def test_our_own_genai_config_runs(smollm2_genai: Path, expected: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(smollm2_genai, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    (folder / "genai_config.json").unlink()
    assert write_genai_config(smollm2_genai, folder)
    assert genai_tokens(folder, PROMPT, TOKENS) == expected


def test_genai_config_takes_ids_and_sampling_from_the_model(smollm2_genai: Path, tmp_path: Path) -> None:
    merged, generation = tmp_path / "merged", {"eos_token_id": [2, 0], "do_sample": True, "temperature": 0.6}
    merged.mkdir()
    shutil.copy(smollm2_genai / "config.json", merged)
    (merged / "onnx").symlink_to(smollm2_genai / "onnx")
    (merged / "generation_config.json").write_text(json.dumps(generation))
    assert write_genai_config(merged, merged)
    config = json.loads((merged / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 0]
    assert config["model"]["pad_token_id"] == 2
    assert (config["search"]["do_sample"], config["search"]["temperature"]) == (True, 0.6)


def test_parity_is_recorded(smollm2_genai: Path) -> None:
    content = json.loads((smollm2_genai / "parity.json").read_text())
    assert content["engine"] == "genai"
    parity = content["graphs"]["fp32"]
    assert all(0 < found["max_abs"] < ROUNDING for found in parity["differences"].values())
    assert parity["greedy_tokens"]["pytorch"] == parity["greedy_tokens"]["onnxruntime"]


def test_the_folders_tokenizer_is_that_of_the_model(smollm2: Path, smollm2_genai: Path) -> None:
    import onnxruntime_genai

    text = "<|im_start|>user\nWhat is 12 × 3?<|im_end|>\n"
    found = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(smollm2_genai))).encode(text)
    assert list(found) == AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]


def test_a_graph_of_torch_runs_in_onnxruntime_genai(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    base, adapter, folder = tmp_path / "base", tmp_path / "adapter", tmp_path / "folder"
    save_peft(adapter, save_base(base))
    result = export("onnx", base, adapter, "-o", folder, "--dtype", "int8")
    assert result.exit_code == 0, result.output
    prompt = list(range(5, 14))
    expected = onnx_tokens(folder, prompt, TOKENS, "model_quantized.onnx")
    assert genai_tokens(folder, prompt, TOKENS) == expected


def test_an_unknown_architecture_names_the_other_engine(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base, "gpt2"))
    before = content(tmp_path)
    result = export("onnx", base, adapter, "-o", tmp_path / "folder", "--engine", "genai")
    assert result.exit_code == 1
    assert "does not know GPT2LMHeadModel; take --engine torch" in error_line(result.stderr)
    assert content(tmp_path) == before


def test_what_the_builder_says_last_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    base, out = tmp_path / "base", tmp_path / "out"
    save_base(base)
    out.mkdir()
    failed = subprocess.CompletedProcess(
        [], 1, stdout="Reading layer 0\n\nOSError: [Errno 28] No space left on device\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(ExportError, match=r"builder failed: OSError: .*No space left on device; take --engine torch"):
        build_genai(base, out, "fp32")
    assert content(out) == {}


def test_a_missing_package_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = export("onnx", base, adapter, "-o", tmp_path / "folder", "--engine", "genai")
    assert result.exit_code == 1
    assert error_line(result.stderr) == (
        "Error: the engine genai needs onnxruntime-genai and onnx-ir, which are not installed: in the clone of"
        ' loraone-init, pip install ".[genai]"'
    )
