"""GLM-4.5 to 4.7 (GLM team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    dense = config.get("first_k_dense_replace", 1)
    return [("qk_norm" if config.get("use_qk_norm") else "plain", "dense" if i < dense else "moe") for i in range(config["num_hidden_layers"])]


def role_keys(roles: Roles) -> dict[str, Any]:
    return {"first_k_dense_replace": [ffn for _, ffn in roles].count("dense"), "use_qk_norm": roles[0][0] == "qk_norm"}


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        key("attention_bias", "*.qkv_bias", default=False),
        key("intermediate_size", "dense.inner"),
        *tables.SHARED_EXPERTS,
        *tables.GROUPS,
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("num_mtp_layers", "num_nextn_predict_layers"),  # the multi-token-prediction layer, which transformers leaves out too
    mixers={
        name: Role(
            mixer="attention",
            rope=Rope(fraction=0.5),
            fixed={"gate": "none", "qk_norm": "head" if name == "qk_norm" else "none", "out_bias": False},
            weights=(*tables.attention(), *(tables.qk_norm() if name == "qk_norm" else ())),
        )
        for name in ("plain", "qk_norm")
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu()),
        "moe": Role(
            fixed={"score": "sigmoid", "shared_gate": False, "aux_loss": 0.0},
            weights=(
                *tables.router(bias="mlp.gate.e_score_correction_bias"),
                *tables.experts(),
                *tables.swiglu("mlp.shared_experts.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("first_k_dense_replace", "use_qk_norm"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("model.layers.{depth}.*",),
)
