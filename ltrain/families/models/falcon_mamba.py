"""Falcon Mamba: Mamba with norms that have no weight on the step, B and C (TII 2024)."""

import dataclasses

from ltrain.families import tables
from ltrain.families.family import Role, key
from ltrain.families.models.mamba import FAMILY as MAMBA

FAMILY = dataclasses.replace(
    MAMBA,
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    keys=(*MAMBA.keys, key("mixer_rms_eps", "*.inner_norm_eps", default=1e-6)),
    mixers={"mamba": Role(mixer="mamba", fixed={"inner_norm": "weightless"}, weights=tables.selective("mixer."))},
)
