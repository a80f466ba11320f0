"""A layer's gradient, whatever the model goes on to do with its output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from loraone_init.errors import ModelError
from loraone_init.gradients.collector import Collector


def divide(y: torch.Tensor) -> torch.Tensor:
    y /= 3.0
    return y


def divide_a_view(y: torch.Tensor) -> torch.Tensor:
    y.view(-1)[:5] /= 3.0
    return y


def overwrite_a_part(y: torch.Tensor) -> torch.Tensor:
    y[0] = 1.0
    return torch.relu_(y)


@pytest.mark.parametrize("change", [divide, divide_a_view, overwrite_a_part])
@pytest.mark.parametrize("differentiable_input", [True, False])
def test_output_changed_in_place(change: Callable[[torch.Tensor], torch.Tensor], differentiable_input: bool) -> None:
    """As Longformer and LED do with their queries. With a bias, a layer of three-dimensional input returns a view."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=differentiable_input)
    change(layer(x)).square().sum().backward()
    expected = layer.weight.grad
    assert expected is not None
    assert expected.norm() > 1.0
    collector = Collector({"layer": layer.requires_grad_(False)})
    with collector.attached():
        y = change(layer(x))
    y.square().sum().backward()
    torch.testing.assert_close(collector.take("layer", 1.0).G, expected)


class Grouped(nn.Linear):
    """Two groups of inputs, each with half of the rows of the weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.stack([input[:, i] @ half.T for i, half in enumerate(self.weight.chunk(2))], dim=1)


def test_layer_that_computes_something_else_is_an_error() -> None:
    layer = Grouped(4, 6, bias=False)
    with (
        Collector({"model.o_proj": layer}).attached(),
        pytest.raises(ModelError, match=r"o_proj of shape \(6, 4\) takes \(5, 2, 4\) to \(5, 2, 3\), which"),
    ):
        layer(torch.randn(5, 2, 4))
