"""Ling 3.0: Kimi Delta Attention with bounded decays, and latent attention with a gate for each head (Ant Group 2026)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.models.kimi_linear import FAMILY as KIMI_LINEAR
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth, period, dense = config["num_hidden_layers"], config.get("layer_group_size") or 6, config.get("first_k_dense_replace", 2)
    types = config.get("layer_types") or ["linear_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    return list(zip(types, config.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(depth)], strict=True))


def parts(ours: str, names: tuple[str, ...], unit_axes: tuple[int, ...] = ()) -> Weight:
    return Weight(ours, tuple(Theirs(f"attention.{name}.weight", (part,), unit_axes=unit_axes) for part, name in enumerate(names)))


LATENT = tables.without(tables.LATENT_HEADS, "q_lora_rank")
FAMILY = Family(
    model_type="bailing_hybrid",
    architecture="BailingHybridForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "tie_word_embeddings"),
        *tables.rename(LATENT, "*", "full_attention"),
        key("attention_bias", "full_attention.bias", default=False),
        key("linear_num_heads", "linear_attention.key_heads", "linear_attention.value_heads", default=lambda c: c["num_attention_heads"]),
        key("linear_head_dim", "linear_attention.key_dim", "linear_attention.value_dim", default=lambda c: c.get("head_dim", 128)),
        key("short_conv_kernel_size", "linear_attention.conv_width", default=4),
        key(
            "kda_safe_gate",
            "linear_attention.decay_gate",
            default=True,
            read=lambda safe, c: "bounded" if safe else "softplus",
            write=lambda gate, c: gate == "bounded",
        ),
        key(
            "kda_lower_bound",
            "linear_attention.decay_bound",
            default=-5.0,
            read=lambda bound, c: -bound if c.get("kda_safe_gate", True) else 5.0,
            write=lambda bound, c: -bound,
        ),
        key("intermediate_size", "dense.inner"),
        *(k for k in KIMI_LINEAR.keys if k.ours[0].startswith("sparse.")),
    ),
    length="model_max_length",
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False},
    indifferent=("head_dim", "qk_head_dim", "linear_conv_kernel_dim", "num_mtp_layers", "mtp_loss_scaling_factor", "num_nextn_predict_layers"),
    model={"tie_embeddings": False},
    mixers={
        "linear_attention": Role(
            mixer="kda",
            fixed={"decay_rank": 0, "gate_rank": 0},
            weights=(
                parts("input.weight", ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "f_proj")),
                parts("conv", ("q_conv1d", "k_conv1d", "v_conv1d"), (1,)),
                *(Weight.same(name, f"attention.{name}") for name in ("A_log", "dt_bias")),
                Weight.same("norm.weight", "attention.o_norm.weight"),
                Weight.same("out.weight", "attention.dense.weight"),
            ),
        ),
        "full_attention": Role(
            mixer="mla",
            rope=Rope(base=6e6, pairs=True, width="rope_dim"),
            fixed={"q_rank": 0, "gate": "head", "select": "none"},
            weights=(*tables.latent_attention(False, "attention.", "dense"), Weight.same("gate.weight", "attention.g_proj.weight")),
        ),
    },
    ffns={
        "dense": Role(fixed={"experts": 0, "bias": False}, weights=tables.swiglu()),
        "sparse": Role(
            fixed={"score": "sigmoid", "shared_gate": False, "aux_loss": 0.0},
            weights=(*tables.router(bias="mlp.gate.expert_bias"), *tables.experts(), *tables.swiglu("mlp.shared_experts.", "shared.")),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles], "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("layer_types", "mlp_layer_types", "layer_group_size", "first_k_dense_replace", "rope_theta"),
    layer_weights=tables.norms(),
    weights=tables.ends("model.word_embeddings.weight"),
    ignored=("model.layers.{depth}.*",),
)
