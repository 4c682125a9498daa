"""Zamba2: Mamba-2, and attention blocks that layers share, on hidden states and embeddings, with adapters (Glorioso et al. 2024)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, Shared, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight

KINDS = {"linear_attention": "mamba2", "mamba": "mamba2", "hybrid": "hybrid"}
ROTARY = ("nope", "rope")  # by use_mem_rope: what the shared blocks' attention is


def roles(config: dict[str, Any]) -> Roles:
    types = config.get("layers_block_type") or config["layer_types"]
    return [*((KINDS.get(kind, kind), "none") for kind in types), (ROTARY[bool(config.get("use_mem_rope"))], "dense")]


def role_keys(roles: Roles) -> dict[str, Any]:
    *layers, (attention, _) = roles
    types = ["hybrid" if mixer == "hybrid" else "linear_attention" for mixer, _ in layers]
    return {"layers_block_type": types, "use_mem_rope": attention == "rope"}


def head_width(config: dict[str, Any]) -> int:
    """Of the mixers of Mamba-2."""
    return int(config.get("mamba_expand", 2) * config["hidden_size"]) // int(config.get("n_mamba_heads", 8))


def expand(width: int, config: dict[str, Any]) -> float:
    found = width * config["n_mamba_heads"] / config["hidden_size"]
    return int(found) if found == int(found) else found


BARE = {"gate": "none", "qk_norm": "none", "qkv_bias": False, "out_bias": False}
NORMS = tables.norms("input_layernorm", "pre_ff_layernorm")
QKV = tuple(f"self_attn.linear_{name}" for name in "qkv")
FAMILY = Family(
    model_type="zamba2",
    architecture="Zamba2ForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "tie_word_embeddings"),  # without it transformers unties the shared blocks too
        key("num_attention_heads", "nope.heads", "rope.heads"),
        key("num_key_value_heads", "nope.kv_heads", "rope.kv_heads", default=lambda c: c["num_attention_heads"]),
        key("", "nope.head_dim", "rope.head_dim", default=lambda c: 2 * c["hidden_size"] // c["num_attention_heads"]),
        key("", "nope.scale", "rope.scale", default=lambda c: (c["hidden_size"] / c["num_attention_heads"]) ** -0.5),
        key("n_mamba_heads", "*.value_heads", default=8),
        key("mamba_expand", "mamba2.value_dim", "hybrid.value_dim", default=2, read=lambda e, c: head_width(c), write=expand),
        key("mamba_ngroups", "*.key_heads", default=1),
        key("mamba_d_state", "*.key_dim", default=64),
        key("mamba_d_conv", "*.conv_width", default=4),
        key(
            "time_step_min",
            "*.step_limits",
            default=0.001,
            read=lambda least, c: [least, tables.UNLIMITED],
            write=lambda limits, c: limits[0],
        ),
        key("add_bias_linear", "*.bias", "dense.bias", default=False),
        key("intermediate_size", "dense.inner", default=lambda c: 4 * c["hidden_size"]),
        key("num_mem_blocks", "shared.blocks", default=1),
        key("adapter_rank", "shared.adapter_rank", default=128),
        key("use_shared_attention_adapter", "shared.adapt_mixer", default=False),
    ),
    constants={"hidden_act": "gelu", "attention_dropout": 0.0, "use_conv_bias": True, "use_long_context": False, "tie_word_embeddings": True},
    model={"tie_embeddings": True},
    indifferent=(
        *("num_logits_to_keep", "use_mamba_kernels", "time_step_max", "time_step_floor", "chunk_size", "use_mem_eff_path", "hybrid_layer_ids"),
        *("attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels", "num_query_groups"),
    ),
    mixers={
        "hybrid": Role(
            mixer="mamba2",
            fixed={"norm": "group", "conv_bias": True, "norm_eps": 1e-5, "block": {"shared": True}},
            weights=tables.mamba2("mamba_decoder.mamba."),
            layer_weights=(
                Weight.same("mixer_norm.weight", "mamba_decoder.input_layernorm.weight"),
                Weight.same("shared.projection.weight", "linear.weight"),
            ),
        ),
        "mamba2": Role(
            mixer="mamba2",
            fixed={"norm": "group", "conv_bias": True, "norm_eps": 1e-5, "block": {"shared": False}},
            weights=tables.mamba2("mamba."),
            layer_weights=NORMS[:1],
        ),
        "rope": Role(mixer="attention", rope=Rope(), fixed=BARE, weights=tables.attention(), layer_weights=NORMS[:1]),
        "nope": Role(mixer="attention", fixed={**BARE, "rope": None}, weights=tables.attention(), layer_weights=NORMS[:1]),
    },
    ffns={
        "none": Role(fixed={"experts": 0, "inner": 0}, weights=()),
        "dense": Role(
            fixed={"experts": 0, "activation": "gelu"},
            weights=(
                Weight("up.{leaf}", (Theirs("feed_forward.gate_up_proj.{leaf}", (0, 1)),)),
                Weight.same("down.{leaf}", "feed_forward.down_proj.{leaf}"),
            ),
            layer_weights=NORMS[1:],
        ),
    },
    shared=Shared(
        at="model.layers.{layer}.shared_transformer.",
        uses=(
            Weight.same("ffn_adapter.down.weight", "feed_forward.gate_up_proj_adapter_list.{use}.0.weight"),
            Weight("ffn_adapter.up.0.weight", (Theirs("feed_forward.gate_up_proj_adapter_list.{use}.1.weight", (0, 1)),)),
            Weight("mixer_adapter.down.weight", tuple(Theirs(f"{of}_adapter_list.{{use}}.0.weight", (i,)) for i, of in enumerate(QKV)), parts=3),
            *(Weight.same(f"mixer_adapter.up.{i}.weight", f"{of}_adapter_list.{{use}}.1.weight") for i, of in enumerate(QKV)),
        ),
    ),
    roles=roles,
    role_keys=role_keys,
    role_names=("layers_block_type", "layer_types", "use_mem_rope"),
    weights=tables.ends(norm="model.final_layernorm"),
)
