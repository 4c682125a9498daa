"""The stages of a run: each is the config with some keys changed, and trains on from the one before it."""

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltrain import schema, validation
from ltrain.model.options import RopeOptions
from ltrain.pattern import all_layers, ropes
from ltrain.schema import ConfigError, Where

if TYPE_CHECKING:
    from ltrain.config import Config, DataConfig

# Keys of the config that no stage changes, and why.
FIXED = {
    "model": "the model's shape stays the same, and `rope` of the stage is what changes positions",
    "stages": "stages do not nest",
    "run": "a stage's folder is run.dir/NN-NAME",
    "tracking": "all stages go to one store",
    "seed": "each stage has its own, derived from the run's",
    "device": "all stages run on the same ranks",
}
OWN = ("rope", "optimizer", "batch")


def conform(stage: type, stages: dict[str, Any], where: Where) -> dict[str, Any]:
    """The overlays of all stages as plain data of the schema `stage`. Raises ConfigError as `schema.conform` does, and for what no stage changes."""
    found: dict[str, Any] = {}
    for name, overlay in stages.items():
        key = f"stages.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise ConfigError(f"stages {where('stages')} has the name {name!r}, of which a folder is made: write letters, digits, - and _")
        for fixed, reason in FIXED.items():
            if isinstance(overlay, dict) and fixed in overlay:
                raise ConfigError(f"{key}.{fixed} {where(f'{key}.{fixed}')} cannot differ between stages ({reason}): take it out")
        if isinstance(overlay, dict) and isinstance(overlay.get("data"), dict) and "tokenizer" in overlay["data"]:
            at = f"{key}.data.tokenizer"
            raise ConfigError(f"{at} {where(at)} cannot differ between stages (the model was trained with one): write data.tokenizer once, for all")
        found[name] = None if overlay is None else schema.conform(stage, overlay, key, where)
    return found


def stage_configs(config: "Config", given: Mapping[str, int] | None = None) -> list[tuple[str, "Config"]]:
    """Each stage's name and its whole config: that of a run which begins from the folder of the stage before (`run.init`).

    given: dotted key -> number of the last layer of the config that gave it, where that is still to be told.
    Raises ConfigError, naming the stage, for an overlay that cannot be laid over the config.
    """
    base = dataclasses.asdict(config)
    overlays = base.pop("stages")
    before = config
    stages: list[tuple[str, Config]] = []
    for number, (name, overlay) in enumerate(overlays.items(), start=1):
        try:
            before = _stage(config, base, before, number, name, overlay, given or {})
        except ConfigError as error:
            raise _in_stage(name, error) from error
        stages.append((name, before))
    return stages


def drop_superseded(config: "Config", given: Mapping[str, int]) -> None:
    """What a later layer left without effect in a stage (`stages.NAME.train.steps=5` a budget of tokens) goes from its overlay too."""
    for name, stage in stage_configs(config, given):
        _write_back(config.stages[name], dataclasses.asdict(stage))


