"""What `loraone-inspect` finds in an adapter, and how it compares two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraone_init import Adapter, LoraPair
from loraone_init.errors import AdapterError
from loraone_init.inspection.comparison import compare_adapters
from loraone_init.inspection.facts import by_depth, by_kind, delta_spectrum, find_anomalies, layer_facts
from loraone_init.inspection.layer_names import Place, place_of, short_kinds

ANGLE = 1e-5  # degrees, in fp64 from fp32 factors
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def adapter(initialised: Path) -> Adapter:
    return Adapter.load(initialised)


def with_report(adapter: Adapter, name: str, **changes: object) -> Adapter:
    return replace(adapter, layers={**adapter.layers, name: replace(adapter.layers[name], **changes)})


def with_pair(adapter: Adapter, name: str, pair: LoraPair) -> Adapter:
    return replace(adapter, pairs={**adapter.pairs, name: pair})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", Place("model.layers", 3, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", Place("transformer.h", 11, "attn.c_attn")),
        ("decoder.block.2.layer.1.EncDecAttention.k", Place("decoder.block", 2, "layer.1.EncDecAttention.k")),
        ("model.layers.0.mlp.experts.down_proj.5", Place("model.layers", 0, "mlp.experts.down_proj")),
        ("model.decoder.project_in", Place("", None, "model.decoder.project_in")),
    ],
)
def test_place_of_a_layer(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_short_names_tell_kinds_apart() -> None:
    kinds = ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "mlp.wi"]
    assert list(short_kinds(kinds).values()) == [*kinds[:2], "wi"]


def test_groups_hold_every_layer_once(adapter: Adapter) -> None:
    facts = layer_facts(adapter)
    assert sorted(fact.name for group in by_kind(facts).values() for fact in group) == sorted(adapter.layers)
    assert {depth for _, depth in by_depth(facts)} == {0, 1, 2}
    assert all(len(group) == 7 for group in by_depth(facts).values())


def test_delta_spectrum_is_that_of_the_whole_update() -> None:
    pair = LoraPair(torch.randn(4, 30), torch.randn(20, 4))
    whole = torch.linalg.svdvals(0.7 * pair.B.double() @ pair.A.double())
    torch.testing.assert_close(torch.tensor(delta_spectrum(pair, 0.7)).double(), whole[:4], rtol=1e-6, atol=1e-9)


def test_first_step_has_the_length_that_gamma_gives(adapter: Adapter) -> None:
    """s/γ in every layer."""
    for fact in layer_facts(adapter):
        assert fact.step[0] == pytest.approx(adapter.config.scale / adapter.config.gamma, rel=1e-5)


def test_energy_at_full_rank_is_what_is_captured(adapter: Adapter) -> None:
    for fact in layer_facts(adapter):
        assert fact.energy_at(adapter.config.rank) == pytest.approx(fact.report.captured_energy, abs=1e-5)
        assert fact.energy_at(1) < fact.energy_at(2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"init": "standard", "rank": 0}, "gradient is zero"),
        ({"init": "partial", "rank": 3}, "rank 3, less than 8"),
        ({"sine": 0.5}, "sin∠ ≤ 5.0e-01"),
        ({"captured_energy": 0.3}, "30% of"),
        ({"gradient_norm": 1e6}, "times the median of self_attn.q_proj"),
    ],
)
def test_what_is_odd_is_said_of_its_layer(changes: dict[str, object], told: str, adapter: Adapter) -> None:
    before = {(anomaly.layer, anomaly.text) for anomaly in find_anomalies(layer_facts(adapter))}
    after = find_anomalies(layer_facts(with_report(adapter, Q_PROJ, **changes)))
    new = [anomaly for anomaly in after if (anomaly.layer, anomaly.text) not in before]
    assert [anomaly.layer for anomaly in new] == [Q_PROJ]
    assert told in new[0].text


def test_gravest_come_first(adapter: Adapter) -> None:
    odd = with_report(adapter, Q_PROJ, captured_energy=0.1)
    odd = with_report(odd, "model.layers.2.mlp.up_proj", init="standard", rank=0)
    layers = [anomaly.layer for anomaly in find_anomalies(layer_facts(odd))]
    assert layers.index("model.layers.2.mlp.up_proj") < layers.index(Q_PROJ)


def test_an_adapter_agrees_with_itself(adapter: Adapter) -> None:
    for both in compare_adapters(adapter, adapter).layers.values():
        assert max(both.output_angles + both.input_angles) < ANGLE
        assert (both.cosine, both.ratio) == pytest.approx((1.0, 1.0), abs=1e-9)


def test_turned_factors_span_the_same_and_a_flipped_sign_is_seen(adapter: Adapter) -> None:
    Q = torch.linalg.qr(torch.randn(8, 8)).Q
    pair = adapter.pairs[Q_PROJ]
    turned = with_pair(adapter, Q_PROJ, LoraPair(-2 * Q.T @ pair.A, pair.B @ Q))
    both = compare_adapters(adapter, turned).layers[Q_PROJ]
    assert max(both.output_angles + both.input_angles) < 1e-2  # the turn is in fp32
    assert (both.cosine, both.ratio) == pytest.approx((-1.0, 2.0), abs=1e-4)


def test_independent_directions_are_far_apart(adapter: Adapter) -> None:
    pair = LoraPair(torch.randn(8, 32), torch.randn(32, 8))
    both = compare_adapters(adapter, with_pair(adapter, Q_PROJ, pair)).layers[Q_PROJ]
    assert both.output_angles[-1] > 60
    assert abs(both.cosine) < 0.5


def test_layers_of_one_only_are_told(adapter: Adapter) -> None:
    fewer = replace(adapter, pairs={k: v for k, v in adapter.pairs.items() if k != Q_PROJ})
    assert compare_adapters(adapter, fewer).only_first == (Q_PROJ,)
    assert compare_adapters(fewer, adapter).only_second == (Q_PROJ,)


def test_other_models_are_refused(adapter: Adapter) -> None:
    renamed = replace(adapter, pairs={f"x.{name}": pair for name, pair in adapter.pairs.items()})
    with pytest.raises(AdapterError, match="no layer in common"):
        compare_adapters(adapter, renamed)
    reshaped = with_pair(adapter, Q_PROJ, LoraPair(torch.zeros(8, 31), torch.zeros(32, 8)))
    with pytest.raises(AdapterError, match=rf"{Q_PROJ} has shape \(32, 32\) here and \(32, 31\) there"):
        compare_adapters(adapter, reshaped)
