"""The programs in examples/node: the adapter file read by its specification alone, and an exported graph run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.onnx_runs import PROMPT, pytorch_tokens
from support.paths import ROOT

from loraone_init import Adapter

PROGRAMS = ROOT / "examples" / "node"
TOKENS = 40


def node(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    if (executable := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    command = [executable, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


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
    modules = Path(os.environ.get("LORAONE_NODE_MODULES", PROGRAMS / "node_modules")).absolute()
    if not (modules / "onnxruntime-node").is_dir():
        pytest.skip(
            "onnxruntime-node is not installed: npm install --ignore-scripts in examples/node, or name another"
            " node_modules in LORAONE_NODE_MODULES"
        )
    shutil.copy(PROGRAMS / "generate.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(modules)  # beside the program is where Node.js looks for packages
    done = node(tmp_path / "generate.mjs", smollm2_genai, TOKENS, *PROMPT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytorch_tokens(smollm2, smollm2_adapter, PROMPT, TOKENS)