def _write_back(overlay: dict[str, Any], settled: dict[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(settled.get(key), dict):
            _write_back(value, settled[key])
        elif key in settled:
            overlay[key] = settled[key]


def validate(config: "Config", world_size: int | None) -> None:
    """Each stage as a config of its own, so that the last one's mistake is told before the first one starts."""
    for name, stage in stage_configs(config):
        try:
            validation.validate(stage, world_size)
        except ConfigError as error:
            raise _in_stage(name, error) from error


def _in_stage(name: str, error: ConfigError) -> ConfigError:
    return ConfigError(f"in stage {name}, {error}")


def _stage(
    config: "Config", base: dict[str, Any], before: "Config", number: int, name: str, overlay: dict[str, Any], layers: Mapping[str, int]
) -> "Config":
    from ltrain.config import Stage

    validation.check_values(schema.build(Stage, {key: overlay[key] for key in OWN if key in overlay}))
    first = number == 1
    parts = {key: value for key, value in overlay.items() if key not in OWN}
    data = laid_over(type(config), copy.deepcopy(base), parts)
    given = {key: layers.get(f"stages.{name}.{key}", 1) for key in _parts_of(parts)}
    if "train.tokens_per_step" not in given:
        data["train"]["tokens_per_step"] = _tokens_per_step(before, data, overlay.get("batch", "tokens"))
        if data["train"]["tokens_per_step"] != base["train"]["tokens_per_step"]:
            given["train.tokens_per_step"] = 1
    elif "batch" in overlay:
        raise ConfigError(f"batch={overlay['batch']} has no effect beside train.tokens_per_step: take one of the two out")
    if "rope" in overlay:
        _lay_over_rope(config, data["model"], overlay["rope"])
    if first and "optimizer" in overlay:
        raise ConfigError(f"optimizer={overlay['optimizer']} has no effect, since no stage comes before it: take it out, or write run.init_optimizer")
    data["seed"] = config.seed + number - 1  # another order of the documents, so that the same data does not come again as it was
    data["run"] |= {
        "dir": str(Path(config.run.dir) / f"{number:02}-{name}"),
        "name": name,
        "init": config.run.init if first else before.run.dir,
        "init_optimizer": config.run.init_optimizer if first else overlay.get("optimizer", "keep"),
    }
    data["tracking"]["parent"] = config.run.dir
    stage: Config = schema.build(type(config), data)
    validation.check_values(stage)
    validation.drop_superseded(stage, given, lambda key: "in the stage")
    return stage


def laid_over(hint: Any, base: Any, overlay: Any) -> Any:
    """`overlay` over `base`, both plain data of the type `hint`; null takes an entry out of a mapping without fixed keys."""
    inner, _ = schema.optional(hint)
    if not isinstance(base, dict) or not isinstance(overlay, dict):
        return overlay
    fixed = dataclasses.is_dataclass(inner)
    args = typing.get_args(inner)
    found = dict(base)
    for name, value in overlay.items():
        if value is None and not fixed:
            found.pop(name, None)
        else:
            below = schema.hints(inner)[name] if fixed else args[1] if len(args) == 2 else Any
            found[name] = laid_over(below, base.get(name), value)
    return found


def _parts_of(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of every key in `data`, those of mappings included."""
    for name, value in data.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _parts_of(value, f"{prefix}{name}.")


def length(data: "DataConfig") -> int:
    """Tokens of the longest sequence."""
    longest: int = getattr(data, "sequence_length", 0) or data.tokens
    return longest


def _tokens_per_step(before: "Config", data: dict[str, Any], batch: str) -> int:
    per_step = before.train.tokens_per_step
    if batch == "tokens":
        return per_step
    old, new = length(before.data), length(schema.build(type(before.data), data["data"]))
    if old == new:
        raise ConfigError(f"batch=sequences has no effect, since its sequences have {new} tokens as before: take it out")
    if per_step * new % old:
        raise ConfigError(f"batch=sequences makes {per_step} x {new} / {old} tokens of a step, no whole number: write train.tokens_per_step")
    return per_step * new // old


def _lay_over_rope(config: "Config", model: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Change the RoPE of the layer kinds that have one; a kind with `rope: null` stays without."""
    rotary = [(spec.kind, place, rope) for spec in all_layers(config.model) for place, rope in ropes(spec).items()]
    if not rotary:
        raise ConfigError("rope has no effect, since no layer of the model has RoPE: take it out")
    for kind, (*parents, last), rope in rotary:
        options = model["layers"].setdefault(kind, {})
        for parent in parents:
            options = options.setdefault(parent, {})
        before = {name: value for name, value in dataclasses.asdict(rope).items() if value != getattr(RopeOptions(), name)}
        if overlay.get("scaling", rope.scaling) != rope.scaling:
            # what belonged to another scaling, or to none, goes with it
            before = {name: value for name, value in before.items() if name in ("base", "fraction", "pairs")}
        options[last] = before | overlay
