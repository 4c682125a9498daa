"""The layers that a model's pattern and its layer kinds make."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ltrain import schema
from ltrain.model.options import MIXERS, BlockOptions, Branch, ModelConfig, MoEOptions, ParallelOptions, RopeOptions
from ltrain.model.options.parallel import SCALES
from ltrain.schema import ConfigError, Where


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack with every option resolved."""

    kind: str  # its name in the pattern
    mixer: str  # a key of ltrain.model.options.MIXERS
    options: Any  # an instance of that mixer's dataclass, what the name fixes filled in
    ffn: MoEOptions
    block: BlockOptions


def resolve_layers(model: ModelConfig, where: Where = lambda key: "in the config") -> list[LayerSpec]:
    """The `depth` layers that the pattern gives, repeated from its start.

    An entry of the pattern is a key of `model.layers`, or a mixer's name, which then has its default options.
    Raises ConfigError for an unknown entry, mixer or option, and for an option that the mixer's name fixes.
    """
    kinds: dict[str, LayerSpec] = {kind: _layer(model, kind, where) for kind in dict.fromkeys([*model.pattern, *model.layers])}
    return [kinds[model.pattern[i % len(model.pattern)]] for i in range(model.depth)]


def further_layer(model: ModelConfig, where: Where = lambda key: "in the config") -> LayerSpec:
    """The layer in each head of multi-token prediction. Raises ConfigError as `resolve_layers`."""
    return _layer(model, model.mtp.layer or model.pattern[(model.depth - 1) % len(model.pattern)], where, "model.mtp.layer")


def shared_layer(model: ModelConfig, where: Where = lambda key: "in the config") -> LayerSpec:
    """The layer in each shared block. Raises ConfigError as `resolve_layers`."""
    return _layer(model, model.shared.layer, where, "model.shared.layer")


def all_layers(model: ModelConfig, where: Where = lambda key: "in the config") -> list[LayerSpec]:
    """The model's own layers, and those in its shared blocks and in its heads of multi-token prediction where it has any."""
    shared = [shared_layer(model, where)] if model.shared.blocks and model.shared.layer else []
    return [*resolve_layers(model, where), *shared, *([further_layer(model, where)] if model.mtp.depth else [])]


def _layer(model: ModelConfig, kind: str, where: Where, named: str = "model.pattern") -> LayerSpec:
    key = f"model.layers.{kind}"
    if kind not in model.layers and kind not in MIXERS:
        known = [*model.layers, *(m for m in MIXERS if m not in model.layers)]
        raise ConfigError(f"unknown layer kind {kind!r} in {named}{schema.suggestion(kind, known)}")
    given = dict(model.layers.get(kind, {}))
    ffn_given, block_given = given.pop("ffn", {}), given.pop("block", {})
    if ffn_given == "none":
        ffn_given = {"experts": 0, "inner": 0}
    mixer, options = build_options(kind, given, key, where)
    ffn = dataclasses.replace(model.ffn, **schema.conform(MoEOptions, ffn_given, f"{key}.ffn", where))
    block = dataclasses.replace(model.block, **schema.conform(BlockOptions, block_given, f"{key}.block", where))
    return LayerSpec(kind, mixer, options, ffn, block)


def build_options(kind: str, given: dict[str, Any], key: str, where: Where) -> tuple[str, Any]:
    """The mixer and its options that `given`, which stands at `key`, makes; a mixer that it does not name is called `kind`."""
    given = dict(given)
    named = "mixer" in given
    mixer = given.pop("mixer", kind)
    if not isinstance(mixer, str) or mixer not in MIXERS:
        if not named:
            raise ConfigError(f"{key} has no mixer: add `mixer: ` and one of {', '.join(MIXERS)}")
        raise ConfigError(f"unknown mixer {mixer!r} at {key}.mixer{schema.suggestion(str(mixer), MIXERS)}")
    _, options_type, fixed = MIXERS[mixer]
    for name in given:
        if name in fixed:
            value = fixed[name]
            raise ConfigError(f"{key}.{name} is fixed at {value} by the mixer {mixer}: take it out, or write `mixer: {_free(mixer, name)}`")
    options = schema.build(options_type, {**schema.conform(options_type, given, key, where), **fixed})
    if isinstance(options, ParallelOptions):
        # null takes out a branch that an extended file put in
        branches = {name: branch for name, branch in options.branches.items() if branch is not None}
        options.branches = {name: _branch(name, branch, f"{key}.branches.{name}", where) for name, branch in branches.items()}
    return mixer, options


def _branch(name: str, given: Any, key: str, where: Where) -> Branch:
    if not isinstance(given, dict):
        raise ConfigError(f"{key} is {given!r}, expected a mapping: write the options of a mixer")
    scales = {scale: schema.conform(float, given[scale], f"{key}.{scale}", where) for scale in SCALES if scale in given}
    return Branch(*build_options(name, {option: value for option, value in given.items() if option not in SCALES}, key, where), **scales)


def ropes(spec: LayerSpec) -> dict[tuple[str, ...], RopeOptions]:
    """Where below model.layers.KIND a layer's RoPE stands, and what it is; layers without positions have none."""
    named: dict[tuple[str, ...], Any] = {("rope",): spec.options}
    if isinstance(spec.options, ParallelOptions):
        named = {("branches", name, "rope"): branch.options for name, branch in spec.options.resolved()}
    return {place: options.rope for place, options in named.items() if getattr(options, "rope", None) is not None}


def _free(mixer: str, option: str) -> str:
    """A mixer of the same module that leaves `option` open."""
    return next(name for name, (module, _, fixed) in MIXERS.items() if module == MIXERS[mixer][0] and option not in fixed)
