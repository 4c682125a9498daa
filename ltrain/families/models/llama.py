"""Llama 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024), and what shares its model_type."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        tables.BIAS,
        key("intermediate_size", "dense.inner"),
        key("mlp_bias", "dense.bias", default=False),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    mixers={
        "attention": Role(mixer="attention", rope=Rope(), fixed={"gate": "none", "qk_norm": "none"}, weights=tables.attention()),
    },
    ffns={"dense": Role(fixed={"experts": 0}, weights=tables.swiglu())},
    roles=lambda config: [("attention", "dense")] * config["num_hidden_layers"],
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("*.rotary_emb.inv_freq",),  # a buffer that old versions saved
)
