"""Qwen3.5's text model with mixtures of experts (Qwen team 2026)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.family import key
from ltrain.families.models.qwen3_5_text import FAMILY as DENSE
from ltrain.families.models.qwen3_5_text import roles
from ltrain.families.models.qwen3_next import FAMILY as QWEN3_NEXT

FAMILY = dataclasses.replace(
    DENSE,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    keys=(
        *tables.without(DENSE.keys, "intermediate_size"),
        key("num_experts", "moe.experts", also=("num_local_experts",), default=256),
        key("num_experts_per_tok", "moe.top_k", default=8),
        key("moe_intermediate_size", "moe.inner", default=512),
        key("shared_expert_intermediate_size", "moe.shared_inner", default=512),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    ffns={"moe": dataclasses.replace(QWEN3_NEXT.ffns["moe"], fixed={**QWEN3_NEXT.ffns["moe"].fixed, "renormalise": True})},
    roles=lambda config: [(mixer, "moe") for mixer, _ in roles(config)],
)
