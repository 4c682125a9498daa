"""xLSTM 7B: layers of mLSTM and SwiGLU (Beck et al. 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, key
from ltrain.families.weights import Theirs, Weight

LAYER = "mlstm_layer."


def width(factor: str) -> dict[str, Any]:
    """A head's width, as a factor of the hidden width for all heads."""
    return {
        "read": lambda f, c: int(c["hidden_size"] * f) // c["num_heads"],
        "write": lambda dim, c: dim * c["num_heads"] / c["hidden_size"],
    }


def rounded(factor: float, config: dict[str, Any]) -> int:
    unit = config.get("ffn_round_up_to_multiple_of") or 64
    return int((config["hidden_size"] * factor + unit - 1) // unit * unit)


FAMILY = Family(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    keys=(
        key("vocab_size", "vocab"),
        key("hidden_size", "hidden", also=("embedding_dim",)),
        key("num_hidden_layers", "depth", also=("num_blocks",)),
        key("norm_eps", "norm_eps", "mlstm.norm_eps", default=1e-6),
        key("tie_word_embeddings", "tie_embeddings", default=False),
        key("output_logit_soft_cap", "logit_softcap", default=30.0),
        key("num_heads", "mlstm.heads", default=8),
        key("qk_dim_factor", "mlstm.key_dim", default=0.5, **width("qk_dim_factor")),
        key("v_dim_factor", "mlstm.value_dim", default=1.0, **width("v_dim_factor")),
        key("gate_soft_cap", "mlstm.gate_softcap", default=15.0),
        key("use_bias", "mlstm.bias", "dense.bias", default=False),
        key("ffn_proj_factor", "dense.inner", default=2.667, read=rounded, write=lambda inner, c: (inner + 0.5) / c["hidden_size"]),
    ),
    constants={"add_out_norm": True, "weight_mode": "single", "eps": 1e-6},
    # which kernels transformers runs, and how
    indifferent=(
        *("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states", "autocast_kernel_dtype"),
        *("inference_state_dtype", "max_inference_chunksize", "norm_reduction_force_float32", "embedding_dim", "num_blocks"),
    ),
    mixers={
        "mlstm": Role(
            mixer="mlstm",
            weights=(
                Weight("qkv.{leaf}", tuple(Theirs(f"{LAYER}{name}.{{leaf}}", (part,)) for part, name in enumerate(("q", "k", "v", "ogate_preact")))),
                Weight("gates.{leaf}", (Theirs(f"{LAYER}igate_preact.{{leaf}}", (0,)), Theirs(f"{LAYER}fgate_preact.{{leaf}}", (1,)))),
                Weight.same("norm_weight", f"{LAYER}multihead_norm.weight"),
                Weight.same("norm_bias", f"{LAYER}multihead_norm.bias"),
                Weight.same("out.{leaf}", f"{LAYER}out_proj.{{leaf}}"),
            ),
        ),
    },
    ffns={"dense": Role(fixed={"experts": 0}, weights=tables.swiglu("ffn.", gate="proj_up_gate", up="proj_up", down="proj_down"))},
    roles=lambda config: [("mlstm", "dense")] * (config.get("num_hidden_layers") or config["num_blocks"]),
    role_keys=lambda roles: {"ffn_round_up_to_multiple_of": 1},
    role_names=("ffn_round_up_to_multiple_of",),
    layer="backbone.blocks.{layer}.",
    length="",
    layer_weights=tables.norms("norm_mlstm", "norm_ffn"),
    weights=tables.ends("backbone.embeddings.weight", "backbone.out_norm"),
)
