"""SmolLM3: every fourth layer without positions (Bakouch et al. 2025; NoPE: Yang et al. 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    depth, period = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    rotates = config.get("no_rope_layers") or [(i + 1) % period for i in range(depth)]  # 1: with RoPE
    return [("rope" if there else "nope", "dense") for there in rotates]


FIXED = {"gate": "none", "qk_norm": "none"}
FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "tie_word_embeddings"),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        *tables.HEADS,
        tables.BIAS,
        key("intermediate_size", "dense.inner"),
        key("mlp_bias", "dense.bias", default=False),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False},
    indifferent=("sliding_window", "layer_types"),  # read with use_sliding_window only
    mixers={
        "nope": Role(mixer="attention", fixed={**FIXED, "rope": None}, weights=tables.attention()),
        "rope": Role(mixer="attention", rope=Rope(base=2e6), fixed=FIXED, weights=tables.attention()),
    },
    ffns={"dense": Role(fixed={"experts": 0}, weights=tables.swiglu())},
    roles=roles,
    role_keys=lambda roles: {"no_rope_layers": [int(mixer == "rope") for mixer, _ in roles]},
    role_names=("no_rope_layers", "no_rope_layer_interval"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
