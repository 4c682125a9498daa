"""DeepSeek-V3.2: V3 whose attention is sparse (DeepSeek-AI 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Role, Roles, key
from ltrain.families.models.deepseek_v3 import FAMILY as DEEPSEEK_V3
from ltrain.families.rope import Rope
from ltrain.families.weights import Weight

INDEXER = (
    Weight.same("indexer.q.weight", "self_attn.indexer.wq_b.weight"),
    Weight.same("indexer.k.weight", "self_attn.indexer.wk.weight"),
    Weight.same("indexer.k_norm.{leaf}", "self_attn.indexer.k_norm.{leaf}"),
    Weight.same("indexer.weights.weight", "self_attn.indexer.weights_proj.weight"),
)
INDEX = (
    key("index_topk", "*.top_k", default=2048),
    key("index_n_heads", "full.index_heads", default=64),
    key("index_head_dim", "full.index_dim", default=128),
)


def ffns(config: dict[str, Any]) -> list[str]:
    """The feed-forward of each layer."""
    depth, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 3)
    return config.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(depth)]


def roles(config: dict[str, Any]) -> Roles:
    return [("full", ffn) for ffn in ffns(config)]


FAMILY = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.LATENT_HEADS,
        key("attention_bias", "*.bias", default=False),
        *INDEX,
        key("intermediate_size", "dense.inner"),
        *tables.rename(tables.SHARED_EXPERTS, "moe", "sparse"),
        *tables.rename(tables.GROUPS, "moe", "sparse"),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False},
    # what follows from others, and what others than transformers read
    indifferent=(*DEEPSEEK_V3.indifferent, "layer_types", "first_k_dense_replace"),
    mixers={
        "full": Role(
            mixer="mla",
            rope=Rope(width="rope_dim", pairs=True),
            fixed={"gate": "none", "select": "index", "index_pairs": False},
            weights=(*tables.latent_attention(True), *INDEXER),
        ),
    },
    ffns={"dense": DEEPSEEK_V3.ffns["dense"], "sparse": DEEPSEEK_V3.ffns["moe"]},
    roles=roles,
    role_keys=lambda roles: {"mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=("mlp_layer_types", "first_k_dense_replace"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=DEEPSEEK_V3.ignored,
)
