"""A configuration of any type, made small by the names of its numbers; no type is known by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

VOCABULARY = 256
FIRST_SPECIAL = 120
"""Tokens from this one on are special ones, such as an image's place; words are below."""

HIDDEN, HEADS, LAYERS = 64, 4, 4

_KEY_HEADS = r"(\w+_)?(num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|n_kv_heads|multi_query_group_num)"
_BY_NAME: list[tuple[str, int]] = [
    (r"\w*vocab_size\w*|vocab_offset|\w+_vocab", VOCABULARY),
    (r"additional_vocab_size", 8),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len|model_max_length", 128),
    (r"max_2d_position_embeddings", 1024),
    (r"(num_hidden|n|num|encoder|decoder|num_decoder|num_encoder|text)_layers?|layers", LAYERS),
    (r"n_layers|num_hidden_layers_.*|depth|\w*_depth|num_block(s)?|num_self_attends_per_block", 2),
    (_KEY_HEADS, 2),
    (r"mamba_(n_heads|num_heads)|mamba_nheads", 8),
    (r"linear_num_(key|value)_heads|linear_num_heads", HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|n_heads?|num_heads|heads|num_attention_head)", HEADS),
    (r"qk_nope_head_dim|v_head_dim|kv_lora_rank|q_lora_rank|\w*lora_rank|index_head_dim|d_kv|kv_channels|d_head", 16),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"(\w+_)?(head_dim|d_head|dim_head|head_size|head_dimension)", 16),
    (r"ssm_state_size|state_size|\w*d_state|time_step_rank|\w*dt_rank", 16),
    (r"hidden_size_per_layer_input|laurel_rank|d_rel", 16),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|top_k(_experts)?|num_selected_experts|moe_top_k|router_top_k", 2),
    (r"(num_local|n_routed|num|moe_num|num_routed|n)_experts|ffn_num_experts|moe_num_experts", 4),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups|num_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|insert_layer_id|moe_layer_start_index", 1),
    (r"(attn|expert)_layer_period|\w+_interval|interleave_moe_layer_step|\w+_frequency", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"num_kv_shared_layers", 2),
    (r"(sliding|local)_window(_size)?|attention_chunk_size|window_size|attention_window", 8),
    (r"image_size|input_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|num_image_tokens|image_seq_length|mm_tokens_per_image|num_query_tokens", 16),
]
"""(pattern for the whole name, size); the first that matches counts, and nothing becomes larger by it."""

_WIDTHS = re.compile(r"hidden|width|channels$|(^|_)(dim|size|rank|filters|units|n_embd|d_model|d_ff|emb|ffn)(_|$)")
_NO_WIDTH = re.compile(r"token|kernel|patch|image|chunk|block|batch|window|bins|bucket|type_vocab|stride|expert_cap")
_WIDE = re.compile(r"intermediate|ffn|d_ff|mlp|inner|feed_?forward")
_IDS = re.compile(r"(token_(id|index)|_token|_id|_index)s?$")
_FIXED = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@dataclass(frozen=True)
class Variant:
    """How a configuration is made small, where the plain way is refused.

    same_heads:  as many heads for keys and values as for queries.
    fill:        numbers that the class leaves open by default are set too.
    more:        values by name that some classes want to have set.
    """

    same_heads: bool = False
    fill: bool = False
    more: tuple[tuple[str, Any], ...] = ()


VARIANTS = (
    Variant(),
    Variant(same_heads=True),
    Variant(fill=True),
    Variant(same_heads=True, fill=True),
    Variant(more=(("num_heads", 8),)),
    Variant(more=(("hidden_size", 512), ("out_hidden_size", 512), ("head_dim", 128))),
    Variant(more=(("hidden_size", 256), ("out_hidden_size", 256), ("head_dim", 64))),
    Variant(more=(("num_experts", 16), ("n_routed_experts", 16), ("num_local_experts", 16))),
    Variant(same_heads=True, fill=True, more=(("is_decoder", True), ("n_routed_experts", 4), ("n_shared_experts", 1))),
    Variant(fill=True, more=(("layer_types", ["full_attention"] * LAYERS),)),
    Variant(more=(("vocabulary_map", {"<image>": VOCABULARY - 1, "image": VOCABULARY - 1}),)),
)


