"""From an adapter to other forms: merged models, ONNX, other trainers and servers. One file per target.

    lora_weights   the adapter's factors, read from any form it has
    base_model     the model it belongs to, checked to be the right one
    onnx/          graphs for ONNX Runtime

The command is `loraone_init.cli.export`. May import all of loraone_init but its commands.

Every target takes a `BaseModel` and `LoraWeights` and writes a directory or file, whole or not at all.
"""
