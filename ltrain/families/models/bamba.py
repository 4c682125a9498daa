"""Bamba: Mamba-2 with a layer of attention now and then (IBM, Princeton, CMU, UIUC 2024)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    attention = config.get("attn_layer_indices") or []
    return [("attention" if i in attention else "mamba2", "dense") for i in range(config["num_hidden_layers"])]


FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    keys=(
        *tables.MODEL,
        key("num_attention_heads", "attention.heads"),
        key("num_key_value_heads", "attention.kv_heads", default=8),
        key("head_dim", "attention.head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"]),
        key("attention_bias", "attention.qkv_bias", "attention.out_bias", default=False),
        *tables.MAMBA2_HEADS,
        tables.step_limits("mamba2"),
        key("intermediate_size", "dense.inner"),
        key("mlp_bias", "dense.bias", default=False),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("num_logits_to_keep", "mamba_chunk_size", "mamba_expand", "z_loss_coefficient", "attn_rotary_emb"),
    mixers={
        "mamba2": Role(mixer="mamba2", fixed={"norm": "group"}, weights=tables.mamba2("mamba.")),
        "attention": Role(mixer="attention", rope=Rope(fraction=0.5), fixed={"gate": "none", "qk_norm": "none"}, weights=tables.attention()),
    },
    ffns={"dense": Role(fixed={"experts": 0}, weights=tables.swiglu("feed_forward."))},
    roles=roles,
    role_keys=lambda roles: {"attn_layer_indices": [i for i, (mixer, _) in enumerate(roles) if mixer == "attention"]},
    role_names=("attn_layer_indices",),
    layer_weights=tables.norms(ffn="pre_ff_layernorm"),
    weights=tables.ends(norm="model.final_layernorm"),
)
