"""What a config must satisfy beyond its types, checked before torch is imported or anything is allocated."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ltrain import schema
from ltrain.model.options import MIXERS, AttentionOptions, LinearRecurrenceOptions, ModelConfig, MoEOptions, RopeOptions
from ltrain.schema import ConfigError, Where

if TYPE_CHECKING:
    from ltrain.config import Config

# Class.field -> the values it takes.
CHOICES: dict[str, tuple[str, ...]] = {
    "Config.precision": ("fp64", "fp32", "bf16"),
    "Config.device": ("auto", "cpu", "cuda"),
    "DataConfig.source": ("stdlib", "text", "jsonl", "parquet", "hub"),
    "TokenizerConfig.kind": ("bpe", "bytes", "file"),
    "TrainConfig.recompute": ("none", "full"),
    "ParallelConfig.context_layout": ("zigzag", "contiguous"),
    "RopeOptions.scaling": ("none", "linear", "yarn"),
    "LinearRecurrenceOptions.decay": ("none", "head"),
    "LinearRecurrenceOptions.update": ("add", "delta"),
    "MoEOptions.score": ("softmax", "sigmoid"),
}

# Class.field -> the words for the numbers it takes, and the test. Numbers without an entry must not be negative.
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        [
            *("ModelConfig.hidden", "ModelConfig.depth", "MoEOptions.inner", "DataConfig.tokens", "DataConfig.shards"),
            *("TrainConfig.steps", "TrainConfig.tokens_per_step", "EvalConfig.tokens", "TrackingConfig.every"),
            *("ParallelConfig.tensor", "ParallelConfig.context", "ParallelConfig.expert", "ParallelConfig.pipeline", "ParallelConfig.timeout"),
            *("AttentionOptions.heads", "AttentionOptions.kv_heads", "AttentionOptions.head_dim", "RopeOptions.original_length"),
            *("LinearRecurrenceOptions.key_heads", "LinearRecurrenceOptions.value_heads", "LinearRecurrenceOptions.key_dim"),
            *("LinearRecurrenceOptions.value_dim", "LinearRecurrenceOptions.conv_width"),
        ],
        ("at least 1", lambda x: x >= 1),
    ),
    **dict.fromkeys(
        ["TrainConfig.lr", "TrainConfig.eps", "ModelConfig.norm_eps", "ModelConfig.init_std", "MoEOptions.scale", "RopeOptions.beta_slow"],
        ("above 0", lambda x: x > 0),
    ),
    "DataConfig.held_out": ("between 0 and 1, both excluded", lambda x: 0 < x < 1),
    "TokenizerConfig.vocab": ("at least 257: every byte and the end of a document", lambda x: x >= 257),
    "RopeOptions.base": ("above 1", lambda x: x > 1),
    "RopeOptions.fraction": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "RopeOptions.factor": ("at least 1", lambda x: x >= 1),
    "RopeOptions.attention_factor": ("above 0", lambda x: x > 0),
    "TrainConfig.betas": ("two numbers from 0 to below 1", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x)),
    "ModelConfig.pattern": ("a list of at least one layer kind", lambda x: len(x) > 0),
    "RunConfig.dir": ("the path of a folder", lambda x: bool(x.strip())),
    "RunConfig.sample_prompt": ("text of at least one character", lambda x: bool(x)),
    "TrackingConfig.experiment": ("a name", lambda x: bool(x.strip())),
}


VOCAB_MULTIPLE = 128  # a vocabulary is rounded up to it, whatever the layout, so that a model is the same on all


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack with every option resolved."""

    kind: str  # its name in the pattern
    mixer: str  # a key of ltrain.model.options.MIXERS
    options: Any  # an instance of that mixer's dataclass, what the name fixes filled in
    ffn: MoEOptions


def resolve_layers(model: ModelConfig, where: Where = lambda key: "in the config") -> list[LayerSpec]:
    """The `depth` layers that the pattern gives, repeated from its start.

    An entry of the pattern is a key of `model.layers`, or a mixer's name, which then has its default options.
    Raises ConfigError for an unknown entry, mixer or option, and for an option that the mixer's name fixes.
    """
    kinds: dict[str, LayerSpec] = {kind: _layer(model, kind, where) for kind in dict.fromkeys([*model.pattern, *model.layers])}
    return [kinds[model.pattern[i % len(model.pattern)]] for i in range(model.depth)]


