"""What every user of the peers writes by hand: prompt and completion to token ids and labels, one row a batch.

One row a batch is the best the peers can get on a CPU: no padding, and the least memory.
"""

import argparse
import json
from pathlib import Path

import torch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help="JSON lines with question and answer")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args()


def read_batches(path: Path, tokenizer, max_length: int) -> list[dict[str, torch.Tensor]]:
    batches = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        ids = tokenizer(row["question"] + "\n" + row["answer"] + tokenizer.eos_token)["input_ids"][:max_length]
        labels = ([-100] * len(prompt) + ids[len(prompt) :])[:max_length]
        batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return batches
