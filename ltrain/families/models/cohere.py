"""Command R: attention and feed-forward side by side behind one LayerNorm (Cohere 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Weight

FAMILY = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "rms_norm_eps", "tie_word_embeddings"),
        key("layer_norm_eps", "norm_eps", default=1e-5),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        key("logit_scale", "logit_scale", default=0.0625),
        *tables.HEADS,
        tables.BIAS,
        key("intermediate_size", "dense.inner"),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_qk_norm": False},
    model={"norm": "layer", "block": {"form": "parallel"}},
    mixers={
        "attention": Role(mixer="attention", rope=Rope(pairs=True), fixed={"gate": "none", "qk_norm": "none"}, weights=tables.attention()),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu())},
    roles=lambda config: [("attention", "dense")] * config["num_hidden_layers"],
    layer_weights=(Weight.same("norm.weight", "input_layernorm.weight"),),
    weights=tables.ends(),
)
