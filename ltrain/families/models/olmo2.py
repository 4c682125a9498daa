"""OLMo 2: norms after the layers only, and over all heads of queries and keys (OLMo team 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=(*tables.MODEL, *tables.HEADS, tables.BIAS, key("intermediate_size", "dense.inner")),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    model={"block": {"form": "post"}},
    mixers={
        "attention": Role(
            mixer="attention", rope=Rope(), fixed={"gate": "none", "qk_norm": "full"}, weights=(*tables.attention(), *tables.qk_norm())
        ),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=lambda config: [("attention", "dense")] * config["num_hidden_layers"],
    layer_weights=tables.post_norms(),
    weights=tables.ends(),
)
