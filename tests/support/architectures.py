"""Tiny encoder-decoders and classifiers, shared by their tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from loraone_init.data.labels import Labels
from support.causal import VOCABULARY, make_word_tokenizer

_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

SEQ2SEQ_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": lambda: T5Config(**_T5, num_heads=4, decoder_start_token_id=0, tie_word_embeddings=True),
    "t5-gated": lambda: T5Config(
        **_T5, num_heads=4, decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-gelu"
    ),
    "bart": lambda: BartConfig(**_BART),
    "mbart": lambda: MBartConfig(**_BART),
}

THREE = Labels(("bad", "good", "so-so"))

CLASSIFIER_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_BERT),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0),
    "llama": lambda: LlamaConfig(**_BERT, num_key_value_heads=2),
    "bart": lambda: BartConfig(**_BART),
}


def make_seq2seq(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return _made(AutoModelForSeq2SeqLM, SEQ2SEQ_CONFIGS[name](), dtype)


def make_classifier(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    config = CLASSIFIER_CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return _made(AutoModelForSequenceClassification, config, dtype)


def _made(auto_class: type, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights that are large enough for the non-linear parts to matter."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model.to(dtype).eval()


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """Words as in `make_word_tokenizer`, between special tokens and with the types of tokens, as BERT has them."""
    inner = make_word_tokenizer().backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="? $A </s>", pair="? $A </s> $B:1 </s>:1", special_tokens=[("?", 2), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="?",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_texts(lengths=(9, 6), rows=2, labels=None, seed=1):
    """Batches with padding in the last row; labels (rows,) of three classes, or what `labels` gives for each batch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 97, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        ids[:, -1] = 1  # the </s> that BART's head looks for
        ids[-1, -2:], mask[-1, -2:], ids[-1, -3] = 0, 0, 1
        target = torch.randint(0, 3, (rows,), generator=generator) if labels is None else labels[index]
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return batches
