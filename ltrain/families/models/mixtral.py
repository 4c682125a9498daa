"""Mixtral (Jiang et al. 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        key("intermediate_size", "moe.inner"),
        tables.window("attention"),
        key("num_local_experts", "moe.experts", default=8),
        key("num_experts_per_tok", "moe.top_k", default=2),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0},
    mixers={
        "attention": Role(
            mixer="attention",
            rope=Rope(base=1e6),
            fixed={"gate": "none", "qk_norm": "none", "qkv_bias": False, "out_bias": False},
            weights=tables.attention(),
        ),
    },
    ffns={
        "moe": Role(
            fixed={"score": "softmax", "renormalise": True, "scale": 1.0, "shared_inner": 0, "bias_rate": 0.0},
            weights=(*tables.router("block_sparse_moe.gate.weight"), *tables.experts("block_sparse_moe.experts.", "w1", "w3", "w2")),
        ),
    },
    roles=lambda config: [("attention", "moe")] * config["num_hidden_layers"],
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
