"""Llama 4's text model: chunks with RoPE, and layers that see all without (Meta 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth, step = config["num_hidden_layers"], config.get("interleave_moe_layer_step") or 1
    rotates = config.get("no_rope_layers") or [(i + 1) % (config.get("no_rope_layer_interval") or 4) for i in range(depth)]  # 1: with RoPE
    types = config.get("layer_types") or ["chunked_attention" if there else "full_attention" for there in rotates]
    sparse = range(step - 1, depth, step) if config.get("moe_layers") is None else config["moe_layers"]
    pairs = zip(types, rotates, strict=True)
    mixers = [kind if bool(there) == (kind == "chunked_attention") else f"{kind} of other positions" for kind, there in pairs]
    return [(mixer, "moe" if i in sparse else "dense") for i, mixer in enumerate(mixers)]


def role_keys(roles: Roles) -> dict[str, Any]:
    sparse = [i for i, (_, ffn) in enumerate(roles) if ffn == "moe"]
    return {**tables.typed(roles), "no_rope_layers": [int(mixer == "chunked_attention") for mixer, _ in roles], "moe_layers": sparse}


def tuned(config: dict[str, Any]) -> bool:
    return bool(config.get("attn_temperature_tuning", True))


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        tables.BIAS,
        key("attention_chunk_size", "chunked_attention.chunk", default=8192),
        key(
            "use_qk_norm",
            "chunked_attention.qk_norm",
            default=True,
            read=lambda there, c: "weightless" if there else "none",
            write=lambda kind, c: kind == "weightless",
        ),
        key("use_qk_norm", "chunked_attention.qk_norm_after_rope", default=True),
        key("attn_scale", "full_attention.temperature", default=0.1, write=lambda scale, c: scale or 0.1),
        key(
            "attn_temperature_tuning",
            "full_attention.temperature",
            default=True,
            read=lambda there, c: c.get("attn_scale", 0.1) if there else 0.0,
            write=lambda scale, c: scale > 0,
        ),
        key("floor_scale", "full_attention.temperature_length", default=8192, read=lambda length, c: int(length) if tuned(c) else 8192),
        key("", "full_attention.temperature_offset", read=lambda _, c: int(tuned(c))),
        key("intermediate_size_mlp", "dense.inner", default=16384),
        key("intermediate_size", "moe.inner", "moe.shared_inner", default=8192),
        key("num_local_experts", "moe.experts", default=16),
        key("num_experts_per_tok", "moe.top_k", default=1),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0},
    mixers={
        "chunked_attention": Role(mixer="attention", rope=Rope(base=5e5, pairs=True), fixed={"gate": "none"}, weights=tables.attention()),
        "full_attention": Role(mixer="attention", fixed={"gate": "none", "qk_norm": "none", "rope": None, "chunk": 0}, weights=tables.attention()),
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu("feed_forward.")),
        "moe": Role(
            fixed={
                "score": "sigmoid",
                "renormalise": False,
                "scale": 1.0,
                "scale_input": True,
                "router_dtype": "model",
                "shared_gate": False,
                "bias_rate": 0.0,
            },
            weights=(
                *tables.router("feed_forward.router.weight"),
                Weight("experts.{expert}.up", (Theirs("feed_forward.experts.gate_up_proj", (0, 1), transposed=True),), parts=2),
                Weight.same("experts.{expert}.down", "feed_forward.experts.down_proj", transposed=True),
                *tables.swiglu("feed_forward.shared_expert.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
