"""Step 3.5 Flash: three sliding layers, which have more heads, to one that sees all; a gate for each head (StepFun 2026)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Key, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight

SPARSE_FROM = 3  # the first layer with experts, where nothing says which have them


def in_words_of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoints' own spelling: rope by layer, experts by the numbers of their layers, lists that go on over the layers of
    multi-token prediction."""
    config = dict(config)
    depth, further = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    theta, fractions = config.pop("rope_theta", None) or 10000.0, config.pop("partial_rotary_factors", None)
    scaling, scaled = config.pop("rope_scaling", None) or {}, config.pop("yarn_only_types", None) or ["full_attention"]
    sparse = config.pop("moe_layers_enum", None)
    types = (config.get("layer_types") or ["full_attention"] * depth)[:depth]
    config["layer_types"] = types
    if not config.get("mlp_layer_types"):
        listed = range(SPARSE_FROM, depth) if sparse is None else sparse.split(",") if isinstance(sparse, str) else sparse
        experts = {int(layer) for layer in listed}
        config["mlp_layer_types"] = [("dense", "sparse")[i in experts] for i in range(depth)]
    for name in ("mlp_layer_types", "swiglu_limits", "swiglu_limits_shared"):
        if config.get(name) and len(config[name]) == depth + further:
            config[name] = config[name][:depth]
    if not all(isinstance((config.get("rope_parameters") or {}).get(kind), dict) for kind in types):
        config["rope_parameters"] = {
            kind: {
                "rope_theta": theta[types.index(kind)] if isinstance(theta, list) else theta,
                **({"partial_rotary_factor": fractions[types.index(kind)]} if fractions else {}),
                **(scaling if kind in scaled else {}),
            }
            for kind in types
        }
    return config


def roles(config: dict[str, Any]) -> Roles:
    return list(zip(config["layer_types"], config["mlp_layer_types"], strict=True))


def limit(name: str, *ours: str) -> Key:
    """Where the activations of each layer end: null or 0 for nowhere."""

    def nowhere(config: dict[str, Any]) -> list[None]:
        return [None] * int(config["num_hidden_layers"])

    return key(name, *ours, per_layer=True, default=nowhere, read=lambda value, c: float(value or 0), write=lambda value, c: value or None)


def clamp(ours: str, *names: str) -> Key:
    """Of the layers that have one of these limits: after the activation."""

    def clamps(config: dict[str, Any]) -> list[str]:
        limits = [config.get(name) or [None] * config["num_hidden_layers"] for name in names]
        return ["after" if any(values) else "before" for values in zip(*limits, strict=True)]

    return key("", ours, per_layer=True, default=clamps)


FIXED = {"gate": "head", "qk_norm": "head", "qkv_bias": False, "out_bias": False}
WEIGHTS = (
    Weight("qkv.weight", tuple(Theirs(f"self_attn.{name}_proj.weight", (part,)) for part, name in enumerate("qkvg"))),
    Weight.same("out.weight", "self_attn.o_proj.weight"),
    *tables.qk_norm(),
)
FAMILY = Family(
    model_type="step3p5",
    architecture="Step3p5ForCausalLM",
    older=in_words_of_transformers,
    keys=(
        *tables.without(tables.MODEL, "rms_norm_eps"),
        key("rms_norm_eps", "norm_eps", default=1e-5),
        key("num_attention_heads", "full_attention.heads"),
        key(
            "num_sliding_attention_heads",
            "sliding_attention.heads",
            also=("attention_other_setting.num_attention_heads",),
            default=lambda c: c["num_attention_heads"],
        ),
        key("num_key_value_heads", "*.kv_heads", also=("num_attention_groups",), default=8),
        key("head_dim", "*.head_dim", default=128),
        key(
            "query_pre_attn_scalar",
            "*.scale",
            default=lambda c: c.get("head_dim", 128),
            read=lambda width, c: None if width == c.get("head_dim", 128) else width**-0.5,
            write=lambda scale, c: round(scale**-2) if scale else c["head_dim"],
        ),
        key("sliding_window", "sliding_attention.window"),
        key("intermediate_size", "dense.inner"),
        key("n_routed_experts", "sparse.experts", also=("num_local_experts", "moe_num_experts"), default=288),
        key("num_experts_per_tok", "sparse.top_k", also=("moe_top_k",), default=8),
        key("moe_intermediate_size", "sparse.inner", default=1280),
        key("share_expert_dim", "sparse.shared_inner", also=("share_expert_dims",), default=1280),
        key("moe_router_scaling_factor", "sparse.scale", default=1.0),
        key(
            "need_fp32_gate",
            "sparse.router_dtype",
            default=False,
            read=lambda wide, c: "float32" if wide else "model",
            write=lambda dtype, c: dtype == "float32",
        ),
        limit("swiglu_limits", "sparse.limit"),
        limit("swiglu_limits_shared", "sparse.shared_limit", "dense.limit"),
        clamp("sparse.clamp", "swiglu_limits", "swiglu_limits_shared"),
        clamp("dense.clamp", "swiglu_limits_shared"),
    ),
    constants={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "zero_centered": True,
    },
    indifferent=(  # what follows from the rest, and the layers of multi-token prediction
        *("per_layer_config", "att_impl_type", "use_moe", "moe_layer_offset", "moe_every_n_layer", "max_seq_len"),
        *("num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
    ),
    model={"norm": "rms_zero_centred"},
    mixers={
        kind: Role(
            mixer="attention",
            rope=Rope(layer_type=kind, fraction=1.0),
            fixed={**FIXED, "window": 0} if kind == "full_attention" else FIXED,
            weights=WEIGHTS,
        )
        for kind in ("full_attention", "sliding_attention")
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu()),
        "sparse": Role(
            fixed={"score": "sigmoid", "renormalise": True, "shared_gate": False, "aux_loss": 0.0},
            weights=(
                *tables.router("moe.gate.weight", bias="moe.router_bias"),
                # experts lie along the first axis, on the disk too
                Weight("experts.{expert}.up", (Theirs("moe.gate_proj.weight", (0,)), Theirs("moe.up_proj.weight", (1,))), parts=2),
                Weight.same("experts.{expert}.down", "moe.down_proj.weight"),
                *tables.swiglu("share_expert.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {**tables.typed(roles), "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("layer_types", "mlp_layer_types"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("model.layers.{depth}.*",),
)
