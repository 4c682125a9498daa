"""Mamba (Gu & Dao 2023)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    keys=tables.MAMBA_MODEL,
    constants={"hidden_act": "silu"},
    indifferent=tables.MAMBA_INDIFFERENT,
    mixers={"mamba": Role(mixer="mamba", fixed={"inner_norm": "none"}, weights=tables.selective("mixer."))},
    ffns={"none": Role(fixed={"experts": 0, "inner": 0}, weights=())},
    roles=lambda config: [("mamba", "none")] * (config.get("num_hidden_layers") or config["n_layer"]),
    layer="backbone.layers.{layer}.",
    length="",
    layer_weights=tables.norms("norm"),
    weights=tables.ends("backbone.embeddings.weight", "backbone.norm_f"),
)
