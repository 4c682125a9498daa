"""LFM2: gated short convolutions with a layer of attention now and then (Liquid AI 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Weight


def roles(config: dict[str, Any]) -> Roles:
    attention = config.get("full_attn_idxs") or range(config["num_hidden_layers"])
    types = config.get("layer_types") or ["full_attention" if i in attention else "conv" for i in range(config["num_hidden_layers"])]
    return [(kind, "dense") for kind in types]


def inner(width: int, config: dict[str, Any]) -> int:
    """Of the feed-forward: two thirds of what is written, rounded up, unless that is switched off."""
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int((config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
    multiple = int(config.get("block_multiple_of", 256))
    return -(-width // multiple) * multiple


MODEL = (
    key("vocab_size", "vocab"),
    key("hidden_size", "hidden"),
    key("num_hidden_layers", "depth"),
    key("norm_eps", "norm_eps", default=1e-5),
    key("tie_word_embeddings", "tie_embeddings", also=("tie_embedding",), default=True),
    key("num_attention_heads", "full_attention.heads", default=32),
    key("num_key_value_heads", "full_attention.kv_heads", default=8),
    key("", "full_attention.head_dim", default=lambda c: c["hidden_size"] // c.get("num_attention_heads", 32)),
    key("", "conv.inner", default=lambda c: c["hidden_size"]),
    key("conv_L_cache", "conv.conv_width", default=3),
    key("conv_bias", "conv.bias", default=False),
)
MIXERS = {
    "full_attention": Role(
        mixer="attention",
        rope=Rope(base=1e6),
        fixed={"gate": "none", "qk_norm": "head", "qkv_bias": False, "out_bias": False},
        weights=(*tables.attention(out="out_proj"), *tables.qk_norm(q="q_layernorm", k="k_layernorm")),
    ),
    "conv": Role(
        mixer="gated_conv",
        weights=(
            Weight.same("input.{leaf}", "conv.in_proj.{leaf}"),
            Weight.same("conv", "conv.conv.weight", unit_axes=(1,)),
            Weight.same("conv_bias", "conv.conv.bias"),
            Weight.same("out.{leaf}", "conv.out_proj.{leaf}"),
        ),
    ),
}
FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    keys=(
        *MODEL,
        key("intermediate_size", "dense.inner", also=("block_ff_dim",), default=12288, read=inner),
    ),
    mixers=MIXERS,
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu("feed_forward.", gate="w1", up="w3", down="w2"))},
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles], "block_auto_adjust_ff_dim": False},
    role_names=("layer_types", "full_attn_idxs", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier"),
    layer_weights=tables.norms("operator_norm", "ffn_norm"),
    weights=tables.ends(norm="model.embedding_norm"),
)
