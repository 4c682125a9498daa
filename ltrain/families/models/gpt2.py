"""GPT-2: learned positions, norms with biases (Radford et al. 2019)."""

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.weights import Theirs, Weight

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=(
        key("vocab_size", "vocab"),
        key("n_embd", "hidden", also=("hidden_size",)),
        key("n_layer", "depth", also=("num_hidden_layers",)),
        key("n_positions", "learned_positions", also=("max_position_embeddings", "n_ctx"), default=1024),
        key("layer_norm_epsilon", "norm_eps", default=1e-5),
        key("tie_word_embeddings", "tie_embeddings", default=True),
        key("n_head", "attention.heads", "attention.kv_heads", also=("num_attention_heads",)),
        key("", "attention.head_dim", read=lambda _, c: c["n_embd"] // c["n_head"]),
        key("n_inner", "dense.inner", default=lambda c: 4 * c["n_embd"]),
    ),
    constants={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    indifferent=(
        *("reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj", "n_ctx"),
    ),
    model={"norm": "layer_bias"},
    mixers={
        "attention": Role(
            mixer="attention",
            fixed={"rope": None, "gate": "none", "qk_norm": "none", "qkv_bias": True, "out_bias": True},
            weights=(
                Weight("qkv.{leaf}", (Theirs("attn.c_attn.{leaf}", (0, 1, 2), transposed=True),)),
                Weight.same("out.{leaf}", "attn.c_proj.{leaf}", transposed=True),
            ),
        ),
    },
    ffns={
        "dense": Role(
            fixed={"experts": 0, "bias": True, "gated": False, "activation": "gelu_tanh"},
            weights=(
                Weight.same("up.{leaf}", "mlp.c_fc.{leaf}", transposed=True),
                Weight.same("down.{leaf}", "mlp.c_proj.{leaf}", transposed=True),
            ),
        ),
    },
    roles=lambda config: [("attention", "dense")] * (config.get("n_layer") or config["num_hidden_layers"]),
    layer="transformer.h.{layer}.",
    length="",
    renames=(("wte", "transformer.wte"), ("wpe", "transformer.wpe"), ("h.", "transformer.h."), ("ln_f", "transformer.ln_f")),
    layer_weights=tables.norms("ln_1", "ln_2"),
    weights=(*tables.ends("transformer.wte.weight", "transformer.ln_f"), Weight.same("positions", "transformer.wpe.weight")),
    ignored=("*.attn.bias", "*.attn.masked_bias"),  # buffers that old versions saved
)
