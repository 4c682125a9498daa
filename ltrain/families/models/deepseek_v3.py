"""DeepSeek-V3 and R1 (DeepSeek-AI 2024), and Kimi K2 (Kimi team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    dense, mixer = config.get("first_k_dense_replace", 3), "compressed" if config.get("q_lora_rank", 1536) else "plain"
    return [(mixer, "dense" if i < dense else "moe") for i in range(config["num_hidden_layers"])]


def role_keys(roles: Roles) -> dict[str, Any]:
    plain = {"q_lora_rank": None} if roles[0][0] == "plain" else {}
    return {"first_k_dense_replace": [ffn for _, ffn in roles].count("dense"), **plain}


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.LATENT_HEADS,
        key("attention_bias", "*.bias", default=False),
        key("rope_interleave", "*.rope.pairs", default=True),
        key("intermediate_size", "dense.inner"),
        *tables.SHARED_EXPERTS,
        *tables.GROUPS,
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    # of the multi-token-prediction layers, which transformers leaves out too, and what others than transformers read
    indifferent=(
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "moe_layer_freq",
        "ep_size",
        "scoring_func",
        "topk_method",
        "seq_aux",
        "head_dim",
        "qk_head_dim",
    ),
    mixers={
        # the first that fits is a layer's on export
        "plain": Role(mixer="mla", rope=Rope(width="rope_dim"), fixed={"q_rank": 0, "gate": "none"}, weights=tables.latent_attention(False)),
        "compressed": Role(mixer="mla", rope=Rope(width="rope_dim"), fixed={"gate": "none"}, weights=tables.latent_attention(True)),
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
    role_names=("first_k_dense_replace",),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("model.layers.{depth}.*",),
)
