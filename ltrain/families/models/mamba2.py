"""Mamba-2 (Dao and Gu 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.weights import Weight

FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    keys=(
        key("vocab_size", "vocab"),
        key("hidden_size", "hidden"),
        key("num_hidden_layers", "depth"),
        key("layer_norm_epsilon", "norm_eps", default=1e-5),
        key("tie_word_embeddings", "tie_embeddings", default=False),
        key("num_heads", "mamba2.value_heads"),
        key("head_dim", "mamba2.value_dim", default=64),
        key("n_groups", "mamba2.key_heads", default=8),
        key("state_size", "mamba2.key_dim", default=128),
        key("expand", "mamba2.value_heads", default=2, read=lambda _, c: c["num_heads"], write=lambda n, c: c["head_dim"] * n // c["hidden_size"]),
        key("conv_kernel", "mamba2.conv_width", default=4),
        key("use_conv_bias", "mamba2.conv_bias", default=True),
        key("use_bias", "mamba2.bias", default=False),
        tables.step_limits("mamba2"),
    ),
    constants={"hidden_act": "silu"},
    indifferent=("residual_in_fp32", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "chunk_size"),
    length="",
    mixers={"mamba2": Role(mixer="mamba2", fixed={"norm": "group"}, weights=tables.mamba2())},
    ffns={"none": Role(fixed={"experts": 0, "inner": 0}, weights=())},
    roles=lambda config: [("mamba2", "none")] * config["num_hidden_layers"],
    layer="backbone.layers.{layer}.",
    layer_weights=(Weight.same("mixer_norm.weight", "norm.weight"),),
    weights=tables.ends("backbone.embeddings.weight", "backbone.norm_f"),
)
