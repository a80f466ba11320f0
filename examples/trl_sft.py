"""Fine-tune with TRL from a LoRA-One start: start, training with the preconditioned optimizer, merged model.

    pip install -c constraints.txt ".[gguf,data,train]" trl
    python examples/trl_sft.py demo examples/gsm8k.jsonl -o sft --max-steps 20
    python examples/trl_sft.py demo examples/gsm8k.jsonl -o sft --max-steps 20 --resume    # if interrupted

In the output directory: `start`, the adapter that the training starts from; `checkpoint-N`; `adapter`, the trained one;
`merged`, the model with the adapter in its weights. Rows have question and answer, or what TRL reads: prompt and
completion, messages, or text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from loraone_init import Adapter, PreconditionedAdamW, initialize
from loraone_init.models import resolve_model


def main() -> None:
    options = parse_arguments()
    output: Path = options.output
    adapter = make_start(options, output / "start")
    print(f"loss before the step {adapter.loss.before:.4f}, after it {adapter.loss.after}")
    trainer = make_trainer(options, adapter, output)
    checkpoint = get_last_checkpoint(str(output)) if options.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output / "adapter"))
    trainer.model.merge_and_unload().save_pretrained(output / "merged")
    trainer.processing_class.save_pretrained(output / "merged")
    print(f"written: {output / 'adapter'}, {output / 'merged'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a hub id, a .gguf file, or demo")
    parser.add_argument("data", help="a .jsonl file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gamma", default="auto", help='a number, or "auto" to search for one (default)')
    parser.add_argument("--samples", type=int, default=64, help="rows for the gradient")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens kept of a row")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    return parser.parse_args()


def make_start(options: argparse.Namespace, directory: Path) -> Adapter:
    """The LoRA-One start, or the one that is there where a training is resumed."""
    if options.resume and directory.is_dir():
        return Adapter.load(directory)
    gamma = "auto" if options.gamma == "auto" else float(options.gamma)
    adapter = initialize(
        options.model,
        options.data,
        rank=options.rank,
        gamma=gamma,
        samples=options.samples,
        max_length=options.max_length,
    )
    adapter.save(directory)
    return adapter


def make_trainer(options: argparse.Namespace, adapter: Adapter, output: Path) -> SFTTrainer:
    base = resolve_model(options.model).opened_from  # the model's directory, or its id on the hub
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(output / "start"), is_trainable=True
    )
    optimizer = PreconditionedAdamW(
        model.parameters(), model, lr=options.learning_rate, weight_decay=0.0, preconditioner=adapter.preconditioner
    )
    arguments = SFTConfig(
        str(output),
        max_steps=options.max_steps,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=options.save_steps,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=read_rows(options.data),
        processing_class=AutoTokenizer.from_pretrained(base),
        optimizers=(optimizer, None),  # None: TRL makes the schedule
    )


def read_rows(path: str) -> Dataset:
    """Rows as TRL takes them, with the same prompts and completions as those of the gradient."""
    rows = load_dataset("json", data_files=path, split="train")
    if {"question", "answer"} <= set(rows.column_names):
        rows = rows.map(as_prompt_and_completion, remove_columns=rows.column_names)
    return rows


def as_prompt_and_completion(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["question"] + "\n", "completion": row["answer"]}


if __name__ == "__main__":
    main()
