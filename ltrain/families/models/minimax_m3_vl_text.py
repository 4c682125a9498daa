"""MiniMax M3's text model: attention over blocks that an index branch selects, and clamped experts beside a shared one (MiniMax 2026)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight
from ltrain.schema import ConfigError

FIXED = {"gate": "none", "qk_norm": "head", "qk_norm_after_rope": False, "qkv_bias": False, "out_bias": False, "window": 0}
WEIGHTS = (*tables.attention(), *tables.qk_norm())
PARTS = ("q", "q_proj"), ("k", "k_proj"), ("q_norm", "q_norm"), ("k_norm", "k_norm")  # of the index branch: ours, theirs
INDEX = tuple(Weight.same(f"index.{ours}.weight", f"self_attn.indexer.{theirs}.weight") for ours, theirs in PARTS)
# clamped as in gpt-oss, dense and experts alike
ACTIVATION = {"up_offset": 1.0, "bias": False, "clamp": "before"}


def roles(config: dict[str, Any]) -> Roles:
    depth = config["num_hidden_layers"]
    mixers, ffns = config.get("layer_types") or ["full_attention"] * depth, config.get("mlp_layer_types") or ["sparse"] * depth
    return list(zip(mixers, ffns, strict=False))


def index_heads(count: int, config: dict[str, Any]) -> int:
    if count != config["num_key_value_heads"]:
        raise ConfigError(
            f"index_n_heads={count} in config.json is not num_key_value_heads={config['num_key_value_heads']}: blocks are chosen by K/V head"
        )
    return count


def rotating(width: int, config: dict[str, Any]) -> float:
    """The share of a head, which transformers reads elsewhere than others."""
    fraction = float(config["rope_parameters"].get("partial_rotary_factor") or 1.0)
    if width != int(config["head_dim"] * fraction):
        raise ConfigError(
            f"rotary_dim={width} in config.json is not partial_rotary_factor={fraction:g} of rope_parameters x head_dim: make them agree"
        )
    return fraction


def fused(of: str, ours: str = "") -> tuple[Weight, ...]:
    """Gate above up in one matrix."""
    return Weight(f"{ours}up.weight", (Theirs(f"{of}gate_up_proj.weight", (0, 1)),)), Weight.same(f"{ours}down.weight", f"{of}down_proj.weight")


FAMILY = Family(
    model_type="minimax_m3_vl_text",
    architecture="MiniMaxM3VLForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.HEADS,
        key("rotary_dim", "*.rope.fraction", default=64, read=rotating, write=lambda fraction, c: int(c["head_dim"] * fraction)),
        key("index_n_heads", "minimax_m3_sparse.kv_heads", default=4, read=index_heads),
        key("index_head_dim", "minimax_m3_sparse.index_dim", default=128),
        key("index_block_size", "minimax_m3_sparse.block_size", default=128),
        key("index_topk_blocks", "minimax_m3_sparse.top_blocks", default=16),
        key("index_local_blocks", "minimax_m3_sparse.local_blocks", default=1),
        key("dense_intermediate_size", "dense.inner", default=12288),
        key("intermediate_size", "sparse.inner", default=3072),
        key("shared_intermediate_size", "sparse.shared_inner", default=3072),
        key("num_local_experts", "sparse.experts", also=("num_experts",), default=128),
        key("num_experts_per_tok", "sparse.top_k", default=4),
        key("routed_scaling_factor", "sparse.scale", default=2.0),
        key("router_aux_loss_coef", "sparse.aux_loss", default=0.001),
        key("swiglu_alpha", "dense.alpha", "sparse.alpha", default=1.702),
        key("swiglu_limit", "dense.limit", "sparse.limit", "sparse.shared_limit", default=7.0),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0},
    model={"norm": "rms_zero_centred"},
    mixers={
        "full_attention": Role(mixer="attention", rope=Rope(base=5e6, fraction=1.0), fixed={**FIXED, "block_size": 0}, weights=WEIGHTS),
        "minimax_m3_sparse": Role(
            mixer="attention",
            rope=Rope(base=5e6, fraction=1.0),
            fixed={**FIXED, "block_score": "index"},
            weights=(*WEIGHTS, *INDEX),
        ),
    },
    ffns={
        "dense": Role(fixed={**ACTIVATION, "experts": 0}, weights=fused("mlp.")),
        "sparse": Role(
            fixed={**ACTIVATION, "score": "sigmoid", "renormalise": True, "router_dtype": "model", "shared_gate": False},
            weights=(
                *tables.router(bias="mlp.gate.e_score_correction_bias"),
                Weight("experts.{expert}.up", (Theirs("mlp.experts.gate_up_proj", (0, 1)),), parts=2),
                Weight.same("experts.{expert}.down", "mlp.experts.down_proj"),
                *fused("mlp.shared_experts.", "shared."),
            ),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles], "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("layer_types", "mlp_layer_types"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=("mtp.*",),
)
