"""Ministral 3: YaRN, and queries that grow with the logarithm of their position (Mistral AI 2025)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.family import key
from ltrain.families.models.mistral import FAMILY as MISTRAL
from ltrain.families.rope import Rope

ATTENTION = MISTRAL.mixers["attention"]
FAMILY = dataclasses.replace(
    MISTRAL,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    keys=(
        *tables.without(MISTRAL.keys, "sliding_window"),
        tables.window("attention"),
        key("rope_parameters.llama_4_scaling_beta", "attention.temperature", default=0.0),
        key("", "attention.temperature_length", read=lambda _, c: tables.temperature_length(c)),
    ),
    indifferent=("rope_parameters.max_position_embeddings",),
    mixers={"attention": dataclasses.replace(ATTENTION, rope=Rope(base=1e6))},
)
