"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention without positions (Kimi team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth = config["num_hidden_layers"]
    mixers = config.get("layer_types") or ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(depth)]
    ffns = config.get("mlp_layer_types") or ["dense", *["sparse"] * (depth - 1)]
    return list(zip(mixers, ffns, strict=False))


def apart(ours: str, names: tuple[str, ...], unit_axes: tuple[int, ...] = ()) -> Weight:
    """A tensor of ours whose parts are theirs, one after another."""
    return Weight(ours, tuple(Theirs(f"self_attn.{name}.weight", (part,), unit_axes=unit_axes) for part, name in enumerate(names)))


FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.rename(tables.without(tables.LATENT_HEADS, "q_lora_rank"), "*", "full_attention"),
        key("attention_bias", "full_attention.bias", default=False),
        key("linear_num_heads", "linear_attention.key_heads", "linear_attention.value_heads", default=32),
        key(
            "linear_head_dim",
            *(f"linear_attention.{name}" for name in ("key_dim", "value_dim", "decay_rank", "gate_rank")),
            default=128,
        ),
        key("linear_conv_kernel_dim", "linear_attention.conv_width", default=4),
        key("intermediate_size", "dense.inner"),
        key("num_experts", "sparse.experts", also=("num_local_experts",), default=256),
        key("num_experts_per_token", "sparse.top_k", also=("num_experts_per_tok",), default=8),
        key("moe_intermediate_size", "sparse.inner", default=1024),
        key(
            "num_shared_experts",
            "sparse.shared_inner",
            also=("n_shared_experts",),
            default=1,
            read=lambda n, c: n * c["moe_intermediate_size"],
            write=lambda width, c: width // c["moe_intermediate_size"],
        ),
        key("moe_renormalize", "sparse.renormalise", also=("norm_topk_prob",), default=True),
        key("routed_scaling_factor", "sparse.scale", default=2.446),
        key("num_expert_group", "sparse.groups", also=("n_group",), default=1),
        key("topk_group", "sparse.top_groups", default=1),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "q_lora_rank": None},
    indifferent=("head_dim", "qk_head_dim"),
    length="model_max_length",
    mixers={
        "linear_attention": Role(
            mixer="kda",
            fixed={"decay_gate": "softplus", "qk_norm": "l2"},
            weights=(
                apart("input.weight", ("q_proj", "k_proj", "v_proj", "b_proj")),
                apart("conv", ("q_conv1d", "k_conv1d", "v_conv1d"), unit_axes=(1,)),
                Weight.same("decay_down.weight", "self_attn.f_a_proj.weight"),
                Weight.same("decay_up.weight", "self_attn.f_b_proj.weight"),
                Weight.same("dt_bias", "self_attn.dt_bias"),
                Weight.same("A_log", "self_attn.A_log", unit_axes=(0, 1, 3)),
                Weight.same("gate_down.weight", "self_attn.g_a_proj.weight"),
                Weight.same("gate_up.weight", "self_attn.g_b_proj.weight"),
                Weight.same("norm.weight", "self_attn.o_norm.weight"),
                Weight.same("out.weight", "self_attn.o_proj.weight"),
            ),
        ),
        "full_attention": Role(mixer="mla", fixed={"rope": None, "q_rank": 0, "gate": "none"}, weights=tables.latent_attention(False)),
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu("block_sparse_moe.")),
        "sparse": Role(
            fixed={"score": "sigmoid", "shared_gate": False, "aux_loss": 0.0},
            weights=(
                *tables.router("block_sparse_moe.gate.weight", bias="block_sparse_moe.gate.e_score_correction_bias"),
                *tables.experts("block_sparse_moe.experts.", "w1", "w3", "w2"),
                *tables.swiglu("block_sparse_moe.shared_experts.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles], "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("layer_types", "mlp_layer_types"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
