"""Qwen3.5's text model, dense: Qwen3-Next's layers with projections apart (Qwen team 2026)."""

import dataclasses
from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Roles, key
from ltrain.families.models.qwen3_next import FAMILY as QWEN3_NEXT
from ltrain.families.weights import Theirs, Weight


def roles(config: dict[str, Any]) -> Roles:
    depth, period = config["num_hidden_layers"], config.get("full_attention_interval") or 4
    mixers = config.get("layer_types") or ["linear_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    return [(mixer, "dense") for mixer in mixers]


RECURRENT = QWEN3_NEXT.mixers["linear_attention"]
FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    keys=(
        *tables.MODEL,
        *tables.LINEAR_HEADS,
        key("num_attention_heads", "full_attention.heads", default=16),
        key("num_key_value_heads", "full_attention.kv_heads", default=4),
        key("head_dim", "full_attention.head_dim", default=256),
        tables.BIAS,
        key("intermediate_size", "dense.inner", default=12288),
    ),
    constants=QWEN3_NEXT.constants,
    # of images, whose positions have three axes; those of text are one
    indifferent=("rope_parameters.mrope_section", "rope_parameters.mrope_interleaved", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    model=QWEN3_NEXT.model,
    mixers={
        **QWEN3_NEXT.mixers,
        "linear_attention": dataclasses.replace(
            RECURRENT,
            weights=(
                Weight(
                    "input.weight",
                    (
                        Theirs("linear_attn.in_proj_qkv.weight", (0, 1, 2)),
                        *(Theirs(f"linear_attn.in_proj_{name}.weight", (part,)) for part, name in ((3, "z"), (4, "b"), (5, "a"))),
                    ),
                ),
                *RECURRENT.weights[1:],
            ),
        ),
    },
    ffns={"dense": QWEN3_NEXT.ffns["dense"]},
    roles=roles,
    role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles]},
    role_names=("layer_types", "full_attention_interval"),
    layer_weights=tables.norms(),
    weights=tables.ends(),
    ignored=QWEN3_NEXT.ignored,
)
