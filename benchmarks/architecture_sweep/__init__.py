"""Every type of model that transformers lists, tiny and random, through the whole of loraone-init and PEFT."""
