"""GLM-5: DeepSeek Sparse Attention whose selection later layers may share (GLM team 2026)."""

import dataclasses
from typing import Any

from ltrain.families import tables
from ltrain.families.family import Role, Roles
from ltrain.families.models.deepseek_v32 import FAMILY as DEEPSEEK_V32
from ltrain.families.models.deepseek_v32 import ffns
from ltrain.families.rope import Rope


def roles(config: dict[str, Any]) -> Roles:
    mixers, pattern = config.get("indexer_types"), config.get("index_topk_pattern")
    if not mixers and pattern:
        mixers = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
    elif not mixers:
        period, offset = max(config.get("index_topk_freq") or 1, 1), config.get("index_skip_topk_offset", 2)
        mixers = ["shared" if max(i - offset + 1, 0) % period else "full" for i in range(config["num_hidden_layers"])]
    return list(zip(mixers, ffns(config), strict=False))


FULL = DEEPSEEK_V32.mixers["full"]
FAMILY = dataclasses.replace(
    DEEPSEEK_V32,
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    mixers={
        "full": dataclasses.replace(FULL, fixed={**FULL.fixed, "index_pairs": True}),
        "shared": Role(
            mixer="mla",
            rope=Rope(width="rope_dim", pairs=True),
            fixed={"gate": "none", "select": "shared"},
            weights=tables.latent_attention(True),
        ),
    },
    roles=roles,
    role_keys=lambda roles: {"indexer_types": [mixer for mixer, _ in roles], "mlp_layer_types": [ffn for _, ffn in roles]},
    role_names=(*DEEPSEEK_V32.role_names, "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
)
