"""The fingerprint of a checkpoint says that its weights are the same, and nothing less."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.causal import make_batches
from support.commands import error_line
from support.exports import export

from loraone_init import cache, initialize, open_model
from loraone_init.errors import ModelError
from loraone_init.weights.checkpoint import Checkpoint, same_weights


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_as_the_documentation_says(tmp_path: Path) -> None:
    """docs/format.md, once more by hand."""
    tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    digest = hashlib.sha256()
    for name, dtype, data in (("a", "BF16", b"\x80\x3f" * 3), ("b", "F32", tensors["b"].numpy().tobytes())):
        entry = [name, dtype, list(tensors[name].shape), hashlib.sha256(data).hexdigest()]
        digest.update(json.dumps(entry, separators=(",", ":")).encode())
    assert Checkpoint(save(tmp_path / "a", tensors)).fingerprint() == f"all-bytes:{digest.hexdigest()}"


def test_any_byte_changes_it(tmp_path: Path) -> None:
    """The last of a tensor of several MiB as well as the first."""
    tensors = {"a": torch.zeros(3_000_000), "b": torch.zeros(2)}
    before = Checkpoint(save(tmp_path / "a", tensors)).fingerprint()
    for place in (0, 1_500_000, 2_999_999):
        changed = tensors["a"].clone()
        changed[place] = 1.0
        assert Checkpoint(save(tmp_path / "a", {**tensors, "a": changed})).fingerprint() != before
    assert Checkpoint(save(tmp_path / "a", tensors)).fingerprint() == before


def test_is_computed_once_for_each_state_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file is written to again with the same size, and its time is set back."""
    file = save(tmp_path / "a", {"a": torch.zeros(10)}) / "model.safetensors"
    monkeypatch.setattr(cache, "_SETTLED", -10.0)  # as if the file had been there for a while
    computed: list[int] = []
    assert cache.remembered(file, "test", lambda: computed.append(1) or len(computed)) == 1
    assert cache.remembered(file, "test", lambda: computed.append(1) or len(computed)) == 1
    assert cache.remembered(file, "another", lambda: "x") == "x"
    found = file.stat()
    file.write_bytes(bytes(found.st_size))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert cache.remembered(file, "test", lambda: computed.append(1) or len(computed)) == 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It may be written again within the resolution of the file system's clock."""
    file = save(tmp_path / "a", {"a": torch.zeros(10)}) / "model.safetensors"
    assert [cache.remembered(file, "test", lambda: number) for number in (1, 2)] == [1, 2]  # noqa: B023
    assert not (tmp_path / "cache").exists()


def test_without_a_home_everything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "a", {"a": torch.zeros(10)}) / "model.safetensors"
    monkeypatch.setattr(cache, "_SETTLED", -10.0)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache.remembered(file, "test", lambda: 3) == 3


def test_kinds_are_not_compared_with_each_other() -> None:
    assert same_weights("all-bytes:12", "all-bytes:12") is True
    assert same_weights("all-bytes:12", "all-bytes:13") is False
    assert same_weights("12", "all-bytes:12") is None
    assert same_weights(None, "all-bytes:12") is None


def test_an_older_fingerprint_is_told_and_not_a_mismatch(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.safetensors"
    with safe_open(initialised, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["loraone"])
    record["base"]["fingerprint"] = "0" * 64
    save_file(load_file(initialised), older, metadata | {"loraone": json.dumps(record)})
    done = export("merged", tiny_model, older, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "has a fingerprint of an older kind, which is not compared" in done.stderr


def test_weights_that_are_overwritten_during_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Some of the gradients would be of other weights, and the fingerprint too."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    opened = open_model(str(directory))
    initialize(opened, make_batches(), gamma=128.0)
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(ModelError, match="has been changed while it was in use"):
        initialize(opened, make_batches(), gamma=128.0)


def test_weights_that_are_overwritten_during_an_export(
    tiny_model: Path, initialised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraone_init.exporters import merged

    directory = tmp_path / "model"
    directory.mkdir()
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    write = merged.write_streamed

    def write_and_touch(*arguments: object) -> int:
        os.utime(directory / "model.safetensors", (1, 1))
        return write(*arguments)

    monkeypatch.setattr(merged, "write_streamed", write_and_touch)
    done = export("merged", directory, initialised, "-o", tmp_path / "merged")
    assert done.exit_code == 1
    assert "has been changed while it was in use" in error_line(done.stderr)
    assert not (tmp_path / "merged").exists()


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    """By the next command that takes a GGUF file, also where that needs no conversion any more."""
    from loraone_init.models.sources import _content_key, convert_gguf

    (tmp_path / "a.gguf").write_bytes(b"x")
    directory = tmp_path / "cache" / "loraone-init"
    target, left = directory / f"a-{_content_key(tmp_path / 'a.gguf')}", directory / ".a-0.0123abcd.loraone-partial"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    left.mkdir()
    os.utime(left, (1, 1))
    assert convert_gguf(tmp_path / "a.gguf") == target
    assert [path.name for path in directory.iterdir()] == [target.name]


def test_the_cache_of_gguf_files_goes_by_all_of_a_file(tmp_path: Path) -> None:
    """The middle of a file of 3 MiB too."""
    from loraone_init.models.sources import _content_key

    data = bytearray(3 * 2**20)
    (tmp_path / "a.gguf").write_bytes(data)
    data[len(data) // 2] = 1
    (tmp_path / "b.gguf").write_bytes(data)
    assert _content_key(tmp_path / "a.gguf") != _content_key(tmp_path / "b.gguf")
