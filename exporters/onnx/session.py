"""Run an exported graph in ONNX Runtime: feed what it asks for by name, carry its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class Session:
    """An ONNX Runtime session on the CPU. Inputs are cast to the types that the graph has.

    adapter: an .onnx_adapter file that is active in every run.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._run_options = onnxruntime.RunOptions()
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()  # kept alive: the runs refer to it
            self._adapter.Load(str(adapter))
            self._run_options.add_active_adapter(self._adapter)
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, in fp32 where they are floating. Values that the graph does not take are left out."""
        feed = {name: v.astype(_DTYPES[self.inputs[name].type]) for name, v in values.items() if name in self.inputs}
        found = zip(self.outputs, self._session.run(None, feed, self._run_options), strict=True)
        return {name: v.astype(np.float32) if v.dtype == np.float16 else v for name, v in found}

    def empty_cache(self, batch: int) -> dict[str, Array]:
        """Keys and values of no positions, where the graph has such inputs."""
        return {
            name: np.zeros([batch, value.shape[1], 0, value.shape[3]], np.float32)
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.")
        }


def causal_inputs(tokens: Array, mask: Array) -> dict[str, Array]:
    """What a causal graph takes besides its cache, for `tokens` (batch, new) at the end of `mask` (batch, total)."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def next_cache(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The cache for the next call."""
    return {
        name.replace("present", "past_key_values", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def greedy(session: Session, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens of highest logits, one after the other, with the cache."""
    tokens = np.array([prompt])
    cache, length, found = session.empty_cache(1), 0, []
    for _ in range(num_tokens):
        length += tokens.shape[1]
        outputs = session.run(causal_inputs(tokens, np.ones((1, length), np.int64)) | cache)
        cache = next_cache(outputs)
        tokens = outputs["logits"][:, -1:].argmax(-1)
        found.append(int(tokens[0, 0]))
    return found
