"""Which files a merged model consists of, and which of the base's directory are copied."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.causal import relative_error
from support.commands import content, error_line
from support.exports import ROUNDING, export, logits_of, peft_logits, save_base, save_peft
from transformers import AutoModelForCausalLM

INDEX = "model.safetensors.index.json"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base of several shards, and an adapter of it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base, max_shard_size="60KB"))
    return base, adapter


def test_shards_of_one_name_in_several_folders(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    index = json.loads((base / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    for number, shard in enumerate(shards):
        (base / f"part{number}").mkdir()
        (base / shard).rename(base / f"part{number}" / "model.safetensors")
    places = {shard: f"part{number}/model.safetensors" for number, shard in enumerate(shards)}
    weight_map = {name: places[shard] for name, shard in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    assert export("merged", base, adapter, "-o", tmp_path / "merged").exit_code == 0
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert relative_error(logits_of(merged), peft_logits(base, adapter)) < ROUNDING


@pytest.mark.parametrize("left", ["model-00001-of-00002.safetensors", INDEX, "adapter_config.json"])
def test_weights_of_another_layout_are_not_left_beside_the_new(left: str, tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    save_peft(adapter, save_base(base))
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    assert export("merged", base, adapter, "-o", merged, "--overwrite", "--dtype", "bf16").exit_code == 0
    (merged / left).write_bytes(b"{}")
    before = content(merged)
    result = export("merged", base, adapter, "-o", merged, "--overwrite")
    assert result.exit_code == 1
    assert f"{merged / left} would stay beside the merged weights" in error_line(result.stderr)
    assert content(merged) == before


@pytest.mark.parametrize("place", ["../secret.safetensors", "/secret.safetensors"])
def test_index_that_leads_out_of_the_directory(place: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    index = json.loads((base / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    (base / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {first: place}}))
    result = export("merged", base, adapter, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert f"names {place}, a file outside of the model directory" in error_line(result.stderr)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_links_to_private_files_are_not_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "id_rsa").write_text("private")
    (base / "notes.txt").symlink_to(tmp_path / "id_rsa")
    result = export("merged", base, adapter, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert "outside of the model directory; it is not copied" in error_line(result.stderr)
    assert not (tmp_path / "merged").exists()
    (base / "notes.txt").unlink()
    os.mkfifo(base / "notes.txt")
    result = export("merged", base, adapter, "-o", tmp_path / "merged")
    assert "is no file that can be copied" in error_line(result.stderr)


def test_links_of_the_hubs_cache_are_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert export("merged", snapshot, adapter, "-o", tmp_path / "merged").exit_code == 0
    assert (tmp_path / "merged" / "generation_config.json").is_file()
