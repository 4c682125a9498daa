"""MiniMax-01 and M1: seven layers of lightning attention to one of softmax attention, added to what the norms give (MiniMax 2025)."""

from typing import Any

import torch
from torch import Tensor

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight
from ltrain.model.options import LinearRecurrenceOptions

BLOCK = 256  # tokens for which transformers keeps its powers of the decays


def roles(config: dict[str, Any]) -> Roles:
    depth = config["num_hidden_layers"]
    return [(kind, "moe") for kind in config.get("layer_types") or ["linear_attention" if (i + 1) % 2 else "full_attention" for i in range(depth)]]


def slopes(options: LinearRecurrenceOptions, layer: int, depth: int) -> Tensor:
    """[H, 1, 1], in transformers' own order of rounding."""
    rate = (1 / (2 ** (8 / options.value_heads))) ** (torch.arange(options.value_heads) + 1)
    return (rate * (1 - layer / (depth - 1 + 1e-5) + 1e-5))[:, None, None]


def query_decay(options: LinearRecurrenceOptions, layer: int, depth: int) -> Tensor:
    return torch.exp(-slopes(options, layer, depth) * (torch.arange(BLOCK) + 1)[:, None])


def key_decay(options: LinearRecurrenceOptions, layer: int, depth: int) -> Tensor:
    return torch.exp(-slopes(options, layer, depth) * (BLOCK - (torch.arange(BLOCK) + 1)[:, None]))


def diagonal_decay(options: LinearRecurrenceOptions, layer: int, depth: int) -> Tensor:
    steps = torch.arange(BLOCK) + 1
    behind = slopes(options, layer, depth) * (steps[:, None] - steps[None, :])[None, None]
    return torch.exp(torch.where(behind >= 0, -behind, float("-inf")))


def factors(theirs: str, role: str, ours: str) -> tuple[Any, Any]:
    scales = (("alpha", f"{ours}_residual_scale"), ("beta", f"{ours}_scale"))
    alpha, beta = (key(f"{theirs}_{name}_factor", f"{role}.block.{scale}", default=1, read=lambda x, c: float(x)) for name, scale in scales)
    return alpha, beta


FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    keys=(
        *tables.MODEL,
        key("num_attention_heads", "full_attention.heads", "linear_attention.key_heads", "linear_attention.value_heads"),
        key("num_key_value_heads", "full_attention.kv_heads", default=8),
        key(
            "head_dim",
            *("full_attention.head_dim", "linear_attention.key_dim", "linear_attention.value_dim"),
            default=lambda c: c["hidden_size"] // c["num_attention_heads"],
        ),
        *factors("full_attn", "full_attention", "mixer"),
        *factors("linear_attn", "linear_attention", "mixer"),
        *factors("mlp", "*", "ffn"),
        key("intermediate_size", "moe.inner"),
        key("num_local_experts", "moe.experts", default=8),
        key("num_experts_per_tok", "moe.top_k", default=2),
        key("router_aux_loss_coef", "moe.aux_loss", default=0.001),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None, "router_jitter_noise": 0.0, "block_size": BLOCK},
    model={"block": {"form": "normed_residual"}},
    mixers={
        "linear_attention": Role(
            mixer="lightning",
            fixed={"rope": None, "gate_first": False, "gate_rank": 0, "bias": False, "skip": False, "norm_eps": 1e-6},
            weights=(
                Weight(
                    "input.weight",
                    (Theirs("self_attn.qkv_proj.weight", (0, 1, 2), groups="value_heads"), Theirs("self_attn.output_gate.weight", (3,))),
                ),
                Weight.same("norm.weight", "self_attn.norm.weight"),
                Weight.same("out.weight", "self_attn.out_proj.weight"),
            ),
            computed={
                "self_attn.slope_rate": slopes,
                "self_attn.query_decay": query_decay,
                "self_attn.key_decay": key_decay,
                "self_attn.diagonal_decay": diagonal_decay,
            },
        ),
        "full_attention": Role(
            mixer="attention",
            rope=Rope(base=1e6),
            fixed={"gate": "none", "qk_norm": "none", "qkv_bias": False, "out_bias": False},
            weights=tables.attention(),
        ),
    },
    ffns={
        "moe": Role(
            fixed={"score": "softmax", "renormalise": True, "scale": 1.0, "shared_inner": 0, "bias_rate": 0.0},
            weights=(*tables.router("block_sparse_moe.gate.weight"), *tables.experts("block_sparse_moe.experts.", "w1", "w3", "w2")),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles]},
    role_names=("layer_types",),
    layer_weights=tables.norms(),
    weights=tables.ends(),
)
