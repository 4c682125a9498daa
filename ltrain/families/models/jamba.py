"""Jamba: seven Mamba layers to one of attention without positions, experts in every second (Lieber et al. 2024)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key

ATTENTION = {"gate": "none", "qk_norm": "none", "qkv_bias": False, "out_bias": False, "rope": None}


def roles(config: dict[str, Any]) -> Roles:
    def every(part: str, period: int, offset: int) -> list[bool]:
        period, offset = config.get(f"{part}_layer_period") or period, config.get(f"{part}_layer_offset", offset)
        return [i % period == offset for i in range(config["num_hidden_layers"])]

    experts = config.get("num_experts", 16) > 1
    return [
        ("attention" if attends else "mamba", "moe" if routed and experts else "dense")
        for attends, routed in zip(every("attn", 8, 4), every("expert", 2, 1), strict=True)
    ]


def role_keys(roles: Roles) -> dict[str, Any]:
    """The periods that give these roles; some that give others, which the export then refuses, where none do."""

    def every(part: str, there: list[bool]) -> dict[str, int]:
        depth, first = len(there), there.index(True) if any(there) else len(there)
        periods = [p for p in range(1, depth + 1) if there == [i % p == first % p and i >= first for i in range(depth)] and first < p]
        return {f"{part}_layer_period": periods[0] if periods else depth + 1, f"{part}_layer_offset": first}

    return {
        **every("attn", [mixer == "attention" for mixer, _ in roles]),
        **every("expert", [ffn == "moe" for _, ffn in roles]),
    }


FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    keys=(
        *tables.MODEL,
        key("num_attention_heads", "attention.heads"),
        key("num_key_value_heads", "attention.kv_heads", default=8),
        key("", "attention.head_dim", read=lambda _, c: c["hidden_size"] // c["num_attention_heads"]),
        key("mamba_expand", "mamba.inner", default=2, read=lambda e, c: int(e * c["hidden_size"]), write=lambda inner, c: inner // c["hidden_size"]),
        key("mamba_d_state", "mamba.states", default=16),
        key("mamba_d_conv", "mamba.conv_width", default=4),
        key("mamba_dt_rank", "mamba.step_rank", default="auto", read=lambda rank, c: -(-c["hidden_size"] // 16) if rank == "auto" else rank),
        key("mamba_conv_bias", "mamba.conv_bias", default=True),
        key("mamba_proj_bias", "mamba.bias", default=False),
        key("intermediate_size", "dense.inner", "moe.inner"),
        key("num_experts", "moe.experts", default=16),
        key("num_experts_per_tok", "moe.top_k", default=2),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None},
    indifferent=("use_associative_scan", "use_mambapy", "use_mamba_kernels", "calc_logits_for_entire_prompt", "num_logits_to_keep"),
    mixers={
        "attention": Role(mixer="attention", fixed=ATTENTION, weights=tables.attention()),
        "mamba": Role(mixer="mamba", fixed={"inner_norm": "weighted"}, weights=tables.selective("mamba.", norms=True)),
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu("feed_forward.")),
        "moe": Role(
            fixed={"score": "softmax", "renormalise": False, "scale": 1.0, "shared_inner": 0, "bias_rate": 0.0},
            weights=(*tables.router("feed_forward.router.weight"), *tables.experts("feed_forward.experts.")),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
    layer_weights=tables.norms(ffn="pre_ff_layernorm"),
    weights=tables.ends(norm="model.final_layernorm"),
)
