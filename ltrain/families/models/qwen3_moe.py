"""Qwen3 with mixtures of experts (Qwen team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.models.qwen3 import FAMILY as QWEN3


def roles(config: dict[str, Any]) -> Roles:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(config["num_hidden_layers"])]
    return [("full_attention", "moe" if s else "dense") for s in sparse]


def role_keys(roles: Roles) -> dict[str, Any]:
    return {"mlp_only_layers": [i for i, (_, ffn) in enumerate(roles) if ffn == "dense"], "decoder_sparse_step": 1}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *tables.without(QWEN3.keys, "sliding_window"),
        key("num_experts", "moe.experts", also=("num_local_experts",), default=128),
        key("num_experts_per_tok", "moe.top_k", default=8),
        key("moe_intermediate_size", "moe.inner", default=768),
        key("norm_topk_prob", "moe.renormalise", default=False),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={**QWEN3.constants, "use_sliding_window": False},
    indifferent=("sliding_window", "max_window_layers"),  # read with use_sliding_window only
    mixers={"full_attention": QWEN3.mixers["full_attention"]},
    ffns={
        **QWEN3.ffns,
        "moe": Role(fixed={"score": "softmax", "scale": 1.0, "shared_inner": 0, "bias_rate": 0.0}, weights=(*tables.router(), *tables.experts())),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("mlp_only_layers", "decoder_sparse_step"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
