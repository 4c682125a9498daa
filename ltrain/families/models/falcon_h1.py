"""Falcon-H1: attention and Mamba-2 side by side in every layer, multipliers of everything (Zuo et al. 2025)."""

from typing import Any

from ltrain.families import tables
from ltrain.families.family import Family, Key, Role, Roles, key
from ltrain.families.rope import Rope
from ltrain.schema import ConfigError

ATTENTION, MAMBA2 = "branches.attention", "branches.mamba2"
# which norm, and where -> the fixed options of the recurrence
NORMS: dict[str, dict[str, Any]] = {
    "bare": {"norm": "none"},
    "gate_last": {"norm": "group", "gate_first": False},
    "gate_first": {"norm": "group", "gate_first": True},
}
# the preset mamba2, which has its gate before a norm, without these two
RECURRENCE = {"decay": "head", "decay_gate": "softplus", "update": "add", "step": True, "skip": True, "qk_norm": "none", "scale": 1.0, "gate": "silu"}
PARTS = (3, 2, 1, 0, 4)  # z, x, B, C and dt among q, k, v, gate and decay


def roles(config: dict[str, Any]) -> Roles:
    norm = "bare" if not config.get("mamba_rms_norm") else "gate_last" if config.get("mamba_norm_before_gate", True) else "gate_first"
    return [(norm, "dense")] * int(config["num_hidden_layers"])


def role_keys(roles: Roles) -> dict[str, Any]:
    return {"mamba_rms_norm": roles[0][0] != "bare", "mamba_norm_before_gate": roles[0][0] != "gate_first"}


def every(*options: str) -> tuple[str, ...]:
    return tuple(f"{role}.{option}" for role in NORMS for option in options)


def score_scale(multiplier: float, config: dict[str, Any]) -> float | None:
    """The factor of the keys is one of the scores."""
    return None if multiplier == 1 else multiplier * head_dim(config) ** -0.5


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_multiplier(scale: float | None, config: dict[str, Any]) -> float:
    return 1.0 if scale is None else float(f"{scale * head_dim(config) ** 0.5:.12g}")  # the number that a person wrote, not its rounding


def parts(multipliers: list[float] | None, config: dict[str, Any]) -> list[float]:
    found = [1.0] * len(PARTS)
    for part, multiplier in zip(PARTS, multipliers or found, strict=True):
        found[part] = float(multiplier)
    return [] if set(found) == {1.0} else found


def multipliers(scales: list[float], config: dict[str, Any]) -> list[float]:
    return [scales[part] if scales else 1.0 for part in PARTS]


def both_biases(out: bool, config: dict[str, Any]) -> bool:
    if out != bool(config.get("mamba_proj_bias")):
        raise ConfigError(f"projectors_bias={out} in config.json needs mamba_proj_bias={out}: ltrain's Mamba-2 has both biases or none")
    return out


def recurrent(k: Key) -> tuple[str, ...]:
    return every(*(f"{MAMBA2}.{option.removeprefix('mamba2.')}" for option in k.ours))


MIXERS = {
    name: Role(
        mixer="parallel",
        rope=Rope(base=1e5, at=f"{ATTENTION}.rope", width=f"{ATTENTION}.head_dim"),
        fixed={
            "branches": {
                "attention": {"gate": "none", "qk_norm": "none"},
                "mamba2": {"mixer": "linear_recurrence", **RECURRENCE, **norm},
            },
            "fuse": False,
        },
        weights=(
            *tables.below(f"{ATTENTION}.", tables.attention()),
            *(weight for weight in tables.below(f"{MAMBA2}.", tables.mamba2("mamba.")) if name != "bare" or not weight.ours.endswith("norm.weight")),
        ),
    )
    for name, norm in NORMS.items()
}
FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    keys=(
        *tables.MODEL,
        key("embedding_multiplier", "embed_scale", default=1.0),
        key("lm_head_multiplier", "logit_scale", default=1.0),
        key("num_attention_heads", *every(f"{ATTENTION}.heads")),
        key("num_key_value_heads", *every(f"{ATTENTION}.kv_heads"), default=8),
        key("head_dim", *every(f"{ATTENTION}.head_dim"), default=head_dim),
        key("attention_bias", *every(f"{ATTENTION}.qkv_bias", f"{ATTENTION}.out_bias"), default=False),
        key("key_multiplier", *every(f"{ATTENTION}.scale"), default=1.0, read=score_scale, write=key_multiplier),
        key("attention_in_multiplier", *every(f"{ATTENTION}.in_scale"), default=1.0),
        key("attention_out_multiplier", *every(f"{ATTENTION}.out_scale"), default=1.0),
        key("ssm_in_multiplier", *every(f"{MAMBA2}.in_scale"), default=1.0),
        key("ssm_out_multiplier", *every(f"{MAMBA2}.out_scale"), default=1.0),
        key("ssm_multipliers", *every(f"{MAMBA2}.part_scales"), default=None, read=parts, write=multipliers),
        *(Key(k.theirs, recurrent(k), k.also, k.default, read=k.read, write=k.write) for k in (*tables.MAMBA2_HEADS, tables.step_limits("mamba2"))),
        key("projectors_bias", *every(f"{MAMBA2}.bias"), default=False, read=both_biases),
        key("intermediate_size", "dense.inner"),
        key("mlp_bias", "dense.bias", default=False),
        key("mlp_multipliers.0", "dense.gate_scale", default=1.0),
        key("mlp_multipliers.1", "block.ffn_scale", default=1.0),
    ),
    constants={"hidden_act": "silu", "attention_dropout": 0.0},
    indifferent=("num_logits_to_keep", "mamba_chunk_size", "mamba_expand", "mamba_d_ssm", "mamba_use_mlp"),
    mixers=MIXERS,
    ffns={"dense": Role(fixed={"experts": 0}, weights=tables.swiglu("feed_forward."))},
    roles=roles,
    role_keys=role_keys,
    role_names=("mamba_rms_norm", "mamba_norm_before_gate"),
    layer_weights=tables.norms(ffn="pre_ff_layernorm"),
    weights=tables.ends(norm="model.final_layernorm"),
)
