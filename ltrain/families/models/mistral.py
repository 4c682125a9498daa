"""Mistral 7B and after (Jiang et al. 2023)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(*tables.MODEL, *tables.HEADS, key("intermediate_size", "dense.inner"), tables.window("attention", 4096)),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    mixers={
        "attention": Role(
            mixer="attention",
            rope=Rope(),
            fixed={"gate": "none", "qk_norm": "none", "qkv_bias": False, "out_bias": False},
            weights=tables.attention(),
        ),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=lambda config: [("attention", "dense")] * config["num_hidden_layers"],
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
