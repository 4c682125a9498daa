"""What a config must satisfy beyond its types, checked before torch is imported or anything is allocated."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ltrain import schema
from ltrain.model.options import MIXERS, NO_MIXER, BlockOptions, FeedForwardOptions, MoEOptions
from ltrain.pattern import LayerSpec, all_layers, further_layer, resolve_layers, shared_layer
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, Where, check_multiple, default_of, divides_heads

if TYPE_CHECKING:
    from ltrain.config import Config, SyntheticConfig, TrainConfig

TEXT_SOURCES = ("stdlib", "text", "jsonl", "parquet", "hub", "packages")
SYNTHETIC_TASKS = ("passkey", "kv", "multi_query", "variables", "copy")
LEAST_SYNTHETIC = 256  # tokens of a synthetic document: fewer have no room for a question of some kinds

# Class.field -> the values it takes; the options of a model say theirs themselves.
CHOICES: Choices = {
    "Config.precision": ("fp64", "fp32", "bf16"),
    "Config.engine": ("megatron", "deepspeed"),
    "DeepSpeedConfig.offload": ("none", "cpu"),
    "FP8Config.recipe": ("none", "delayed", "current", "blockwise"),
    "Config.device": ("auto", "cpu", "cuda"),
    "DataConfig.source": TEXT_SOURCES,
    "MixtureConfig.source": (*TEXT_SOURCES, "synthetic"),
    "SyntheticConfig.haystack": ("stdlib", "packages", "filler"),
    "TokenizerConfig.digits": ("split", "merge"),
    "TokenizerConfig.kind": ("bpe", "bytes", "file"),
    "TrainConfig.schedule": ("cosine", "wsd", "constant"),
    "TrainConfig.recompute": ("none", "selective", "full"),
    "RunConfig.init_optimizer": ("reset", "keep"),
    "Stage.optimizer": ("keep", "reset"),
    "Stage.batch": ("tokens", "sequences"),
    "ParallelConfig.context_layout": ("zigzag", "contiguous", "balanced"),
    "ParallelConfig.wire": ("own", "fp8"),
}

NEEDLE_TASKS = ("passkey", "single_key", "multi_key", "variables")
NEEDLE_LENGTH = 256  # tokens: below, some templates leave no room for a haystack

# Class.field -> the words for the numbers it takes, and the test. Numbers without an entry must not be negative.
LIMITS: Limits = {
    **dict.fromkeys(
        [
            *("DataConfig.tokens", "DataConfig.shards", "TrainConfig.steps", "TrainConfig.tokens_per_step", "EvalConfig.tokens"),
            *("TrackingConfig.every", "EvalConfig.documents", "NeedleConfig.samples", "FP8Config.amax_history"),
            *("ParallelConfig.tensor", "ParallelConfig.context", "ParallelConfig.expert", "ParallelConfig.pipeline", "ParallelConfig.timeout"),
            *("ParallelConfig.ulysses", "ParallelConfig.inner_ring"),
        ],
        AT_LEAST_1,
    ),
    **dict.fromkeys(["TrainConfig.lr", "TrainConfig.eps"], ABOVE_0),
    "DeepSpeedConfig.zero": ("1, 2 or 3", lambda x: x in (1, 2, 3)),
    "EvalConfig.short_length": ("0, or at least 2", lambda x: x == 0 or x >= 2),
    "EvalConfig.positions": ("0, or at least 2", lambda x: x == 0 or x >= 2),
    "NeedleConfig.tasks": (
        f"a list of some of {', '.join(NEEDLE_TASKS)}, each once",
        lambda x: set(x) <= set(NEEDLE_TASKS) and len(set(x)) == len(x),
    ),
    "NeedleConfig.depths": ("from 1 to 11: the tenths that training leaves out", lambda x: 1 <= x <= 11),
    "NeedleConfig.lengths": (
        f"a list of at least one length, each once and at least {NEEDLE_LENGTH}",
        lambda x: len(x) > 0 and len(set(x)) == len(x) and min(x) >= NEEDLE_LENGTH,
    ),
    "DataConfig.held_out": ("between 0 and 1, both excluded", lambda x: 0 < x < 1),
    "TokenizerConfig.vocab": ("at least 257: every byte and the end of a document", lambda x: x >= 257),
    "MixtureConfig.weight": ("above 0: take out a source that is to have no share", lambda x: x > 0),
    "SyntheticConfig.tasks": (
        f"a list of some of {', '.join(SYNTHETIC_TASKS)}, each once",
        lambda x: bool(x) and set(x) <= set(SYNTHETIC_TASKS) and len(set(x)) == len(x),
    ),
    "SyntheticConfig.needles_per_1k": ("above 0", lambda x: x > 0),
    "SyntheticConfig.max_needles": ("at least 1", lambda x: x >= 1),
    "TrainConfig.decay_fraction": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "TrainConfig.betas": ("two numbers from 0 to below 1", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x)),
    "RunConfig.dir": ("the path of a folder", lambda x: bool(x.strip())),
    "RunConfig.sample_prompt": ("text of at least one character", lambda x: bool(x)),
    "TrackingConfig.experiment": ("a name", lambda x: bool(x.strip())),
}


VOCAB_MULTIPLE = 128  # a vocabulary is rounded up to it, whatever the layout, so that a model is the same on all


def check_values(part: Any, key: str = "") -> None:
    """Each value of a dataclass, and of those in it, on its own: the choices of a text, the range of a number."""
    for f in dataclasses.fields(part):
        value, name, rule = getattr(part, f.name), f"{key}.{f.name}" if key else f.name, f"{type(part).__name__}.{f.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, name)
        elif isinstance(value, dict):
            for entry in (e for e in value if dataclasses.is_dataclass(value[e])):
                check_values(value[entry], f"{name}.{entry}")
        elif choices := getattr(part, "CHOICES", {}).get(f.name) or CHOICES.get(rule):
            if value not in choices:
                near = schema.closest(str(value), choices)
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}{f' (did you mean {near}?)' if near else ''}")
        elif limit := getattr(part, "LIMITS", {}).get(f.name) or LIMITS.get(rule):
            if value is not None and not limit[1](value):
                raise ConfigError(f"{name} is {value!r}, expected {limit[0]}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            raise ConfigError(f"{name} is {value}, expected a number that is not negative")


@dataclass(frozen=True)
class _Dependent:
    """An option that has an effect only under some values of a switch."""

    option: str
    switch: str
    needs: str  # what the switch must be
    applies: Callable[["Config"], bool]


def _source_only(key: str, option: str, *sources: str) -> _Dependent:
    return _Dependent(f"{key}.{option}", f"{key}.source", " or ".join(sources), lambda c: _place(c, f"{key}.source")[0].source in sources)


def _source_dependents(key: str) -> Iterator[_Dependent]:
    """Of the options of one source, at data or at an entry of data.mixture."""
    for option in ("name", "subset", "split"):
        yield _source_only(key, option, "hub")
    yield _source_only(key, "files", "text", "jsonl", "parquet")
    yield _source_only(key, "field", "jsonl", "parquet", "hub")
    yield _source_only(key, "roots", "packages")
    for option in ("min_tokens", "max_tokens"):
        yield _source_only(key, option, *(s for s in TEXT_SOURCES if s != "hub"))


def _dependents(config: "Config") -> Iterator[_Dependent]:
    for name in ("source", "files", "roots", "name", "subset", "split", "min_tokens", "max_tokens", "field"):
        yield _Dependent(f"data.{name}", "data.mixture", "empty", lambda c: not c.data.mixture)
    yield from _source_dependents("data")
    for entry in config.data.mixture:
        key = f"data.mixture.{entry}"
        yield from _source_dependents(key)
        for f in dataclasses.fields(config.data.mixture[entry].synthetic):
            yield _source_only(key, f"synthetic.{f.name}", "synthetic")
    yield _Dependent("data.tokenizer.digits", "data.tokenizer.kind", "bpe", lambda c: c.data.tokenizer.kind == "bpe")
    yield _Dependent("data.tokenizer.vocab", "data.tokenizer.kind", "bpe", lambda c: c.data.tokenizer.kind == "bpe")
    yield _Dependent("data.tokenizer.path", "data.tokenizer.kind", "file", lambda c: c.data.tokenizer.kind == "file")
    yield _Dependent("train.decay_steps", "train.schedule", "wsd", lambda c: c.train.schedule == "wsd")
    yield _Dependent("train.decay_fraction", "train.schedule", "wsd", lambda c: c.train.schedule == "wsd")
    yield _Dependent("train.decay_fraction", "train.decay_steps", "0", lambda c: c.train.decay_steps == 0)
    yield _Dependent("train.min_lr", "train.schedule", "cosine or wsd", lambda c: c.train.schedule != "constant")
    yield _Dependent("run.init_optimizer", "run.init", "the folder of a checkpoint", lambda c: bool(c.run.init))
    for option in ("lengths", "depths", "samples", "every"):
        yield _Dependent(f"eval.needles.{option}", "eval.needles.tasks", "a list of tasks", lambda c: bool(c.eval.needles.tasks))
    yield _Dependent("eval.documents", "eval.positions", "above 0", lambda c: c.eval.positions > 0)
    for option in ("bf16_first", "bf16_last"):
        yield _Dependent(f"fp8.{option}", "fp8.recipe", "delayed, current or blockwise", lambda c: c.fp8.recipe != "none")
    yield _Dependent("fp8.amax_history", "fp8.recipe", "delayed", lambda c: c.fp8.recipe == "delayed")
    yield _Dependent("run.sample_prompt", "run.sample_tokens", "above 0", lambda c: c.run.sample_tokens > 0)
    for option in ("zero", "offload"):
        yield _Dependent(f"deepspeed.{option}", "engine", "deepspeed", lambda c: c.engine == "deepspeed")
    for f in dataclasses.fields(MoEOptions):
        if f.name not in ("experts", "inner", *(f.name for f in dataclasses.fields(FeedForwardOptions))):
            yield _Dependent(f"model.ffn.{f.name}", "model.ffn.experts", "above 0", lambda c: any(s.ffn.experts for s in all_layers(c.model)))


def _place(config: "Config", key: str) -> tuple[Any, str]:
    *parents, name = key.split(".")
    part: Any = config
    for parent in parents:
        part = part[parent] if isinstance(part, dict) else getattr(part, parent)
    return part, name


def drop_superseded(config: "Config", given: dict[str, int], where: Where) -> None:
    """Give an option its default back where a later layer's switch left it without effect.

    So `data.tokenizer.kind=bytes` needs no second override to take a file's `vocab` back, while an option that is written where
    its switch is already known stays, and `validate` refuses it. `given`: dotted key -> number of the last layer that gave it.
    """
    for unused in [kind for kind in config.model.layers if kind not in (*config.model.pattern, config.model.mtp.layer, config.model.shared.layer)]:
        if given.get(f"model.layers.{unused}", 0) < given.get("model.pattern", 0):
            del config.model.layers[unused]
    all_layers(config.model, where)  # the unknown options of a layer kind, told with where they stand
    for dependent in _dependents(config):
        part, name = _place(config, dependent.option)
        if not dependent.applies(config) and given.get(dependent.option, 0) < given.get(dependent.switch, 0):
            setattr(part, name, default_of(part, name))
    if config.stages:  # each of which is looked at on its own, with its own steps
        return
    train = config.train
    _settle_steps(train, given)
    length_given = max(given.get(key, 0) for key in ("train.steps", "train.tokens", "train.tokens_per_step"))
    if train.warmup_steps > train.steps:
        if given.get("train.warmup_steps", 0) >= length_given:
            raise ConfigError(f"train.warmup_steps={train.warmup_steps} is longer than train.steps={train.steps}: write at most {train.steps}")
        train.warmup_steps = train.steps  # train.steps=5 on the command line is a short trial of a longer run
    longest = train.steps - train.warmup_steps
    if train.schedule == "wsd" and train.decay_steps > longest:
        if given.get("train.decay_steps", 0) >= length_given:
            raise ConfigError(f"train.decay_steps={train.decay_steps} is longer than the {longest} steps after the warm-up: write at most {longest}")
        train.decay_steps = longest


def _settle_steps(train: "TrainConfig", given: dict[str, int]) -> None:
    """Steps out of a budget of tokens, where the budget was the last of the two to be given."""
    steps, tokens, per_step = (given.get(f"train.{name}", 0) for name in ("steps", "tokens", "tokens_per_step"))
    if steps > tokens:
        train.tokens = 0
    elif train.tokens and (tokens > steps or per_step > steps):
        train.steps = steps_of(train)


def steps_of(train: "TrainConfig") -> int:
    """Steps in which at least train.tokens are seen."""
    return -(-train.tokens // train.tokens_per_step)


def validate(config: "Config", world_size: int | None = None) -> None:
    """Refuse what cannot run, in one sentence (ConfigError).

    With `world_size`, the number of ranks, the layout too; without, only what no number of ranks would allow.
    """
    check_values(config)
    if config.stages:
        from ltrain import stages

        stages.validate(config, world_size)
        return
    _check_switches(config)
    config.model.mtp.check("model.mtp")
    config.model.shared.check("model.shared")
    config.model.streams.check("model.streams")
    specs = {spec.kind: spec for spec in all_layers(config.model)}
    for kind in config.model.layers:
        if kind not in (*config.model.pattern, config.model.mtp.layer, config.model.shared.layer):
            near = schema.suggestion(kind, dict.fromkeys(config.model.pattern))
            raise ConfigError(f"model.layers.{kind} is in no entry of model.pattern{near} (write model.layers.{kind}=null to take it out)")
    _check_shared(config)
    _check_order(resolve_layers(config.model))
    for spec in specs.values():
        _check_layer(spec, config, list(specs.values()))
    _check_layout(config, list(specs.values()))
    _check_fp8(config)
    _check_engine(config)
    if world_size is not None:
        _check_ranks(config, list(specs.values()), world_size)


def _check_switches(config: "Config") -> None:
    data, train, model = config.data, config.train, config.model
    _check_data(config)
    if data.tokenizer.kind == "file" and not data.tokenizer.path:
        raise ConfigError("data.tokenizer.kind=file needs data.tokenizer.path: write the path of a tokenizer.json")
    for dependent in _dependents(config):
        part, name = _place(config, dependent.option)
        value, default = getattr(part, name), default_of(part, name)
        if value != default and not dependent.applies(config):
            switch_part, switch = _place(config, dependent.switch)
            raise ConfigError(
                f"{dependent.option}={value!r} has no effect with {dependent.switch}={_words(getattr(switch_part, switch))}: "
                f"take it out (its default is {default!r}), or make {dependent.switch} {dependent.needs}"
            )
    if train.tokens and train.steps != steps_of(train):
        raise ConfigError(
            f"train.steps={train.steps} and train.tokens={train.tokens} are both given, and at {train.tokens_per_step} tokens_per_step "
            f"the latter makes {steps_of(train)} steps: write one of the two"
        )
    if train.schedule != "constant" and train.min_lr > train.lr:
        raise ConfigError(f"train.min_lr={train.min_lr:g} is above train.lr={train.lr:g}: write at most {train.lr:g}")
    smallest = {"bpe": data.tokenizer.vocab, "bytes": 257}.get(data.tokenizer.kind, 0)
    if 0 < model.vocab < smallest:
        raise ConfigError(f"model.vocab={model.vocab} is below the tokenizer's {smallest}: write 0 for the tokenizer's, or at least {smallest}")
    if config.precision == "fp64" and config.device == "cuda":
        raise ConfigError("precision=fp64 is for checks on a CPU: write device=cpu, or precision=fp32 or bf16")


def _words(value: Any) -> Any:
    return " and ".join(value) if isinstance(value, dict) else value


def _check_data(config: "Config") -> None:
    data = config.data
    for key, source in {"data": data, **{f"data.mixture.{name}": entry for name, entry in data.mixture.items()}}.items():
        if source.source in ("text", "jsonl", "parquet") and not source.files and not (source is data and data.mixture):
            suffix = "txt" if source.source == "text" else source.source
            raise ConfigError(f"{key}.source={source.source} needs {key}.files: write a list of globs, for example {key}.files=[corpus/*.{suffix}]")
        if source.source == "hub" and not source.name and not (source is data and data.mixture):
            raise ConfigError(f"{key}.source=hub needs {key}.name: write the name of the data set, as owner/name")
        if source.max_tokens and source.max_tokens < source.min_tokens:
            raise ConfigError(f"{key}.max_tokens={source.max_tokens} is below min_tokens={source.min_tokens}: write at least that, or 0 for no limit")
    if data.sequence_length == 1 or data.sequence_length > data.tokens:
        raise ConfigError(f"data.sequence_length={data.sequence_length} is not from 2 to data.tokens={data.tokens}: write one in that range, or 0")
    for name, entry in data.mixture.items():
        if entry.source == "synthetic":
            _check_synthetic(f"data.mixture.{name}.synthetic", entry.synthetic, data.sequence_length or data.tokens)
    if data.mixture and all(entry.source == "synthetic" for entry in data.mixture.values()):
        raise ConfigError("data.mixture has no source but synthetic ones, which hold no text out for evaluation: add one of text")


def _check_synthetic(key: str, options: "SyntheticConfig", longest: int) -> None:
    length = options.length or longest
    if not LEAST_SYNTHETIC <= length <= longest:
        raise ConfigError(
            f"{key}.length={length} is not from {LEAST_SYNTHETIC} to the longest sequence, {longest}: write a length in that range, "
            "or raise data.sequence_length or data.tokens"
        )
    if options.min_length and not LEAST_SYNTHETIC <= options.min_length <= length:
        raise ConfigError(f"{key}.min_length={options.min_length} is not from {LEAST_SYNTHETIC} to length={length}: write one in that range, or 0")


def _check_shared(config: "Config") -> None:
    model, blocks = config.model, config.model.shared.blocks
    uses = [spec for spec in resolve_layers(model) if spec.block.shared]
    if uses and not blocks:
        raise ConfigError(f"model.layers.{uses[0].kind}.block.shared=true has no effect with model.shared.blocks=0: write how many there are")
    if len(uses) < blocks:
        raise ConfigError(f"model.shared.blocks={blocks} is more than the {len(uses)} layers with block.shared: write at most {len(uses)}")
    if model.mtp.depth and further_layer(model).block.shared:
        raise ConfigError(f"model.mtp.layer={further_layer(model).kind} has block.shared, which heads have not: write another layer kind")
    if not blocks:
        return
    if config.parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.pipeline={config.parallel.pipeline} does not work with model.shared, whose blocks serve all stages: write parallel.pipeline=1"
        )
    spec = shared_layer(model)
    key = f"model.layers.{spec.kind}"
    if MIXERS[spec.mixer][0] != "attention" or spec.ffn.experts or spec.ffn.absent:
        raise ConfigError(f"model.shared.layer={spec.kind} needs attention and a dense feed-forward: write {key}.mixer=attention and ffn.experts=0")
    if spec.block != BlockOptions():
        raise ConfigError(f"{key}.block has no effect in a shared block, which adds to no residual stream: take it out")


def _check_order(specs: list[LayerSpec]) -> None:
    """What a layer takes from an earlier one has to be given by one."""
    given: set[str] = set()
    for number, spec in enumerate(specs, start=1):
        option, giver = spec.options.takes()
        if giver and giver not in given:
            key = f"model.layers.{spec.kind}"
            raise ConfigError(f"{key}.{option} takes what an earlier layer with {giver} leaves, and layer {number} has none before it: write one")
        given.add(spec.options.gives())


def _check_layer(spec: LayerSpec, config: "Config", specs: list[LayerSpec]) -> None:
    key = f"model.layers.{spec.kind}"
    check_values(spec.options, key)
    spec.options.check(key, config.parallel)
    for name, why in spec.options.refuses().items():
        degree = getattr(config.parallel, name, 1)  # decoding has no degree, and _check_ranks tells of training
        if degree > 1:
            raise ConfigError(f"parallel.{name}={degree} does not work with {key} ({spec.mixer}): {why}: write parallel.{name}=1")
    check_values(spec.ffn, f"{key}.ffn")
    spec.ffn.check(_given_at(config, spec, "ffn"), config.parallel)
    check_values(spec.block, f"{key}.block")
    if spec.mixer == NO_MIXER and spec.ffn.absent:
        raise ConfigError(f"{key} has neither a mixer nor a feed-forward: write `mixer: ` and a mixer, or `ffn: ` and its options")
    at = _given_at(config, spec, "block")
    if spec.block.side_by_side and (spec.mixer == NO_MIXER or spec.ffn.absent):
        missing = "a mixer" if spec.mixer == NO_MIXER else "a feed-forward"
        raise ConfigError(f"{at}.form={spec.block.form} has no effect in {key}, which has not {missing}: write {key}.block.form: pre")
    if config.model.streams.count > 1:
        spec.block.check_streams(at)
    like = specs if at == "model.block" else [spec]  # options of all layers serve those that have the part
    spec.block.check(at, any(s.mixer != NO_MIXER for s in like), any(not s.ffn.absent for s in like))


def _given_at(config: "Config", spec: LayerSpec, part: str) -> str:
    return f"model.layers.{spec.kind}.{part}" if config.model.layers.get(spec.kind, {}).get(part) else f"model.{part}"


def _check_layout(config: "Config", specs: list[LayerSpec]) -> None:
    model, data, parallel = config.model, config.data, config.parallel
    check_multiple("model.hidden", model.hidden, "parallel.tensor", parallel.tensor)
    check_multiple("model.vocab", model.vocab, "parallel.tensor", parallel.tensor)
    if not model.vocab and VOCAB_MULTIPLE % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} does not divide the vocabulary, which is rounded up to a multiple of {VOCAB_MULTIPLE}: "
            "write model.vocab as a multiple of it, at least the tokenizer's"
        )
    if model.depth < parallel.pipeline:
        raise ConfigError(f"parallel.pipeline={parallel.pipeline} is more than model.depth={model.depth} layers: write at most {model.depth}")
    if config.train.tokens_per_step % data.tokens:
        step = math.ceil(config.train.tokens_per_step / data.tokens) * data.tokens
        raise ConfigError(f"train.tokens_per_step={config.train.tokens_per_step} is not a multiple of data.tokens={data.tokens}: write {step}")
    if config.eval.tokens < data.tokens:
        raise ConfigError(f"eval.tokens={config.eval.tokens} is less than one micro-batch, data.tokens={data.tokens}: write at least {data.tokens}")
    if parallel.expert > 1 and not any(spec.ffn.experts for spec in specs):
        raise ConfigError(f"parallel.expert={parallel.expert} has no effect in a model without experts: write parallel.expert=1")
    _check_heads_and_nodes(config, specs)


def _check_learned_positions(config: "Config") -> None:
    most = config.model.learned_positions
    if not 0 < config.data.sequence_length <= most:
        given = f"data.sequence_length={config.data.sequence_length}"
        raise ConfigError(f"{given} does not keep positions below model.learned_positions={most}: write a sequence_length from 2 to {most}")
    needles = config.eval.needles
    for name, length in (("eval.positions", config.eval.positions), ("eval.needles.lengths", max(needles.lengths) if needles.tasks else 0)):
        if length > most:
            raise ConfigError(f"{name} asks for {length} tokens and model.learned_positions={most} are there: write at most {most}")


def _check_heads_and_nodes(config: "Config", specs: list[LayerSpec]) -> None:
    """What attention over context ranks is divided into: heads among neighbours, and the ring between those that have the same ones by nodes."""
    parallel = config.parallel
    if parallel.wire == "fp8" and parallel.context == 1:
        raise ConfigError("parallel.wire=fp8 has no effect with parallel.context=1: write parallel.wire=own")
    given = f"parallel.ulysses={parallel.ulysses}"
    for name in ("ulysses", "inner_ring"):
        if getattr(parallel, name) > 1 and not any(spec.options.softmax_heads() for spec in specs):
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)} has no effect in a model without softmax attention: write parallel.{name}=1"
            )
    check_multiple("parallel.context", parallel.context, "parallel.ulysses", parallel.ulysses)
    ring = parallel.context // parallel.ulysses
    if parallel.inner_ring > 1 and (ring % parallel.inner_ring or ring == parallel.inner_ring):
        raise ConfigError(
            f"parallel.inner_ring={parallel.inner_ring} does not divide the ring of parallel.context / parallel.ulysses = {ring} ranks into several "
            "nodes: write a smaller divisor of it, or 1"
        )
    if parallel.ulysses == 1:
        return
    for spec in specs:
        for key, counts in spec.options.softmax_heads().items():
            heads, kv_heads = (n // parallel.tensor for n in counts)
            if not divides_heads(heads, kv_heads, parallel.ulysses):
                at = ".".join(filter(None, ("model.layers", spec.kind, key)))
                raise ConfigError(
                    f"{given} does not divide the {heads} heads and {kv_heads} K/V heads that a rank has of {at}: write a divisor of the heads "
                    "that divides the K/V heads too or is a multiple of them"
                )


def _check_engine(config: "Config") -> None:
    if config.engine != "deepspeed":
        return
    if config.parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.pipeline={config.parallel.pipeline} does not work with engine=deepspeed: write parallel.pipeline=1, or engine=megatron"
        )
    if config.precision == "fp64":
        raise ConfigError("precision=fp64 does not work with engine=deepspeed, which sums gradients in float32: write engine=megatron")
    if config.deepspeed.zero == 3 and (config.eval.needles.tasks or config.eval.positions or config.eval.short_length):
        raise ConfigError(
            "eval.needles, eval.positions and eval.short_length need whole weights on each rank, which deepspeed.zero=3 does not keep: "
            "write deepspeed.zero=2, or take them out and use `ltrain eval` on the checkpoints"
        )


def _check_fp8(config: "Config") -> None:
    fp8 = config.fp8
    if fp8.recipe == "none":
        return
    asked = f"fp8.recipe={fp8.recipe}"
    if config.precision != "bf16":
        raise ConfigError(f"{asked} needs precision=bf16, for what is not a matrix product, not {config.precision}: write precision=bf16")
    if config.device == "cpu":
        raise ConfigError(f"{asked} needs a GPU, but device=cpu: write fp8.recipe=none, or device=cuda where there is one")
    if config.engine == "deepspeed":
        raise ConfigError(f"{asked} does not go with engine=deepspeed: write engine=megatron, or fp8.recipe=none")
    if fp8.bf16_first + fp8.bf16_last >= config.model.depth:
        left = f"fp8.bf16_first={fp8.bf16_first} and fp8.bf16_last={fp8.bf16_last}"
        raise ConfigError(f"{left} leave none of {config.model.depth} layers to {asked}: write smaller numbers, or fp8.recipe=none")


def _check_ranks(config: "Config", specs: list[LayerSpec], world_size: int) -> None:
    for spec in specs:
        if "training" in spec.options.refuses():
            raise ConfigError(
                f"model.layers.{spec.kind} ({spec.mixer}) is not for training on next tokens, nor for its evaluation: "
                f"{spec.options.refuses()['training']}, or train what ltrain.load_pretrained gives with a loss of your own"
            )
    if config.model.learned_positions:
        _check_learned_positions(config)
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
