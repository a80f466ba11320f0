"""PEFT's lora_ga as its documentation has it: preprocess_loraga, then get_peft_model; the adapter is saved."""

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga
from rows import parse_arguments, read_batches
from transformers import AutoModelForCausalLM, AutoTokenizer

arguments = parse_arguments()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
batches = read_batches(arguments.data, tokenizer, arguments.max_length)


def train_step() -> None:
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()  # PEFT divides by the number of calls


config = LoraConfig(
    r=arguments.rank,
    lora_alpha=16,
    use_rslora=True,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
    init_lora_weights="lora_ga",
    lora_ga_config=LoraGAConfig(),
)
preprocess_loraga(model, config, train_step)
get_peft_model(model, config).save_pretrained(arguments.output)
