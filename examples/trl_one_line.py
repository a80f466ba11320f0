"""TRL's own SFT example with one line more: the LoRA-One start, made when the training begins.

    pip install -c constraints.txt ".[gguf,data,train]" trl
    python examples/trl_one_line.py

Without an argument it is the demo model on the rows of examples/gsm8k.jsonl; the first argument is another model, the
second another .jsonl file with `prompt` and `completion`, `messages` or `text`.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from loraone_init.models import resolve_model
from loraone_init.transformers import LoraOneCallback

model = sys.argv[1] if len(sys.argv) > 1 else resolve_model("demo").opened_from  # a directory, or an id on the hub
rows = load_dataset("json", data_files=sys.argv[2] if len(sys.argv) > 2 else "examples/gsm8k.jsonl", split="train")
if "question" in rows.column_names:
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"})

arguments = SFTConfig(
    "trained", max_length=256, max_steps=20, logging_steps=5, learning_rate=5e-4, bf16=torch.cuda.is_available()
)
start = LoraOneCallback(samples=64)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    peft_config=LoraConfig(r=8, use_rslora=True, target_modules="all-linear"),
    callbacks=[start],
)
trainer.train()
print(start.report.summary() if start.report else "resumed")
