"""The cost model's arithmetic, against the package's own estimate and by hand; its tables are docs/scaling.md's."""

from __future__ import annotations

import math
from dataclasses import replace

import cost_model
import pytest
import tables
from cost_model import GRADIENT, H100_NODE, LLAMA_70B, LLAMA_405B, LOGITS, WEIGHT, Model, device_bytes, predict
from support.causal import make_batches
from support.paths import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

from loraone_init.initialization.estimate import estimate_memory
from loraone_init.initialization.evaluation import num_evaluated
from loraone_init.initialization.layer_starts import BATCH_BYTES
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module


def test_tables_of_the_documents_are_the_models() -> None:
    for document, content in tables.documents().items():
        text = document.read_text()
        assert text == tables.filled_in(text, content), "run python benchmarks/tables.py"
        assert all(table in text for table in content.values())


def test_assumptions_of_the_document_are_the_models() -> None:
    """As long as no GPU was measured."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert (
        replace(H100_NODE, matrix_rate=989e12, efficiency=0.5, device_memory=80e9, host_memory=2e12, disk=7e9, gpus=8)
        == H100_NODE
    )
    for stated in ("989 TFLOP/s, half", "80 GB at 3.35 TB/s", "8 GPUs, 2 TB", "| 7 GB/s", "| 5 GB/s", "| 0.05 s"):
        assert stated in text


def test_parameters_are_those_of_the_published_models() -> None:
    assert LLAMA_70B.weight_bytes / WEIGHT == pytest.approx(70.55e9, rel=1e-3)
    assert LLAMA_405B.weight_bytes / WEIGHT == pytest.approx(405.85e9, rel=1e-3)


def test_device_memory_is_the_packages_estimate() -> None:
    """Of a bf16 Llama large enough for its norms to be nothing beside its matrices."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3, "vocab_size": 1000}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, head_dim=128, dtype="bfloat16")
    import torch

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    batches = make_batches((512,) * 4, rows=8, vocabulary=1000)
    opened = replace(open_module(module), placement="host", device=torch.device("cuda"))
    memory = estimate_memory(opened, select_targets(module, "all-linear"), batches)
    model = Model("small", 1024, 3072, 256, 3, 1000, rows=32, length=512, batch_tokens=4096)
    blocks = (memory.outside + memory.block - WEIGHT * model.outside) / (WEIGHT * model.block)
    assert blocks == pytest.approx(round(blocks), rel=1e-3)  # as many as the placement has on the device
    ours = device_bytes(model, 1, "host") + (round(blocks) - 2) * WEIGHT * model.block
    assert ours == pytest.approx(memory.total, rel=0.01)
    row = make_batches((512,), rows=1, vocabulary=1000)
    by_rows = estimate_memory(
        replace(opened, placement="device"), select_targets(module, "all-linear"), row, schedule="rows"
    )
    assert cost_model.device_bytes_by_rows(model, 1) == pytest.approx(by_rows.total, rel=0.01)


def test_evaluated_rows_are_the_packages() -> None:
    assert [cost_model.num_evaluated(rows) for rows in range(1, 200)] == [num_evaluated(r) for r in range(1, 200)]


def test_one_cost_by_hand() -> None:
    """One block of 2·4 + 2·2·2 + 3·2·4 = 40 parameters, 4 rows of 8 tokens on one rank, everything resident."""
    model = Model("hand", hidden=2, intermediate=4, kv=2, layers=1, vocabulary=10, rows=4, length=8)
    machine = replace(H100_NODE, matrix_rate=1.0, efficiency=1.0)
    cost = predict(model, 1, machine)
    forward = 2 * 40 * 32 + 2 * 1 * 32 * 8 * 2
    assert (cost.placement, cost.schedule) == ("device", "rows")
    assert cost.seconds["forward"] == forward + 4 * 10 * 2 * 32
    assert cost.seconds["backward"] == 2 * forward
    assert cost.seconds["evaluate"] == forward / 4 + 2 * 10 * 2 * 8
    assert cost.moved_bytes == 0
    weights, sums = WEIGHT * (2 * 10 * 2 + 40), GRADIENT * (40 + 8)
    widths = 6 * 2 + 2 * 4 + 3 * 4 + 2
    assert cost.device_bytes == pytest.approx(weights + sums + LOGITS + 1.4 * WEIGHT * widths * 8)
    by_blocks = predict(replace(model, layers=10**9), 1, machine)
    assert by_blocks.schedule == "blocks"
    assert by_blocks.seconds["backward"] == 3 * (by_blocks.seconds["forward"] - 4 * 10 * 2 * 32)


def test_shared_reading_divides_what_comes_over_pcie() -> None:
    alone, shared = (cost(LLAMA_70B, 8, H100_NODE) for cost in (predict, cost_model.shared_reading))
    size = WEIGHT * LLAMA_70B.blocks
    assert alone.moved_bytes - shared.moved_bytes == pytest.approx(3 * size * 7 / 8)
    assert shared.host_bytes == size < alone.host_bytes
    assert shared.total < alone.total


@pytest.mark.parametrize("model", [LLAMA_70B, LLAMA_405B])
def test_ranks_share_computing_not_reading(model: Model) -> None:
    one, eight = predict(model, 1, H100_NODE), predict(model, 8, H100_NODE)
    assert eight.flops == pytest.approx(one.flops / 8)
    assert eight.moved_bytes >= 3 * WEIGHT * model.blocks
    assert math.isclose(eight.seconds["reduce"], GRADIENT * model.blocks / H100_NODE.link)


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("model", [LLAMA_70B, LLAMA_405B])
def test_what_is_predicted_fits(model: Model, ranks: int) -> None:
    cost = predict(model, ranks, H100_NODE)
    assert cost.device_bytes < H100_NODE.device_memory
    assert cost.host_bytes < H100_NODE.host_memory


def test_svd_batches_by_hand() -> None:
    """Of 2^28 bytes: 64 MiB layers go by four, 4 MiB layers by 64, those of 2^28 bytes alone."""
    small = Model("small", hidden=4096, intermediate=4096, kv=256, layers=1, vocabulary=1)
    large = Model("large", hidden=8192, intermediate=8192, kv=8192, layers=1, vocabulary=1)
    assert cost_model.svd_batches(small) == 2 / 4 + 2 / 64 + 2 / 4 + 1 / 4
    assert cost_model.svd_batches(large) == 7
    assert cost_model.SVD_BATCH == BATCH_BYTES
