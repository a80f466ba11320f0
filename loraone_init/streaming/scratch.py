"""A temporary file that holds tensors for a while. It has no name, so that nothing is left of it however a run ends."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from ..errors import ResourceError

_ON_DISK = Path("/var/tmp")  # /tmp is kept in memory on many systems, and this file is there to save memory


class ScratchFile:
    """Bytes at offsets of an anonymous file in TMPDIR, or else in /var/tmp where there is one."""

    def __init__(self) -> None:
        named = os.environ.get("TMPDIR")
        self._directory = named or (str(_ON_DISK) if _ON_DISK.is_dir() else tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._directory)  # noqa: SIM115
        except OSError as error:
            raise self._error("make a temporary file", error) from error
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def write(self, data: torch.Tensor) -> int:
        """Store a flat tensor of the CPU; the offset to read it from."""
        content = _bytes(data)
        size = len(content)
        offset = self._free[size].pop() if self._free[size] else self._end
        self._end = max(self._end, offset + size)
        try:
            self._file.seek(offset)
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise self._error("keep block inputs", error) from error
        return offset

    def read(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The flat tensor (numel,) that was stored there."""
        data = torch.empty(numel, dtype=dtype)
        rest = _bytes(data)
        try:
            self._file.seek(offset)
            while rest:
                num_read = self._file.readinto(rest)
                if not num_read:
                    raise OSError("the file ends too early")
                rest = rest[num_read:]
        except OSError as error:
            raise self._error("read block inputs back", error) from error
        return data

    def free(self, offset: int, nbytes: int) -> None:
        """These bytes are not needed any more; tensors of the same size may take their place."""
        self._free[nbytes].append(offset)

    def close(self) -> None:
        self._file.close()

    def _error(self, what: str, error: OSError) -> ResourceError:
        return ResourceError(
            f"cannot {what} in {self._directory}: {error.strerror or error}; set TMPDIR to a directory with more room,"
            " or lower `samples`"
        )


def _bytes(flat: torch.Tensor) -> memoryview:
    """A tensor's memory, while the tensor lives.

    Not through numpy: the storage of a tensor that was given to it can never be emptied again, as `Answer.rest` does.
    """
    return memoryview((ctypes.c_ubyte * flat.nbytes).from_address(flat.data_ptr())).cast("B")
