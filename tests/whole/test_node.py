"""The programs in examples/node: the adapter file read by its specification alone, and an exported graph run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.architectures import make_seq2seq
from support.causal import make_word_tokenizer
from support.documents import blocks
from support.exports import export
from support.onnx_runs import PROMPT, onnx_tokens, pytorch_tokens
from support.paths import ROOT
from transformers import AutoTokenizer

from loraone_init import Adapter

PROGRAMS = ROOT / "examples" / "node"
TOKENS = 40


def node(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    if (executable := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    command = [executable, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def link_modules(directory: Path, package: str) -> None:
    """Beside a program is where Node.js looks for packages."""
    modules = Path(os.environ.get("LORAONE_NODE_MODULES", PROGRAMS / "node_modules")).absolute()
    if not (modules / package).is_dir():
        pytest.skip(
            f"{package} is not installed: npm install --ignore-scripts in examples/node, or name another"
            " node_modules in LORAONE_NODE_MODULES"
        )
    (directory / "node_modules").symlink_to(modules)


def test_adapter_is_read_by_its_specification_alone(initialised: Path) -> None:
    adapter = Adapter.load(initialised)
    done = node(PROGRAMS / "read_adapter.mjs", initialised)
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split("  ") for line in done.stdout.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [cell.strip() for cell in header if cell.strip()] == ["layer", "shape", "rank", "scale", "energy", "‖s·B·A‖"]
    assert [row[0] for row in cells] == list(adapter.pairs)
    for (name, shape, rank, scale, energy, norm), pair in zip(cells, adapter.pairs.values(), strict=True):
        assert shape == f"{pair.B.shape[0]} × {pair.A.shape[1]}"
        assert int(rank) == len(pair.A) == adapter.config.rank
        assert float(scale) == pytest.approx(adapter.config.scale, rel=1e-4)
        assert energy == f"{100 * adapter.layers[name].captured_energy:.1f} %"
        product = adapter.config.scale * (pair.B.double() @ pair.A.double())
        assert float(norm) == pytest.approx(float(torch.linalg.norm(product)), rel=1e-4)


def test_another_version_of_the_format_is_refused(initialised: Path, tmp_path: Path) -> None:
    other = tmp_path / "adapters.safetensors"
    other.write_bytes(initialised.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    done = node(PROGRAMS / "read_adapter.mjs", other)
    assert done.returncode == 1
    assert "format version 2" in done.stderr


def test_onnxruntime_node_gives_pytorchs_tokens(
    smollm2: Path, smollm2_adapter: Path, smollm2_genai: Path, tmp_path: Path
) -> None:
    link_modules(tmp_path, "onnxruntime-node")
    shutil.copy(PROGRAMS / "generate.mjs", tmp_path)
    done = node(tmp_path / "generate.mjs", smollm2_genai, TOKENS, *PROMPT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytorch_tokens(smollm2, smollm2_adapter, PROMPT, TOKENS)


def test_transformers_js_runs_the_page(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    """The lines in docs/onnx.md, with each dtype that was exported in one call."""
    link_modules(tmp_path, "@huggingface/transformers")
    exported = export("onnx", tiny_model, initialised, "-o", tmp_path / "folder", "--dtype", "int4,fp32")
    assert exported.exit_code == 0, exported.output
    (code,) = blocks("javascript", (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, text = [5, 17, 40, 3], "w2 w14 w37 w0"
    for dtype, graph in (("fp32", "model.onnx"), ("q4", "model_q4.onnx")):
        made = code.replace("Anna has 12 apples and", text).replace('"."', json.dumps(str(tmp_path)))
        (tmp_path / "page.mjs").write_text(made.replace("q4", dtype), encoding="utf-8")
        done = node(tmp_path / "page.mjs")
        assert done.returncode == 0, done.stderr
        tokens = prompt + onnx_tokens(tmp_path / "folder", prompt, 20, graph)
        assert done.stdout.strip() == tokenizer.decode(tokens, skip_special_tokens=True)


SEQ2SEQ = """
import { AutoModelForSeq2SeqLM, Tensor, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const prompt = process.argv.slice(3).map(BigInt);
const model = await AutoModelForSeq2SeqLM.from_pretrained("folder", {});
const int64 = (values) => new Tensor("int64", BigInt64Array.from(values), [1, values.length]);
const given = { inputs: int64(prompt), attention_mask: int64(prompt.map(() => 1n)) };
const made = await model.generate({ ...given, max_new_tokens: 8, do_sample: false });
console.log(JSON.stringify(made.tolist()[0].map(Number)));
"""


@pytest.mark.slow
@torch.no_grad()
def test_transformers_js_runs_encoder_decoders(tmp_path: Path) -> None:
    link_modules(tmp_path, "@huggingface/transformers")
    base, adapter, prompt = tmp_path / "base", tmp_path / "adapter", [5, 17, 40, 3]
    model = make_seq2seq("t5", torch.float32)
    model.save_pretrained(base)
    make_word_tokenizer().save_pretrained(base)
    torch.manual_seed(3)
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], init_lora_weights=False)
    peft = get_peft_model(model, config)
    peft.save_pretrained(adapter)
    exported = export("onnx", base, adapter, "-o", tmp_path / "folder")
    assert exported.exit_code == 0, exported.output
    tokens = [0]
    for _ in range(8):
        logits = peft(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
    (tmp_path / "seq2seq.mjs").write_text(SEQ2SEQ, encoding="utf-8")
    done = node(tmp_path / "seq2seq.mjs", tmp_path, *prompt)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens
