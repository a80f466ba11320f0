"""Patterns of PEFT's configurations and of users: right, and never without an end."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from support.causal import make_model
from support.commands import error_line
from support.exports import export, save_base, save_peft

from loraone_init.errors import ConfigError
from loraone_init.layers.patterns import find_value, pattern_of
from loraone_init.layers.targets import select_targets

ENDLESS = r"(.|.\w)+(.|..)+[!?]"
HOURS_FOR_RE = r"(\w+\.?)+!"  # one that Python's own engine does not end with
NAMES = ["model.layers.0.self_attn.q_proj", "layers.10.q_proj", "q_proj", "x.layers.1.mlp.up_proj", "my_q_proj"]
PATTERNS = [
    "q_proj",
    "^q_proj",
    "layers.1.mlp.up_proj",
    r"layers\.\d+\.q_proj",
    ".*proj",
    pattern_of(NAMES[0]),
    "up|q_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_as_peft_matches(name: str, pattern: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert find_value({pattern: True}, name, False) is expected


def test_an_endless_pattern_ends() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="takes too long"):
        find_value({ENDLESS: 4}, "model.layers.0.self_attn.q_proj", 8)
    with pytest.raises(ConfigError, match="takes too long"):
        select_targets(make_model("llama"), ENDLESS)
    assert find_value({HOURS_FOR_RE: 4}, "model.layers.0.self_attn.q_proj.of_a_long_name", 8) == 8
    assert time.monotonic() - started < 20


def test_in_an_adapter_of_others(tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"))
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for pattern, told in ((ENDLESS, "takes too long"), ("(", "is not a regular expression")):
        file.write_text(json.dumps(config | {"alpha_pattern": {pattern: 4}}))
        done = export("merged", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
        assert done.exit_code == 1
        assert told in error_line(done.stderr)
