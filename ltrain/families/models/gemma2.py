"""Gemma 2: every second layer slides, norms on both sides, soft caps (Gemma team 2024)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.rope import Rope

FIXED = {"gate": "none", "qk_norm": "none"}
SCALE = key("query_pre_attn_scalar", "*.scale", default=256, read=lambda width, c: width**-0.5, write=lambda scale, c: round(scale**-2))
FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=(
        *tables.without(tables.MODEL, "tie_word_embeddings"),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        key("", "embed_scale", read=lambda _, c: c["hidden_size"] ** 0.5),
        *tables.HEADS,
        tables.BIAS,
        tables.window("sliding_attention", 4096),
        SCALE,
        key("attn_logit_softcapping", "*.softcap", default=50.0, nullable=True, read=lambda cap, c: cap or 0.0, write=lambda cap, c: cap or None),
        key(
            "final_logit_softcapping",
            "logit_softcap",
            default=30.0,
            nullable=True,
            read=lambda cap, c: cap or 0.0,
            write=lambda cap, c: cap or None,
        ),
        key("intermediate_size", "dense.inner"),
    ),
    constants={"hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0},
    indifferent=("hidden_act", "cache_implementation"),
    model={"norm": "rms_zero_centred", "block": {"form": "sandwich"}},
    mixers={
        "full_attention": Role(mixer="attention", rope=Rope(), fixed={**FIXED, "window": 0}, weights=tables.attention()),
        "sliding_attention": Role(mixer="attention", rope=Rope(), fixed=FIXED, weights=tables.attention()),
    },
    ffns={"dense": Role(fixed={"experts": 0, "bias": False, "activation": "gelu_tanh"}, weights=tables.swiglu())},
    roles=tables.layer_types(lambda i, config: i % 2 == 0),
    role_keys=tables.typed,
    role_names=("layer_types",),
    layer_weights=(*tables.norms(ffn="pre_feedforward_layernorm"), *tables.post_norms()),
    weights=tables.ends(),
)
