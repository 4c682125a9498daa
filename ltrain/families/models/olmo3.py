"""OLMo 3: OLMo 2 with three sliding layers to one that sees all, whose rope alone is stretched (Olmo team 2025)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.models.olmo2 import FAMILY as OLMO2
from ltrain.families.rope import Rope

ATTENTION = OLMO2.mixers["attention"]
FAMILY = dataclasses.replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=(*OLMO2.keys, tables.window("sliding_attention", 4096)),
    mixers={
        "full_attention": dataclasses.replace(ATTENTION, rope=Rope(layer_type="full_attention", base=5e5), fixed={**ATTENTION.fixed, "window": 0}),
        "sliding_attention": dataclasses.replace(ATTENTION, rope=Rope(layer_type="sliding_attention", base=5e5, scaled=False)),
    },
    roles=tables.layer_types(lambda i, config: (i + 1) % 4 != 0),
    role_keys=tables.typed,
    role_names=("layer_types",),
)
