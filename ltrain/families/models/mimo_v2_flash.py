"""MiMo-V2-Flash: five sliding layers with sinks to one that sees all, with half its K/V heads (Xiaomi 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Weight


def roles(config: dict[str, Any]) -> Roles:
    depth = config["num_hidden_layers"]
    slides = config.get("hybrid_layer_pattern") or [int(i > 0 and (i + 1) % 6 > 0) for i in range(depth)]
    types = config.get("layer_types") or [("full_attention", "sliding_attention")[there] for there in slides]
    sparse = config.get("moe_layer_freq") or [int(i > 0) for i in range(depth)]
    ffns = config.get("mlp_layer_types") or [("dense", "sparse")[there] for there in sparse]
    return list(zip(types, ffns, strict=True))


FIXED = {"gate": "none", "qk_norm": "none", "out_bias": False}
SINKS = Weight.same("sinks", "self_attn.attention_sink_bias")
FAMILY = Family(
    model_type="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "rms_norm_eps"),
        key("rms_norm_eps", "norm_eps", also=("layernorm_epsilon",), default=1e-5),
        *tables.without(tables.HEADS, "num_key_value_heads"),
        key("num_key_value_heads", "full_attention.kv_heads", default=4),
        key("num_key_value_heads", "sliding_attention.kv_heads", default=4, read=lambda heads, c: 2 * heads, write=lambda heads, c: heads // 2),
        key("v_head_dim", "*.value_dim", default=128, read=lambda v, c: 0 if v == c["head_dim"] else v, write=lambda v, c: v or c["head_dim"]),
        key("attention_value_scale", "*.value_scale", default=0.707, nullable=True, read=lambda scale, c: scale or 1.0),
        key("attention_bias", "*.qkv_bias", default=False),
        # older files count the tokens before the token itself
        key(
            "sliding_window",
            "sliding_attention.window",
            default=129,
            read=lambda width, c: c["sliding_window_size"] + 1 if c.get("sliding_window_size") else width,
        ),
        key("intermediate_size", "dense.inner"),
        key("n_routed_experts", "sparse.experts", also=("num_local_experts",), default=256),
        key("num_experts_per_tok", "sparse.top_k", default=8),
        key("moe_intermediate_size", "sparse.inner", default=2048),
        key("norm_topk_prob", "sparse.renormalise", default=True),
        key("routed_scaling_factor", "sparse.scale", default=1.0),
        key("n_group", "sparse.groups", default=1),
        key("topk_group", "sparse.top_groups", default=1),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    indifferent=(  # what follows from the rest
        *("sliding_window_size", "attention_chunk_size", "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
        *("add_full_attention_sink_bias", "add_swa_attention_sink_bias", "attention_projection_layout"),
    ),
    mixers={
        "full_attention": Role(
            mixer="attention",
            rope=Rope(layer_type="full_attention", base=5e6, fraction=0.334),
            fixed={**FIXED, "sinks": False, "window": 0},
            weights=tables.attention(),
        ),
        "sliding_attention": Role(
            mixer="attention",
            rope=Rope(layer_type="sliding_attention", fraction=0.334, theta="swa_rope_theta"),
            fixed={**FIXED, "sinks": True},
            weights=(*tables.attention(), SINKS),
        ),
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu()),
        "sparse": Role(
            fixed={"score": "sigmoid", "shared_inner": 0, "aux_loss": 0.0},
            weights=(*tables.router(bias="mlp.gate.e_score_correction_bias"), *tables.experts()),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {**tables.typed(roles), "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("layer_types", "mlp_layer_types", "hybrid_layer_pattern", "moe_layer_freq"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("model.mtp.*",),
)
