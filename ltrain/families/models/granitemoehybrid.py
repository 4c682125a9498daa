"""Granite 4: Mamba-2 with some layers of attention, multipliers of everything, with experts or without (IBM 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    attention = "rope" if config.get("position_embedding_type") == "rope" else "nope"
    kinds = {"full_attention": attention, "attention": attention, "linear_attention": "mamba2", "mamba": "mamba2"}
    types = config.get("layer_types") or ["linear_attention"] * config["num_hidden_layers"]
    return [(kinds.get(kind, kind), "moe" if config.get("num_local_experts", 8) else "dense") for kind in types]


def role_keys(roles: Roles) -> dict[str, Any]:
    mixers = [mixer for mixer, _ in roles]
    written: dict[str, Any] = {"layer_types": ["linear_attention" if mixer == "mamba2" else "full_attention" for mixer in mixers]}
    return written | {"position_embedding_type": "rope" if "rope" in mixers else None} | ({} if roles[0][1] == "moe" else {"num_local_experts": 0})


def fused(ours: str, theirs: str) -> Weight:
    return Weight(ours, (Theirs(theirs, (0, 1)),), parts=2)


FIXED = {"gate": "none", "qk_norm": "none"}
FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    keys=(
        *tables.MODEL,
        key("embedding_multiplier", "embed_scale", default=1.0),
        key("logits_scaling", "logit_scale", default=1.0, read=lambda scale, c: 1 / scale, write=lambda scale, c: 1 / scale),
        key("residual_multiplier", "block.mixer_scale", "block.ffn_scale", default=1.0),
        key("num_attention_heads", "rope.heads", "nope.heads"),
        key("num_key_value_heads", "rope.kv_heads", "nope.kv_heads", default=lambda c: c["num_attention_heads"]),
        key("head_dim", "rope.head_dim", "nope.head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"]),
        key("attention_bias", "rope.qkv_bias", "rope.out_bias", "nope.qkv_bias", "nope.out_bias", default=False),
        key("attention_multiplier", "rope.scale", "nope.scale", default=1.0),
        *tables.MAMBA2_HEADS,
        tables.step_limits("mamba2"),
        key("intermediate_size", "moe.inner"),
        key("shared_intermediate_size", "moe.shared_inner", "dense.inner", default=1024),
        key("num_local_experts", "moe.experts", default=8),
        key("num_experts_per_tok", "moe.top_k", default=2),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("mamba_chunk_size", "mamba_expand", "init_method", "normalization_function"),
    mixers={
        "mamba2": Role(mixer="mamba2", fixed={"norm": "group"}, weights=tables.mamba2("mamba.")),
        "nope": Role(mixer="attention", fixed={**FIXED, "rope": None}, weights=tables.attention()),
        "rope": Role(mixer="attention", rope=Rope(), fixed=FIXED, weights=tables.attention()),
    },
    ffns={
        "dense": Role(
            fixed={"experts": 0, "bias": False},
            weights=(fused("up.weight", "shared_mlp.input_linear.weight"), Weight.same("down.weight", "shared_mlp.output_linear.weight")),
        ),
        "moe": Role(
            fixed={"score": "softmax", "renormalise": True, "scale": 1.0, "shared_gate": False, "router_dtype": "model", "bias_rate": 0.0},
            weights=(
                *tables.router("block_sparse_moe.router.layer.weight"),
                fused("experts.{expert}.up", "block_sparse_moe.input_linear.weight"),
                Weight.same("experts.{expert}.down", "block_sparse_moe.output_linear.weight"),
                fused("shared.up.weight", "shared_mlp.input_linear.weight"),
                Weight.same("shared.down.weight", "shared_mlp.output_linear.weight"),
            ),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "position_embedding_type", "num_local_experts"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
