"""MiniMax M2 and M2.5: softmax attention alone, with norms over all heads (MiniMax 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def rotating(config: dict[str, Any]) -> float:
    """The share of a head, where an older config.json counts its numbers."""
    return float(config["rotary_dim"] / config["head_dim"]) if config.get("rotary_dim") else 1.0


def roles(config: dict[str, Any]) -> Roles:
    types = config.get("attn_type_list") or [1] * config["num_hidden_layers"]
    return [("attention" if kind == 1 else "lightning", "moe") for kind in types]


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        key("intermediate_size", "moe.inner", default=1536),
        key("num_local_experts", "moe.experts", default=256),
        key("num_experts_per_tok", "moe.top_k", default=8),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
    },
    indifferent=("rotary_dim", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"),  # the first is read by `rotating`
    mixers={
        "attention": Role(
            mixer="attention",
            rope=Rope(base=5e6, fraction=rotating),
            fixed={"gate": "none", "qk_norm": "full", "qkv_bias": False, "out_bias": False},
            weights=(*tables.attention(), *tables.qk_norm()),
        ),
    },
    ffns={
        "moe": Role(
            fixed={"score": "sigmoid", "renormalise": True, "scale": 1.0, "shared_inner": 0, "router_dtype": "model"},
            weights=(
                *tables.router("block_sparse_moe.gate.weight", bias="block_sparse_moe.e_score_correction_bias"),
                *tables.experts("block_sparse_moe.experts.", "w1", "w3", "w2"),
            ),
        ),
    },
    roles=roles,
    role_names=("attn_type_list",),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
