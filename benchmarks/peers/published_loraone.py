"""The published LoRA-One procedure (arXiv 2502.01235, Algorithm 1 and the settings of its reference script).

Whole model in memory, gradients of all parameters accumulated on the host, then for each linear layer
torch.svd_lowrank(q=512, niter=16) and the factors. Written from the paper's description.
"""

import torch
from rows import parse_arguments, read_batches
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GAMMA, Q, ITERATIONS = 128.0, 512, 16

arguments = parse_arguments()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
batches = read_batches(arguments.data, tokenizer, arguments.max_length)

gradients: dict[str, torch.Tensor] = {}
for batch in batches:
    model(**batch, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        part = parameter.grad / len(batches)
        gradients[name] = gradients[name] + part if name in gradients else part
        parameter.grad = None

factors = {}
for name, module in model.named_modules():
    if isinstance(module, nn.Linear) and name != "lm_head":
        G = -gradients[f"{name}.weight"]
        U, S, V = torch.svd_lowrank(G, q=min(Q, *G.shape), niter=ITERATIONS)
        root = (S[: arguments.rank] / S[0] / GAMMA).sqrt()
        factors[f"{name}.lora_B.weight"] = (U[:, : arguments.rank] * root).contiguous()
        factors[f"{name}.lora_A.weight"] = (V[:, : arguments.rank] * root).T.contiguous()
save_file(factors, arguments.output)
