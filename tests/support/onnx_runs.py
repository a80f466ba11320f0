"""Generation by ONNX Runtime and by PyTorch, for the tests of exported graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

PROMPT = [46484, 553, 216, 33, 34, 13855, 284, 3894, 216, 37, 282, 601, 288]
"""Anna has 12 apples and gives 5 of them to"""

Arrays = dict[str, np.ndarray]


def pytorch_tokens(base: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by the base with the adapter as PEFT computes it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    made = model.eval().generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


def open_graph(folder: Path, name: str = "model.onnx") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "onnx" / name, options, providers=["CPUExecutionProvider"])


def empty_caches(session: onnxruntime.InferenceSession, batch: int) -> Arrays:
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}


def run(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, caches: Arrays) -> Arrays:
    """All outputs by name; positions count the ones of the mask."""
    names = {value.name for value in session.get_inputs()}
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}
    outputs = session.run(None, {name: value for name, value in inputs.items() if name in names})
    return dict(zip((value.name for value in session.get_outputs()), outputs, strict=True))


def onnx_tokens(folder: Path, prompt: list[int], count: int, name: str = "model.onnx") -> list[int]:
    """The greedy continuation by plain ONNX Runtime: one prefill, then one token at a time."""
    session = open_graph(folder, name)
    caches, made, ids = empty_caches(session, 1), [], np.array([prompt])
    while len(made) < count:
        mask = np.ones((1, len(prompt) + len(made)), np.int64)
        outputs = run(session, ids, mask, caches)
        made.append(int(outputs["logits"][0, -1].argmax()))
        ids = np.array([made[-1:]])
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
    return made
