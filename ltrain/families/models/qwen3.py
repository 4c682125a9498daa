"""Qwen3, dense (Qwen team 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    depth, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    sliding = config.get("use_sliding_window") and config.get("sliding_window", 4096)
    types = config.get("layer_types") or ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(depth)]
    return [(kind, "dense") for kind in types]


def role_keys(roles: Roles) -> dict[str, Any]:
    types = [mixer for mixer, _ in roles]
    return {"layer_types": types, "use_sliding_window": "sliding_attention" in types}


FIXED = {"gate": "none", "qk_norm": "head"}
WEIGHTS = (*tables.attention(), *tables.qk_norm())
FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        tables.BIAS,
        key("intermediate_size", "dense.inner"),
        tables.window("sliding_attention", 4096),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    mixers={
        "full_attention": Role(mixer="attention", rope=Rope(), fixed={**FIXED, "window": 0}, weights=WEIGHTS),
        "sliding_attention": Role(mixer="attention", rope=Rope(), fixed=FIXED, weights=WEIGHTS),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "use_sliding_window", "max_window_layers"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
