"""LFM2 with mixtures of experts in all but the first layers (Liquid AI 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.models import lfm2


def roles(config: dict[str, Any]) -> Roles:
    dense = config.get("num_dense_layers", 2)
    return [(mixer, "dense" if i < dense else "moe") for i, mixer in enumerate(config["layer_types"])]


def role_keys(roles: Roles) -> dict[str, Any]:
    return {"layer_types": [mixer for mixer, _ in roles], "num_dense_layers": [ffn for _, ffn in roles].count("dense")}


FAMILY = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    keys=(
        *lfm2.MODEL,
        key("intermediate_size", "dense.inner", default=7168),
        key("num_experts", "moe.experts", default=32),
        key("num_experts_per_tok", "moe.top_k", default=4),
        key("moe_intermediate_size", "moe.inner", default=1792),
        key("norm_topk_prob", "moe.renormalise", default=True),
        key("routed_scaling_factor", "moe.scale", default=1.0),
    ),
    constants={"use_expert_bias": True},
    mixers=lfm2.MIXERS,
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu("feed_forward.", gate="w1", up="w3", down="w2")),
        "moe": Role(
            fixed={"score": "sigmoid", "shared_inner": 0, "router_dtype": "model", "aux_loss": 0.0},
            weights=(
                *tables.router("feed_forward.gate.weight", bias="feed_forward.expert_bias"),
                *tables.experts("feed_forward.experts.", "w1", "w3", "w2"),
            ),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "num_dense_layers"),
    layer_weights=tables.norms("operator_norm", "ffn_norm"),
    weights=tables.ends(norm="model.embedding_norm"),
)
