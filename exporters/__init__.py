"""From an adapter to other forms: merged models, ONNX, other trainers and servers. One file per target.

    lora_weights   the adapter's factors, read from any form it has
    base_model     the model it belongs to, checked to be the right one
    cli            the command `loraone-export`

Every target takes a `BaseModel` and `LoraWeights` and writes a directory or file, whole or not at all.
"""