def shrink(config: Any, variant: Variant) -> Any:
    """A configuration of the same class with small numbers, its parts likewise."""
    return _Shrinking(variant).shrink(config)


class _Shrinking:
    """One configuration with its parts, which have to agree in the numbers of special tokens."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._specials = iter(range(VOCABULARY - 1, FIRST_SPECIAL, -1))
        self._known: dict[str, int] = {}

    def shrink(self, config: Any) -> Any:
        kind = type(config)
        parts = {name: getattr(config, name, None) for name in getattr(kind, "sub_configs", None) or {}}
        small = {name: self.shrink(part) for name, part in parts.items() if hasattr(part, "sub_configs")}
        numbers = {}
        for name, value in vars(config).items():
            new = None if name in parts else self._small(name, value, config)
            if new is not None:
                numbers[name.lstrip("_")] = new
        if "qk_rope_head_dim" in numbers and getattr(config, "head_dim", None) == config.qk_rope_head_dim:
            numbers["head_dim"] = numbers["qk_rope_head_dim"]  # derived from it
        numbers |= {name: value for name, value in self._variant.more if hasattr(config, name)}
        try:
            return kind(**numbers, **small)
        except Exception:  # some take parts as dicts only; whatever is refused then is told
            return kind(**numbers, **{name: part.to_dict() for name, part in small.items()})

    def _small(self, name: str, value: Any, config: Any) -> Any:
        """The small value of a number, list or dict; None: left as it is."""
        if name == "decoder_start_token_id":
            own = {getattr(config, key, None): token for key, token in _FIXED.items()}
            return own.get(value, 0)
        if name in _FIXED and value is not None:
            return _FIXED[name]
        if isinstance(value, list):
            return self._small_list(name, value, config)
        if isinstance(value, dict) and any(str(key).endswith("section") for key in value):
            return {key: _sections(part) if str(key).endswith("section") else part for key, part in value.items()}
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and self._variant.fill)):
            return None
        return self._number(name, value)

    def _number(self, name: str, value: int | None) -> int | None:
        if value is not None and value <= 0:
            return None
        if _IDS.search(name):
            if value is not None and name not in self._known:
                self._known[name] = next(self._specials)
            return self._known.get(name)
        if self._variant.same_heads and re.fullmatch(_KEY_HEADS, name):
            return HEADS
        for pattern, size in _BY_NAME:
            if re.fullmatch(pattern, name):
                return size if value is None else min(value, size)
        if value is not None and _WIDTHS.search(name) and not _NO_WIDTH.search(name):
            return min(value, 96 if _WIDE.search(name) else HIDDEN)
        return None

    def _small_list(self, name: str, value: list[Any], config: Any) -> list[Any] | None:
        whole = all(isinstance(part, int) and not isinstance(part, bool) for part in value) and bool(value)
        if whole and name.endswith("section"):
            return _sections(value)
        if whole and re.search("feature_layer|ind?exe?s|idxs", name):
            return [-1 - index % 2 if min(value) < 0 else index % 2 for index in range(len(value))]
        layers = getattr(config, "num_hidden_layers", None)
        if name == "layer_types" or len(value) != layers or layers <= LAYERS:
            return None
        if whole:
            return [self._number(name, part) or part for part in value[:LAYERS]]
        return value[:LAYERS]


def _sections(sections: list[int]) -> list[int]:
    """Sections of a rotary embedding in much the same ratio, for heads of 16."""
    small = [max(1, 8 * part // sum(sections)) for part in sections]
    return [8 - sum(small[1:]), *small[1:]]
