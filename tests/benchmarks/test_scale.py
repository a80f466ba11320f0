"""What benchmarks/scale.py makes of its figures; the figures themselves take it minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scale


def case(ours: float, peft: float) -> dict[str, dict[str, float]]:
    figures = {"seconds": 1.0, "process_mb": 500.0, "runs": 1}
    return {"ours": {**figures, "device_mb": ours}, "peft": {**figures, "device_mb": peft}}


def test_slope_of_a_line() -> None:
    assert scale.slope({4: 10.0, 8: 18.0, 64: 130.0}) == pytest.approx(2.0)


def test_ratio_of_slopes() -> None:
    found = scale.slopes({4: case(10.0, 100.0), 8: case(10.4, 140.0)})
    assert found["ours"] == pytest.approx(0.1)
    assert found["ratio"] == pytest.approx(0.01)


def test_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    by_depth = {4: case(10.0, 100.0), 8: case(10.0, 140.0)}
    result = {"depth": by_depth, "rows": by_depth, "slopes": scale.slopes(by_depth)}
    text = scale.markdown(result)
    assert "| 8 | PEFT lora_ga | 1.0 s | 500 MB | 140.0 MB |" in text
    assert text.endswith("0.00% of it (to reach: 2% at most).")
    scale.draw(json.loads(json.dumps(result)), tmp_path / "scale.png")  # as read from the file
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_rows_have_64_tokens_half_of_them_trained_on() -> None:
    row = scale.make_row(3)
    assert len(row["question"].split()) == 32
    assert len(row["answer"].split()) + 1 == 32
    assert scale.make_row(4) != row
