"""Gemma 3's text model: five sliding layers to one that sees all, each with a rope of its own (Gemma team 2025)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.models.gemma2 import FAMILY as GEMMA2
from ltrain.families.rope import Rope

FULL, SLIDING = GEMMA2.mixers["full_attention"], GEMMA2.mixers["sliding_attention"]
WEIGHTS = (*tables.attention(), *tables.qk_norm())
FAMILY = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=tables.without(GEMMA2.keys, "attn_logit_softcapping", "final_logit_softcapping"),
    constants={**GEMMA2.constants, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    mixers={
        "full_attention": dataclasses.replace(
            FULL, rope=Rope(layer_type="full_attention", base=1e6), fixed={**FULL.fixed, "qk_norm": "head"}, weights=WEIGHTS
        ),
        "sliding_attention": dataclasses.replace(
            SLIDING,
            rope=Rope(layer_type="sliding_attention", theta="rope_local_base_freq", scaled=False),
            fixed={**SLIDING.fixed, "qk_norm": "head"},
            weights=WEIGHTS,
        ),
    },
    roles=tables.layer_types(lambda i, config: bool((i + 1) % (config.get("sliding_window_pattern") or 6))),
    role_names=("layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
)
