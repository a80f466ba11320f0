"""A tiny model with PEFT adapters to train, shared by the tests of the optimizer."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 6)

    def forward(self, tokens):
        return self.second(torch.tanh(self.first(self.embedding(tokens))))


def randomise(model, dtype=torch.float32):
    """Every parameter that is trained drawn anew, so that B is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def peft_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 4, "target_modules": ["first", "second"]} | options))
    return randomise(get_peft_model(Net(), config), dtype)


def loss_of(model, step=0):
    """On data of this step."""
    generator = torch.Generator().manual_seed(step)
    output = model(torch.randint(0, 11, (16,), generator=generator))
    return (output.float() - torch.randn(output.shape, generator=generator)).square().mean()


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def values(model):
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def run(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return values(model)
