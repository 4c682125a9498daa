"""Command R7B, Command A and Tiny Aya: Command R with three sliding layers to one that sees all, without positions (Cohere 2024)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.models.cohere import FAMILY as COHERE

ATTENTION = COHERE.mixers["attention"]
FAMILY = dataclasses.replace(
    COHERE,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    keys=(*COHERE.keys, tables.window("sliding_attention", 4096)),
    constants=COHERE.constants,
    indifferent=("cache_implementation", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct"),
    mixers={
        "full_attention": dataclasses.replace(ATTENTION, rope=None, fixed={**ATTENTION.fixed, "rope": None, "window": 0}),
        "sliding_attention": ATTENTION,
    },
    roles=tables.layer_types(lambda i, config: (i + 1) % (config.get("sliding_window_pattern") or 4) != 0),
    role_keys=tables.typed,
    role_names=("layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
)
