"""Headers of safetensors files: written as the library writes them, read without trust."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraone_init.errors import SafetensorsError
from loraone_init.safetensors_files import TensorSpec, read_header, sort_metadata, write_header, write_streamed

TENSORS = {"b.größe": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_streamed_file_is_the_library_s_byte_for_byte(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "library", metadata={"format": "pt"})
    order = [name for name in read_header(tmp_path / "library")[1] if name in TENSORS]
    specs = {name: TensorSpec(TENSORS[name].dtype, tuple(TENSORS[name].shape)) for name in order}
    num_bytes = write_streamed(tmp_path / "ours", specs, TENSORS.__getitem__)
    assert num_bytes == 30
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_sorted_metadata_change_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    metadata = {f"key {number}": f"“{number}”\n\x7f\x01" for number in reversed(range(20))}
    save_file(TENSORS, file, metadata=metadata)
    size = file.stat().st_size
    sort_metadata(file)
    assert file.stat().st_size == size
    assert list(read_header(file)[1]["__metadata__"]) == sorted(metadata)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())


def test_header_is_read_back(tmp_path: Path) -> None:
    header = {"__metadata__": {"a": "ü"}, "t": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    with open(tmp_path / "a", "wb") as file:
        start = write_header(file, header)
        file.write(b"xy")
    assert start % 8 == 0
    assert read_header(tmp_path / "a") == (start, header)


@pytest.mark.parametrize("kept", [0, 7, 8, 40, 100, -1])
def test_cut_file_is_refused(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SafetensorsError, match=r"a\.safetensors is no whole safetensors file: .*; is it complete\?"):
        read_header(file)


def test_longer_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(SafetensorsError, match="take up 30 bytes by its header, and 34 are there"):
        read_header(file)


def test_absurd_length_is_not_read(tmp_path: Path) -> None:
    """2^63 bytes of header: refused by the file's size, without an attempt to hold them."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(SafetensorsError, match="the header alone has 9,223,372,036,854,775,808"):
        read_header(file)


TENSOR = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
ODD_HEADERS: dict[str, Any] = {
    "not UTF-8": b"\xff\xfe",
    "cut": b"{",
    "nested deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"t": ' + b"9" * 5000 + b"}",
    "a list": [],
    "metadata of numbers": {"__metadata__": {"a": 1}},
    "a list of metadata": {"__metadata__": []},
    "nothing of a tensor": {"t": {}},
    "a number as shape": {"t": TENSOR | {"shape": 2}},
    "a negative size": {"t": TENSOR | {"shape": [-2]}},
    "an end before the start": {"t": TENSOR | {"data_offsets": [2, 0]}},
    "a start before the data": {"t": TENSOR | {"data_offsets": [-2, 2]}},
    "texts as offsets": {"t": TENSOR | {"data_offsets": ["0", "2"]}},
    "three offsets": {"t": TENSOR | {"data_offsets": [0, 2, 2]}},
}


@pytest.mark.parametrize("header", ODD_HEADERS.values(), ids=ODD_HEADERS)
def test_header_of_another_kind_is_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="is no whole safetensors file"):
        read_header(with_header(tmp_path / "a", header, b"xy"))


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match=r"cannot read .*nothing: No such file"):
        read_header(tmp_path / "nothing")