def _layer(model: ModelConfig, kind: str, where: Where) -> LayerSpec:
    key = f"model.layers.{kind}"
    if kind not in model.layers and kind not in MIXERS:
        known = [*model.layers, *(m for m in MIXERS if m not in model.layers)]
        raise ConfigError(f"unknown layer kind {kind!r} in model.pattern{schema.suggestion(kind, known)}")
    given = dict(model.layers.get(kind, {}))
    mixer = given.pop("mixer", kind)
    if not isinstance(mixer, str) or mixer not in MIXERS:
        if "mixer" not in model.layers[kind]:
            raise ConfigError(f"{key} has no mixer: add `mixer: ` and one of {', '.join(MIXERS)}")
        raise ConfigError(f"unknown mixer {mixer!r} at {key}.mixer{schema.suggestion(str(mixer), MIXERS)}")
    ffn_given = given.pop("ffn", {})
    _, options_type, fixed = MIXERS[mixer]
    for name in given:
        if name in fixed:
            value = fixed[name]
            raise ConfigError(f"{key}.{name} is fixed at {value} by the mixer {mixer}: take it out, or write `mixer: {_free(mixer, name)}`")
    options = schema.build(options_type, {**schema.conform(options_type, given, key, where), **fixed})
    ffn = dataclasses.replace(model.ffn, **schema.conform(MoEOptions, ffn_given, f"{key}.ffn", where))
    return LayerSpec(kind, mixer, options, ffn)


def _free(mixer: str, option: str) -> str:
    """A mixer of the same module that leaves `option` open."""
    return next(name for name, (module, _, fixed) in MIXERS.items() if module == MIXERS[mixer][0] and option not in fixed)


