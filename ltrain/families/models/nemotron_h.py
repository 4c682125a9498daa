"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions, experts and dense layers, each a layer of its own (NVIDIA 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.weights import Weight

KINDS = {
    "linear_attention": ("mamba2", "none"),
    "full_attention": ("attention", "none"),
    "moe": ("none", "moe"),
    "mlp": ("none", "mlp"),
}
OLDER = {"mamba": "linear_attention", "M": "linear_attention", "attention": "full_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def roles(config: dict[str, Any]) -> Roles:
    types = config.get("layer_types") or config.get("layers_block_type") or config["hybrid_override_pattern"]
    return [KINDS.get(OLDER.get(kind, kind), (kind, "none")) for kind in types]


def role_keys(roles: Roles) -> dict[str, Any]:
    names = {pair: name for name, pair in KINDS.items()}
    return {"layers_block_type": [names[pair] for pair in roles], "num_hidden_layers": len(roles)}


MIXER_NORM, FFN_NORM = (Weight.same(f"{part}_norm.weight", "norm.weight") for part in ("mixer", "ffn"))
FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    keys=(
        key("vocab_size", "vocab"),
        key("hidden_size", "hidden"),
        key("layer_norm_epsilon", "norm_eps", also=("rms_norm_eps",), default=1e-5),
        key("num_attention_heads", "attention.heads", default=32),
        key("head_dim", "attention.head_dim", default=128),
        key("num_key_value_heads", "attention.kv_heads", default=8),
        key("mamba_num_heads", "mamba2.value_heads", default=128),
        key("mamba_head_dim", "mamba2.value_dim", default=64),
        key("n_groups", "mamba2.key_heads", also=("mamba_n_groups",), default=8),
        key("ssm_state_size", "mamba2.key_dim", default=128),
        key("conv_kernel", "mamba2.conv_width", also=("mamba_d_conv",), default=4),
        key("use_conv_bias", "mamba2.conv_bias", also=("mamba_conv_bias",), default=True),
        key("use_bias", "mamba2.bias", default=False),
        key(
            "time_step_min",
            "mamba2.step_limits",
            also=("mamba_dt_min",),
            default=0.001,
            read=lambda least, c: [least, tables.UNLIMITED],
            write=lambda limits, c: limits[0],
        ),
        key("intermediate_size", "mlp.inner", default=21504),
        key("mlp_bias", "mlp.bias", "moe.bias", default=False),
        key("n_routed_experts", "moe.experts", also=("num_local_experts",), default=8),
        key("num_experts_per_tok", "moe.top_k", default=2),
        key("moe_intermediate_size", "moe.inner", default=7688),
        key("moe_shared_expert_intermediate_size", "moe.shared_inner", default=7688),
        key("moe_latent_size", "moe.latent", default=0, write=lambda width, c: width or None),
        key("norm_topk_prob", "moe.renormalise", default=True),
        key("routed_scaling_factor", "moe.scale", default=1.0),
        *tables.GROUPS,
    ),
    constants={
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    indifferent=(
        *("num_logits_to_keep", "use_mamba_kernels", "time_step_max", "time_step_limit", "time_step_floor", "chunk_size", "mamba_proj_bias"),
        *("mamba_ssm_cache_dtype", "expand", "n_shared_experts", "moe_shared_expert_overlap", "num_nextn_predict_layers", "mtp_layers_block_type"),
        *("residual_in_fp32", "rescale_prenorm_residual", "sliding_window", "partial_rotary_factor", "rope_theta", "mamba_dt_max", "mamba_dt_limit"),
        *("mamba_dt_init_floor", "mamba_expand", "mamba_chunk_size", "mtp_hybrid_override_pattern"),
    ),
    model={"tie_embeddings": False},
    mixers={
        "mamba2": Role(mixer="mamba2", fixed={"norm": "group"}, weights=tables.mamba2("mixer."), layer_weights=(MIXER_NORM,)),
        "attention": Role(
            mixer="attention",
            fixed={"gate": "none", "qk_norm": "none", "rope": None, "qkv_bias": False, "out_bias": False},
            weights=tables.attention("mixer."),
            layer_weights=(MIXER_NORM,),
        ),
        "none": Role(mixer="none", weights=()),
    },
    ffns={
        "none": Role(fixed={"experts": 0, "inner": 0}, weights=()),
        "mlp": Role(
            fixed={"experts": 0, "gated": False, "activation": "relu2"},
            weights=tables.ungated("mixer."),
            layer_weights=(FFN_NORM,),
        ),
        "moe": Role(
            fixed={"score": "sigmoid", "gated": False, "activation": "relu2", "shared_gate": False, "aux_loss": 0.0},
            weights=(
                *tables.router("mixer.gate.weight", bias="mixer.gate.e_score_correction_bias"),
                Weight.same("experts.{expert}.up", "mixer.experts.{expert}.up_proj.weight"),
                Weight.same("experts.{expert}.down", "mixer.experts.{expert}.down_proj.weight"),
                *tables.ungated("mixer.shared_experts.", "shared."),
                Weight.same("latent_down.{leaf}", "mixer.fc1_latent_proj.{leaf}"),
                Weight.same("latent_up.{leaf}", "mixer.fc2_latent_proj.{leaf}"),
            ),
            layer_weights=(FFN_NORM,),
        ),
    },
    roles=roles,
    role_keys=role_keys,
    role_names=("layer_types", "layers_block_type", "hybrid_override_pattern"),
    layer="backbone.layers.{layer}.",
    weights=tables.ends("backbone.embeddings.weight", "backbone.norm_f"),
    ignored=("mtp.*",),
)
