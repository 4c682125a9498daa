"""Rotary embeddings between a config.json (`rope_parameters`, or the older `rope_theta` and `rope_scaling`) and RopeOptions."""

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from ltrain.model.options import RopeOptions
from ltrain.model.position import rotary_width, stretched_base
from ltrain.schema import ConfigError

KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

# rope_type -> scaling, and the further keys of it: theirs -> ours
_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", {}),
    "dynamic": ("dynamic", {}),
    "yarn": (
        "yarn",
        {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")},
    ),
    "longrope": ("longrope", {name: name for name in ("short_factor", "long_factor", "attention_factor")}),
    "llama3": ("llama3", {name: name for name in ("low_freq_factor", "high_freq_factor")}),
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Rope:
    """Where config.json says how the layers of a role rotate, and what holds where it does not say."""

    layer_type: str = ""  # the role's entry of rope_parameters; '': rope_parameters are those of all layers
    base: float = 10000.0
    # default of partial_rotary_factor, or what finds it in other keys of config.json; None: the family rotates whole heads
    fraction: float | Callable[[dict[str, Any]], float] | None = None
    pairs: bool = False  # RopeOptions.pairs, where no key says it
    at: str = "rope"  # the option of the mixer; with dots in a mapping
    width: str = "head_dim"  # the option that counts the numbers of which `fraction` rotate
    whole: bool = False  # all of `width` rotates: partial_rotary_factor says of which part of a head that is, which other keys say too
    theta: str = "rope_theta"  # the base, in the older spelling
    scaled: bool = True  # the older rope_scaling holds for these layers


def from_config(config: dict[str, Any], rope: Rope, others: Container[str] = ()) -> RopeOptions:
    """The options that a config.json asks for. others: keys of rope_parameters that somebody else reads.

    max_position_embeddings is the length that `dynamic` starts from, and the one at which `longrope` is used.
    Errors: ConfigError for a rope_type or a key of it that is not known.
    """
    given = _parameters(config, rope)
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in _TYPES:
        raise ConfigError(f"rope_type {rope_type!r} in config.json is not known: write one of {', '.join(_TYPES)}")
    scaling, names = _TYPES[rope_type]
    unknown = sorted(key for key in given if key not in _COMMON and key not in names and key not in others and given[key] is not None)
    if unknown:
        raise ConfigError(f"rope_parameters in config.json hold {', '.join(unknown)}, which {rope_type} does not read: take them out")
    default = rope.fraction(config) if callable(rope.fraction) else rope.fraction
    fraction = 1.0 if rope.whole else float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or default or 1.0)
    options: dict[str, Any] = {
        "base": float(given.get("rope_theta") or config.get(rope.theta) or rope.base),
        "fraction": fraction,
        "pairs": rope.pairs,
        "scaling": scaling,
    }
    for theirs, ours in names.items():
        if given.get(theirs) is not None:
            value = given[theirs]
            options[ours] = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            options[ours] = [float(v) for v in value] if isinstance(value, list) else options[ours]
    longest = int(config.get("max_position_embeddings") or given.get("original_max_position_embeddings") or 0)
    if scaling in ("dynamic", "yarn", "longrope", "llama3"):
        original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
        options["original_length"] = longest if scaling == "dynamic" else int(original)
    if scaling == "longrope" and longest > options["original_length"]:
        options["length"] = longest
    if scaling != "none" and not (scaling == "longrope" and "attention_factor" in options):
        options["factor"] = float(given.get("factor") or longest / options.get("original_length", longest))
    if scaling == "yarn" and "attention_factor" in options or not (options.get("mscale") and options.get("mscale_all_dim")):
        options.pop("mscale", None)  # read by nobody then
        if options.pop("mscale_all_dim", None) and rope.width == "rope_dim":  # but by latent attention's scale
            raise ConfigError("rope_parameters in config.json have mscale_all_dim without mscale: write both, or neither")
    if scaling in ("linear", "yarn", "dynamic", "llama3") and options["factor"] == 1 and "attention_factor" not in options:
        return RopeOptions(base=options["base"], fraction=options["fraction"], pairs=options["pairs"])
    return RopeOptions(**options)


def _parameters(config: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """What config.json says of the layers of one type."""
    given: dict[str, Any] = dict(config.get("rope_parameters") or {})
    typed = {name: value for name, value in given.items() if isinstance(value, dict)}
    if typed and not rope.layer_type:
        raise ConfigError("rope_parameters in config.json differ by layer type, which this family has not: write one mapping for all layers")
    if typed:
        return dict(typed.get(rope.layer_type) or {})
    return (dict(config.get("rope_scaling") or {}) if rope.scaled else {}) | given


def to_config(rope: RopeOptions, head_dim: int, length: int, partial: bool) -> tuple[dict[str, Any], int]:
    """rope_parameters and max_position_embeddings: `length` where the scaling leaves it free; partial: name the fraction, even 1."""
    rope = settled(rope, head_dim)
    rope_type, names = next((name, names) for name, (scaling, names) in _TYPES.items() if scaling == rope.scaling)
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": rope.base}
    if rope.fraction != 1 or partial:
        parameters["partial_rotary_factor"] = rope.fraction
    if rope.scaling != "none" and not (rope.scaling == "longrope" and rope.attention_factor is not None):
        parameters["factor"] = rope.factor
    if rope.scaling in ("yarn", "longrope", "llama3"):
        parameters["original_max_position_embeddings"] = rope.original_length
    defaults = RopeOptions()
    for theirs, ours in names.items():
        value = getattr(rope, ours)
        if value is not None and (value != getattr(defaults, ours) or rope.scaling == "llama3"):
            parameters[theirs] = value
    if rope.scaling in ("dynamic", "longrope"):  # they read it
        length = max(rope.length, rope.original_length)
    return parameters, length


def reach(rope: RopeOptions) -> int:
    """Tokens that a stretched embedding was made for; 0 where it does not say."""
    return int(rope.original_length * rope.factor) if rope.scaling in ("yarn", "llama3") else rope.length


def settled(rope: RopeOptions, head_dim: int) -> RopeOptions:
    """The same frequencies in the fewest words: a static NTK scaling is another base; a dynamic one up to the original length is none."""
    if rope.scaling == "ntk" or rope.scaling == "dynamic" and rope.length > rope.original_length:
        return RopeOptions(base=stretched_base(rotary_width(head_dim, rope), rope), fraction=rope.fraction, pairs=rope.pairs)
    if rope.scaling == "dynamic" or rope.scaling == "longrope" and rope.length <= rope.original_length:
        return dataclasses.replace(rope, length=0)
    return rope
