"""Mistral Small 4 and Large 3: latent attention with YaRN, whose queries grow with the logarithm of their position (Mistral AI 2026)."""

import dataclasses
from typing import Any

from ltrain.families import tables
from ltrain.families.family import Role, Roles, key
from ltrain.families.models import deepseek_v3
from ltrain.families.models.deepseek_v3 import FAMILY as DEEPSEEK_V3
from ltrain.families.rope import Rope
from ltrain.families.weights import Weight


def roles(config: dict[str, Any]) -> Roles:
    return deepseek_v3.roles({"first_k_dense_replace": 0, "q_lora_rank": 1024, **config})


ROPE = Rope(width="rope_dim", whole=True)
BETA = "rope_parameters.llama_4_scaling_beta"
FAMILY = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="mistral4",
    architecture="Mistral4ForCausalLM",
    keys=(
        *DEEPSEEK_V3.keys,
        key(BETA, "*.temperature", default=0.0),
        key("", "*.temperature_length", read=lambda _, c: tables.temperature_length(c)),
    ),
    indifferent=("rope_parameters.max_position_embeddings", "rope_parameters.partial_rotary_factor", "head_dim", "qk_head_dim"),
    mixers={name: dataclasses.replace(role, rope=ROPE) for name, role in DEEPSEEK_V3.mixers.items()},
    ffns={
        "dense": DEEPSEEK_V3.ffns["dense"],
        "moe": Role(
            fixed={"score": "softmax", "shared_gate": False, "router_dtype": "model", "aux_loss": 0.0, "bias_rate": 0.0},
            weights=(
                *tables.router(),
                Weight.same("experts.{expert}.up", "mlp.experts.gate_up_proj"),
                Weight.same("experts.{expert}.down", "mlp.experts.down_proj"),
                *tables.swiglu("mlp.shared_experts.", "shared."),
            ),
        ),
    },
    roles=roles,
)