def check_values(part: Any, key: str = "") -> None:
    """Each value of a dataclass, and of those in it, on its own: the choices of a text, the range of a number."""
    for f in dataclasses.fields(part):
        value, name, rule = getattr(part, f.name), f"{key}.{f.name}" if key else f.name, f"{type(part).__name__}.{f.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, name)
        elif rule in CHOICES:
            if value not in CHOICES[rule]:
                near = schema.closest(str(value), CHOICES[rule])
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(CHOICES[rule])}{f' (did you mean {near}?)' if near else ''}")
        elif rule in LIMITS:
            if value is not None and not LIMITS[rule][1](value):
                raise ConfigError(f"{name} is {value!r}, expected {LIMITS[rule][0]}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            raise ConfigError(f"{name} is {value}, expected a number that is not negative")


@dataclass(frozen=True)
class _Dependent:
    """An option that has an effect only under some values of a switch."""

    option: str
    switch: str
    needs: str  # what the switch must be
    applies: Callable[["Config"], bool]


def _dependents() -> Iterator[_Dependent]:
    for option in ("name", "subset", "split"):
        yield _Dependent(f"data.{option}", "data.source", "hub", lambda c: c.data.source == "hub")
    yield _Dependent("data.files", "data.source", "text, jsonl or parquet", lambda c: c.data.source in ("text", "jsonl", "parquet"))
    yield _Dependent("data.field", "data.source", "jsonl, parquet or hub", lambda c: c.data.source in ("jsonl", "parquet", "hub"))
    yield _Dependent("data.tokenizer.vocab", "data.tokenizer.kind", "bpe", lambda c: c.data.tokenizer.kind == "bpe")
    yield _Dependent("data.tokenizer.path", "data.tokenizer.kind", "file", lambda c: c.data.tokenizer.kind == "file")
    yield _Dependent("run.sample_prompt", "run.sample_tokens", "above 0", lambda c: c.run.sample_tokens > 0)
    for f in dataclasses.fields(MoEOptions):
        if f.name not in ("experts", "inner"):
            yield _Dependent(f"model.ffn.{f.name}", "model.ffn.experts", "above 0", lambda c: any(s.ffn.experts for s in resolve_layers(c.model)))


def _place(config: "Config", key: str) -> tuple[Any, str]:
    *parents, name = key.split(".")
    part: Any = config
    for parent in parents:
        part = getattr(part, parent)
    return part, name


def _default(part: Any, name: str) -> Any:
    return getattr(type(part)(), name)


def drop_superseded(config: "Config", given: dict[str, int], where: Where) -> None:
    """Give an option its default back where a later layer's switch left it without effect.

    So `data.tokenizer.kind=bytes` needs no second override to take a file's `vocab` back, while an option that is written where
    its switch is already known stays, and `validate` refuses it. `given`: dotted key -> number of the last layer that gave it.
    """
    for unused in [kind for kind in config.model.layers if kind not in config.model.pattern]:
        if given.get(f"model.layers.{unused}", 0) < given.get("model.pattern", 0):
            del config.model.layers[unused]
    resolve_layers(config.model, where)  # the unknown options of a layer kind, told with where they stand
    for dependent in _dependents():
        part, name = _place(config, dependent.option)
        if not dependent.applies(config) and given.get(dependent.option, 0) < given.get(dependent.switch, 0):
            setattr(part, name, _default(part, name))
    train = config.train
    if train.warmup_steps > train.steps:
        if given.get("train.warmup_steps", 0) >= given.get("train.steps", 0):
            raise ConfigError(f"train.warmup_steps={train.warmup_steps} is longer than train.steps={train.steps}: write at most {train.steps}")
        train.warmup_steps = train.steps  # train.steps=5 on the command line is a short trial of a longer run


def validate(config: "Config", world_size: int | None = None) -> None:
    """Refuse what cannot run, in one sentence (ConfigError).

    With `world_size`, the number of ranks, the layout too; without, only what no number of ranks would allow.
    """
    check_values(config)
    _check_switches(config)
    specs = {spec.kind: spec for spec in resolve_layers(config.model)}
    for kind in config.model.layers:
        if kind not in config.model.pattern:
            near = schema.suggestion(kind, dict.fromkeys(config.model.pattern))
            raise ConfigError(f"model.layers.{kind} is in no entry of model.pattern{near} (write model.layers.{kind}=null to take it out)")
    for spec in specs.values():
        _check_layer(spec, config)
    _check_layout(config, list(specs.values()))
    if world_size is not None:
        _check_ranks(config, list(specs.values()), world_size)


def _check_switches(config: "Config") -> None:
    data, train, model = config.data, config.train, config.model
    if data.source in ("text", "jsonl", "parquet") and not data.files:
        suffix = "txt" if data.source == "text" else data.source
        raise ConfigError(f"data.source={data.source} needs data.files: write a list of globs, for example data.files=[corpus/*.{suffix}]")
    if data.source == "hub" and not data.name:
        raise ConfigError("data.source=hub needs data.name: write the name of the data set, as owner/name")
    if data.tokenizer.kind == "file" and not data.tokenizer.path:
        raise ConfigError("data.tokenizer.kind=file needs data.tokenizer.path: write the path of a tokenizer.json")
    for dependent in _dependents():
        part, name = _place(config, dependent.option)
        value, default = getattr(part, name), _default(part, name)
        if value != default and not dependent.applies(config):
            switch_part, switch = _place(config, dependent.switch)
            raise ConfigError(
                f"{dependent.option}={value!r} has no effect with {dependent.switch}={getattr(switch_part, switch)}: "
                f"take it out (its default is {default!r}), or make {dependent.switch} {dependent.needs}"
            )
    if train.min_lr > train.lr:
        raise ConfigError(f"train.min_lr={train.min_lr:g} is above train.lr={train.lr:g}: write at most {train.lr:g}")
    smallest = {"bpe": data.tokenizer.vocab, "bytes": 257}.get(data.tokenizer.kind, 0)
    if 0 < model.vocab < smallest:
        raise ConfigError(f"model.vocab={model.vocab} is below the tokenizer's {smallest}: write 0 for the tokenizer's, or at least {smallest}")
    if config.precision == "fp64" and config.device == "cuda":
        raise ConfigError("precision=fp64 is for checks on a CPU: write device=cpu, or precision=fp32 or bf16")


def _check_layer(spec: LayerSpec, config: "Config") -> None:
    key, options, tensor = f"model.layers.{spec.kind}", spec.options, config.parallel.tensor
    check_values(options, key)
    check_values(spec.ffn, f"{key}.ffn")
    if isinstance(options, AttentionOptions):
        _multiple(f"{key}.heads", options.heads, f"{key}.kv_heads", options.kv_heads)
        _multiple(f"{key}.kv_heads", options.kv_heads, "parallel.tensor", tensor)
        if options.rope is not None:
            _check_rope(options.rope, options.head_dim, f"{key}.rope")
    elif isinstance(options, LinearRecurrenceOptions):
        _multiple(f"{key}.value_heads", options.value_heads, f"{key}.key_heads", options.key_heads)
        _multiple(f"{key}.key_heads", options.key_heads, "parallel.tensor", tensor)
    ffn = spec.ffn
    if ffn.experts and not 1 <= ffn.top_k <= ffn.experts:
        raise ConfigError(f"{_ffn_key(config, spec)}.top_k={ffn.top_k} is not from 1 to experts={ffn.experts}: write a number in that range")
    dense = "shared_inner" if ffn.experts else "inner"
    _multiple(f"{_ffn_key(config, spec)}.{dense}", getattr(ffn, dense), "parallel.tensor", tensor)


def _ffn_key(config: "Config", spec: LayerSpec) -> str:
    return f"model.layers.{spec.kind}.ffn" if config.model.layers.get(spec.kind, {}).get("ffn") else "model.ffn"


def _check_rope(rope: RopeOptions, head_dim: int, key: str) -> None:
    width = rope.fraction * head_dim
    if width != int(width) or int(width) % 2:
        raise ConfigError(f"{key}.fraction={rope.fraction:g} rotates {width:g} of head_dim={head_dim}: write a fraction that gives an even number")
    if rope.scaling == "none" and rope.factor != 1:
        raise ConfigError(f"{key}.factor={rope.factor:g} has no effect with scaling: none: write scaling: linear or yarn, or factor: 1")
    if rope.scaling != "none" and rope.factor == 1:
        raise ConfigError(f"{key}.scaling={rope.scaling} has no effect with factor: 1: write target length / original length as factor")
    for name in ("original_length", "beta_fast", "beta_slow", "attention_factor"):
        value, default = getattr(rope, name), _default(rope, name)
        if rope.scaling != "yarn" and value != default:
            raise ConfigError(f"{key}.{name}={value} has no effect with scaling: {rope.scaling}: write scaling: yarn, or take it out")
    if rope.beta_fast <= rope.beta_slow:
        raise ConfigError(f"{key}.beta_fast={rope.beta_fast:g} is not above beta_slow={rope.beta_slow:g}: write a larger beta_fast")


def _multiple(what: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise ConfigError(f"{what}={value} is not a multiple of {of}={unit}: write {math.ceil(value / unit) * unit}, or a {of} that divides {value}")


def _check_layout(config: "Config", specs: list[LayerSpec]) -> None:
    model, data, parallel = config.model, config.data, config.parallel
    _multiple("model.hidden", model.hidden, "parallel.tensor", parallel.tensor)
    _multiple("model.vocab", model.vocab, "parallel.tensor", parallel.tensor)
    if not model.vocab and VOCAB_MULTIPLE % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} does not divide the vocabulary, which is rounded up to a multiple of {VOCAB_MULTIPLE}: "
            "write model.vocab as a multiple of it, at least the tokenizer's"
        )
    if model.depth < parallel.pipeline:
        raise ConfigError(f"parallel.pipeline={parallel.pipeline} is more than model.depth={model.depth} layers: write at most {model.depth}")
    halves = 2 if parallel.context > 1 and parallel.context_layout == "zigzag" else 1
    parts = parallel.tensor * parallel.context * halves
    if data.tokens % parts:
        of = f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context}{' x 2 (zigzag)' if halves == 2 else ''}"
        raise ConfigError(f"data.tokens={data.tokens} does not divide by {of}: write {math.ceil(data.tokens / parts) * parts}")
    if config.train.tokens_per_step % data.tokens:
        step = math.ceil(config.train.tokens_per_step / data.tokens) * data.tokens
        raise ConfigError(f"train.tokens_per_step={config.train.tokens_per_step} is not a multiple of data.tokens={data.tokens}: write {step}")
    if config.eval.tokens < data.tokens:
        raise ConfigError(f"eval.tokens={config.eval.tokens} is less than one micro-batch, data.tokens={data.tokens}: write at least {data.tokens}")
    if parallel.expert > 1 and not any(spec.ffn.experts for spec in specs):
        raise ConfigError(f"parallel.expert={parallel.expert} has no effect in a model without experts: write parallel.expert=1")
    for spec in specs:
        _multiple(f"{_ffn_key(config, spec)}.experts", spec.ffn.experts, "parallel.expert", parallel.expert)


def _check_ranks(config: "Config", specs: list[LayerSpec], world_size: int) -> None:
    parallel, data = config.parallel, config.data
    fixed = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % fixed:
        product = f"parallel.tensor={parallel.tensor} x context={parallel.context} x pipeline={parallel.pipeline}"
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError(f"{product} needs a multiple of {fixed} ranks, but there are {ranks}: start with torchrun --nproc-per-node {fixed}")
    stage, data_ranks = world_size // parallel.pipeline, world_size // fixed
    if stage % parallel.expert:
        raise ConfigError(f"parallel.expert={parallel.expert} does not divide the {stage} ranks of a pipeline stage: write a divisor of {stage}")
    if data.shards % data_ranks:
        raise ConfigError(f"data.shards={data.shards} does not divide over {data_ranks} data ranks: write a multiple of {data_ranks}")
    unit = data.tokens * data_ranks
    if config.train.tokens_per_step % unit:
        step = math.ceil(config.train.tokens_per_step / unit) * unit
        given = f"train.tokens_per_step={config.train.tokens_per_step}"
        raise ConfigError(f"{given} is not a multiple of data.tokens={data.tokens} x {data_ranks} data ranks: write {step}")
