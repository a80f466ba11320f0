"""Sums of products of half-precision numbers, without half-precision rounding."""

from __future__ import annotations

import pytest
import torch
from support.causal import relative_error

from loraone_init.gradients.collector import Collector
from loraone_init.linalg.products import _fp32_out, add_product

FP32 = 1e-6
"""Rounding of sums of 3,000 terms in fp32."""

BF16 = 1e-4
"""Far below what bf16 makes of the same sums (2e-3), far above fp32's rounding."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def factors(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(1000, 24, generator=generator), torch.randn(1000, 40, generator=generator)) for _ in range(3)]
    return [(dY.to(device, dtype), X.to(device, dtype)) for dY, X in parts]


def summed(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    total = None
    for dY, X in parts:
        total = add_product(total, dY, X)
    assert total is not None
    return total


def exact(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return sum(dY.cpu().double().T @ X.cpu().double() for dY, X in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_sum_in_fp64(dtype: torch.dtype) -> None:
    parts = factors(dtype=dtype)
    total = summed(parts)
    assert total.dtype == torch.float32
    assert relative_error(total, exact(parts)) < FP32


def test_fp64_stays_fp64() -> None:
    parts = factors(dtype=torch.float64)
    assert summed(parts).dtype == torch.float64
    assert relative_error(summed(parts), exact(parts)) < 1e-14


def test_a_bf16_product_would_be_found_out() -> None:
    parts = factors()
    rounded = sum((dY.T @ X).float() for dY, X in parts)
    assert relative_error(rounded, exact(parts)) > 10 * BF16


def test_the_sum_is_made_in_place() -> None:
    (first, *rest) = factors()
    total = add_product(None, *first)
    assert add_product(total, *rest[0]) is total


def test_cpu_has_no_product_of_its_own() -> None:
    """Were this to change, the copies to fp32 could go."""
    assert _fp32_out(torch.device("cpu"), torch.bfloat16) is None


def test_collector_of_a_bf16_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24, bias=False).bfloat16().requires_grad_(False)
    collector = Collector({"layer": layer})
    parts = factors()
    with collector.attached():
        for dY, X in parts:
            layer(X).backward(dY)
    assert relative_error(collector.take("layer", 1.0).G, exact(parts)) < FP32


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_sums_in_fp32_without_copies(dtype: torch.dtype) -> None:
    parts = factors("cuda", dtype)
    assert _fp32_out(parts[0][0].device, dtype) is not None
    total = add_product(None, *parts[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for dY, X in parts[1:]:
        assert add_product(total, dY, X) is total
    if _fp32_out(parts[0][0].device, dtype) == "addmm":
        assert torch.cuda.max_memory_allocated() - before < parts[0][1].nbytes
    assert relative_error(total.cpu(), exact(parts)) < BF16


def test_tokens_wait_until_they_are_worth_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 6 × 12 weights: at 4 tokens, dY and X have as many numbers as its gradient."""
    widths: list[int] = []

    def add_and_note(total: torch.Tensor | None, dY: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        widths.append(len(X))
        return add_product(total, dY, X)

    monkeypatch.setattr("loraone_init.gradients.collector.add_product", add_and_note)
    layer = torch.nn.Linear(12, 6, bias=False)
    collector = Collector({"layer": layer})
    inputs = [torch.randn(tokens, 12) for tokens in (1, 2, 3, 5, 1)]
    with collector.attached():
        for x in inputs:
            layer(x).sum().backward()
    gradient = collector.take("layer", 1).G
    assert widths == [1 + 2 + 3, 5, 1]
    torch.testing.assert_close(gradient, torch.cat(inputs).sum(0).expand(6, 12))
