"""BLOOM: positions by ALiBi, norms with biases (BigScience 2022)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.weights import Theirs, Weight

FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    keys=(
        key("vocab_size", "vocab"),
        key("hidden_size", "hidden", also=("n_embed",)),
        key("n_layer", "depth", also=("num_hidden_layers",)),
        key("layer_norm_epsilon", "norm_eps", default=1e-5),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        key("n_head", "attention.heads", "attention.kv_heads", also=("num_attention_heads",)),
        key("", "attention.head_dim", read=lambda _, c: c.get("hidden_size", c.get("n_embed")) // c.get("n_head", c.get("num_attention_heads"))),
        key("", "dense.inner", read=lambda _, c: 4 * c.get("hidden_size", c.get("n_embed", 0))),
    ),
    constants={"apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    indifferent=(
        *("slow_but_exact", "seq_length", "offset_alibi", "bias_dropout_fusion", "attention_softmax_in_fp32", "masked_softmax_fusion"),
        *("n_inner", "unk_token_id", "skip_bias_add", "skip_bias_add_qkv"),
    ),
    model={"norm": "layer_bias", "embed_norm": True},
    mixers={
        "attention": Role(
            mixer="attention",
            fixed={"rope": None, "alibi": True, "gate": "none", "qk_norm": "none", "qkv_bias": True, "out_bias": True},
            weights=(
                Weight("qkv.{leaf}", (Theirs("self_attention.query_key_value.{leaf}", (0, 1, 2), groups="heads"),)),
                Weight.same("out.{leaf}", "self_attention.dense.{leaf}"),
            ),
        ),
    },
    ffns={
        "dense": Role(
            fixed={"experts": 0, "bias": True, "gated": False, "activation": "gelu_tanh"},
            weights=(Weight.same("up.{leaf}", "mlp.dense_h_to_4h.{leaf}"), Weight.same("down.{leaf}", "mlp.dense_4h_to_h.{leaf}")),
        ),
    },
    roles=lambda config: [("attention", "dense")] * (config.get("n_layer") or config["num_hidden_layers"]),
    layer="transformer.h.{layer}.",
    length="",
    renames=(("word_embeddings", "transformer.word_embeddings"), ("h.", "transformer.h."), ("ln_f", "transformer.ln_f")),
    layer_weights=tables.norms(),
    weights=(
        *tables.ends("transformer.word_embeddings.weight", "transformer.ln_f"),
        Weight.same("embed_norm.{leaf}", "transformer.word_embeddings_layernorm.{leaf}"),
    ),
)
