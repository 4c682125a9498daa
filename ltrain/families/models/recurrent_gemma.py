"""RecurrentGemma: two recurrent blocks to one of local attention (Griffin, De et al. 2024; Botev et al. 2024)."""

from typing import Any

import torch

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    types = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    return [(types[i % len(types)], "dense") for i in range(config["num_hidden_layers"])]


def root(number: int) -> float:
    """The embeddings' scale, as transformers keeps it."""
    return float(torch.tensor(number**0.5, dtype=torch.bfloat16))


FAMILY = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "tie_word_embeddings"),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        key("", "embed_scale", read=lambda _, c: root(c["hidden_size"])),
        key("logits_soft_cap", "logit_softcap", default=30.0),
        key("num_attention_heads", "attention.heads", "recurrent.blocks"),
        key("num_key_value_heads", "attention.kv_heads", default=lambda c: c["num_attention_heads"]),
        key("head_dim", "attention.head_dim", default=lambda c: c["hidden_size"] // c["num_attention_heads"]),
        key("attention_window_size", "attention.window", default=2048),
        key("attention_bias", "attention.qkv_bias", default=False),
        key("lru_width", "recurrent.inner", default=lambda c: c["hidden_size"]),
        key("conv1d_width", "recurrent.conv_width", default=4),
        key("intermediate_size", "dense.inner", read=lambda width, c: width // 2, write=lambda width, c: 2 * width),
    ),
    constants={"hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0},
    indifferent=("w_init_variance_scale", "final_w_init_variance_scale"),
    length="",
    model={"norm": "rms_zero_centred"},
    mixers={
        "recurrent": Role(
            mixer="rg_lru",
            weights=(
                Weight("input.{leaf}", (Theirs("temporal_block.linear_x.{leaf}", (0,)), Theirs("temporal_block.linear_y.{leaf}", (1,)))),
                Weight.same("conv", "temporal_block.conv_1d.weight", unit_axes=(1,)),
                Weight.same("conv_bias", "temporal_block.conv_1d.bias"),
                Weight.same("input_gate", "temporal_block.rg_lru.input_gate_weight"),
                Weight.same("input_gate_bias", "temporal_block.rg_lru.input_gate_bias"),
                Weight.same("decay_gate", "temporal_block.rg_lru.recurrent_gate_weight"),
                Weight.same("decay_gate_bias", "temporal_block.rg_lru.recurrent_gate_bias"),
                Weight.same("decay", "temporal_block.rg_lru.recurrent_param"),
                Weight.same("out.{leaf}", "temporal_block.linear_out.{leaf}"),
            ),
        ),
        "attention": Role(
            mixer="attention",
            rope=Rope(fraction=0.5),
            fixed={"gate": "none", "qk_norm": "none", "out_bias": True},
            weights=tables.attention("temporal_block."),
        ),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": True, "activation": "gelu_tanh"}, weights=tables.swiglu("mlp_block."))},
    roles=roles,
    role_keys=lambda roles: {"block_types": [mixer for mixer, _ in roles]},
    role_names=("block_types",),
    layer_weights=tables.norms("temporal_pre_norm", "channel_pre_norm"),
    weights=tables.ends(norm="model.final_norm"),
)
