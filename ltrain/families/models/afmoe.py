"""Arcee Trinity: three sliding layers with RoPE to one that sees all without, gated, normed on both sides (Arcee AI 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight

TYPES = tables.layer_types(lambda i, config: (i + 1) % (config.get("global_attn_every_n_layers") or 4) != 0)
FIXED = {"gate": "elementwise", "qk_norm": "head", "qkv_bias": False, "out_bias": False}
WEIGHTS = (
    Weight("qkv.weight", tuple(Theirs(f"self_attn.{name}_proj.weight", (part,)) for part, name in enumerate(("q", "k", "v", "gate")))),
    Weight.same("out.weight", "self_attn.o_proj.weight"),
    *tables.qk_norm(),
)


def roles(config: dict[str, Any]) -> Roles:
    dense = config.get("num_dense_layers", 1)
    return [(mixer, "dense" if i < dense else "moe") for i, (mixer, _) in enumerate(TYPES(config))]


FAMILY = Family(
    model_type="afmoe",
    architecture="AfmoeForCausalLM",
    keys=(
        *tables.MODEL,
        key(
            "mup_enabled",
            "embed_scale",
            default=False,
            read=lambda mup, c: c["hidden_size"] ** 0.5 if mup else 1.0,
            write=lambda scale, c: scale != 1,
        ),
        *tables.HEADS,
        tables.window("sliding_attention", 1024),
        key("intermediate_size", "dense.inner"),
        key("num_experts", "moe.experts", also=("num_local_experts",), default=64),
        key("num_experts_per_tok", "moe.top_k", default=6),
        key("moe_intermediate_size", "moe.inner", default=1408),
        tables.shared_experts("num_shared_experts", 2),
        key("route_scale", "moe.scale", default=1.0),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True},
    indifferent=("load_balance_coeff", "num_expert_groups", "num_limited_groups", "use_grouped_mm"),
    mixers={
        "full_attention": Role(mixer="attention", fixed={**FIXED, "rope": None, "window": 0}, weights=WEIGHTS),
        "sliding_attention": Role(mixer="attention", rope=Rope(), fixed=FIXED, weights=WEIGHTS),
    },
    model={"block": {"form": "sandwich"}},
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu()),
        "moe": Role(
            fixed={"score": "sigmoid", "renormalise": True, "shared_gate": False, "router_dtype": "model", "aux_loss": 0.0},
            weights=(
                *tables.router("mlp.router.gate.weight", bias="mlp.expert_bias"),
                *tables.experts(),
                *tables.swiglu("mlp.shared_experts.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {**tables.typed(roles), "num_dense_layers": [ffn for _, ffn in roles].count("dense")},
    role_names=("layer_types", "global_attn_every_n_layers", "num_dense_layers"),
    layer_weights=(*tables.norms(ffn="pre_mlp_layernorm"), *tables.post_norms(ffn="post_mlp_layernorm")),
    weights=tables.ends(),
)
