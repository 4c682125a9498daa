"""The schema of a run: these dataclasses, filled by defaults < YAML (with `extends:`) < key=value."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from ltrain import schema, stages, validation
from ltrain.model.options import ModelConfig, RopeOptions
from ltrain.pattern import LayerSpec, further_layer, resolve_layers, shared_layer
from ltrain.schema import ConfigError
from ltrain.stages import stage_configs
from ltrain.validation import validate

__all__ = [
    "Config",
    "ConfigError",
    "LayerSpec",
    "find",
    "flatten",
    "further_layer",
    "load",
    "parse",
    "resolve_layers",
    "shared_layer",
    "stage_configs",
    "to_dict",
    "to_yaml",
    "validate",
]


@dataclass
class TokenizerConfig:
    kind: str = "bpe"  # bpe (trained on the training documents, cached) | bytes | file (a tokenizer.json at `path`)
    vocab: int = 4096  # for bpe
    path: str = ""  # for file
    digits: str = "split"  # for bpe: split (each digit is a token) | merge
    cache: str = "~/.cache/ltrain"  # where trained tokenizers and tokenised documents are kept


@dataclass
class SourceConfig:
    source: str = "stdlib"  # stdlib | text | jsonl | parquet | hub | packages (each installed Python package as one document)
    files: list[str] = field(default_factory=list)  # globs, for text, jsonl and parquet
    roots: list[str] = field(default_factory=list)  # for packages: globs of folders that hold them; empty: the running Python's
    name: str = ""  # for hub: the data set, with `subset` and `split`
    subset: str = ""
    split: str = "train"
    min_tokens: int = 0  # leave shorter documents out, by their bytes: 3.5 count as a token, 1 with tokenizer.kind=bytes; not for hub
    max_tokens: int = 0  # leave longer documents out, likewise; 0: none
    field: str = "text"  # column that holds a document, for jsonl, parquet and hub


@dataclass
class SyntheticConfig:
    """For a source of a mixture with source=synthetic: recall tasks over real text."""

    tasks: list[str] = field(default_factory=lambda: ["passkey", "kv", "multi_query", "variables"])  # equally often; or copy: runs that return
    haystack: str = "stdlib"  # the text around the needles: stdlib | packages | filler (a few sentences again and again)
    length: int = 0  # tokens of a document; 0: data.sequence_length, or else data.tokens
    min_length: int = 0  # lengths are log-uniform from it to `length`; 0: all are `length`
    needles_per_1k: float = 5.0  # needles for 1000 tokens
    max_needles: int = 64  # needles in one document


@dataclass
class MixtureConfig(SourceConfig):
    """A source of a mixture; `source` may also be synthetic."""

    weight: float = 1.0  # its share of the tokens is this out of all weights
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class DataConfig(SourceConfig):
    mixture: dict[str, MixtureConfig] = field(default_factory=dict)  # name -> a source with a weight; given, it takes the place of the one above
    held_out: float = 0.1  # share of the documents kept for evaluation
    tokens: int = 2048  # tokens of one micro-batch: the length of the packed stream
    sequence_length: int = 0  # longest piece of a document in the stream, each from position 0; 0: only the stream's end cuts, and positions go on
    shards: int = 64  # fixed virtual shards; data-parallel ranks must divide it
    workers: int = 1  # tokenising processes per loading rank; 0: in the training process
    cache_tokens: bool = True  # keep tokenised documents in tokenizer.cache; no effect on kind=bytes and streams of the hub
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass
class TrainConfig:
    steps: int = 200
    tokens: int = 0  # instead of steps: train for so many tokens, rounded up to whole steps
    tokens_per_step: int = 4096  # tokens of one optimizer step over all ranks: a multiple of data.tokens x data ranks
    lr: float = 3e-3
    schedule: str = "cosine"  # after a linear warm-up: cosine (to min_lr) | wsd (stable, then a decay by 1 - sqrt to min_lr) | constant
    min_lr: float = 3e-4  # at the last step, for cosine and wsd
    warmup_steps: int = 20
    decay_steps: int = 0  # wsd: length of the decay; 0: decay_fraction of the steps
    decay_fraction: float = 0.2  # wsd: the decay's share of the steps
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; norms, biases, decays and convolutions have none
    clip: float = 1.0  # global gradient norm; 0: no clipping
    recompute: str = (
        "none"  # again in the backward: none | selective (what is cheap: norms, gates, convolutions, rotations, states) | full (each block)
    )


@dataclass
class ParallelConfig:
    """Degrees of each parallelism; data parallelism is what is left of the ranks. Sequence parallelism comes with `tensor`."""

    tensor: int = 1
    context: int = 1
    expert: int = 1  # folds over the non-pipeline ranks
    pipeline: int = 1
    context_layout: str = "zigzag"  # zigzag | contiguous | balanced (follows the documents of each stream)
    ulysses: int = 1  # neighbouring context ranks that divide the heads of attention; between them the ring goes on
    inner_ring: int = 1  # neighbours of that ring on one node: keys come to a node once and are passed on there (double ring); 1: one ring
    wire: str = "own"  # own | fp8: the type of keys, values and latents on their way to other context ranks; of gradients always own
    timeout: int = 600  # seconds after which a stalled exchange is an error


@dataclass
class DeepSpeedConfig:
    """For engine=deepspeed."""

    zero: int = 2  # what the data and context ranks share out: 1 optimizer states | 2 and gradients | 3 and weights
    offload: str = "none"  # none | cpu (optimizer states and the update in host memory)


@dataclass
class NeedleConfig:
    """Recall of what a prompt says once, over the prompt's length and the needle's depth in it."""

    tasks: list[str] = field(default_factory=list)  # passkey | single_key | multi_key | variables; empty: no needle tests
    lengths: list[int] = field(default_factory=lambda: [4096])  # tokens of a prompt and its answer, at most
    depths: int = 10  # rows of the grid
    samples: int = 50  # of each task and length, the depths in turn
    every: int = 0  # steps; 0: only at the end


@dataclass
class FP8Config:
    """Matrix products of the layers in FP8, by Transformer Engine, for precision=bf16 on GPUs that have it; evaluation stays in bf16."""

    recipe: str = "none"  # none | delayed (scales from earlier values) | current (from the tensor itself) | blockwise (a scale per block)
    bf16_first: int = 0  # so many of the first layers stay in bf16
    bf16_last: int = 0  # so many of the last layers stay in bf16
    amax_history: int = 1024  # delayed: micro-batches whose largest values a scale is made for


@dataclass
class EvalConfig:
    every: int = 100  # steps; 0: only at the end
    tokens: int = 65536  # held-out tokens per evaluation, rounded down to whole micro-batches
    positions: int = 0  # tokens of the longest held-out documents whose loss is told by position; 0: it is not
    documents: int = 8  # how many of them, for positions
    short_length: int = 0  # also the loss of eval.tokens held-out tokens in pieces of so many; 0: not
    needles: NeedleConfig = field(default_factory=NeedleConfig)


@dataclass
class CheckpointConfig:
    every: int = 100  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept; 0: all
    asynchronous: bool = True  # write while training goes on; host memory holds one copy of the state, as it would for a moment without


@dataclass
class TrackingConfig:
    enabled: bool = True
    uri: str = ""  # MLflow tracking URI; empty: sqlite in run.dir
    experiment: str = "ltrain"
    every: int = 1  # steps between logged metrics
    parent: str = ""  # folder of an enclosing run: this one goes to its store, nested under it in MLflow


@dataclass
class RunConfig:
    dir: str = "runs/default"  # everything the run leaves
    name: str = ""  # MLflow run name; empty: the folder's
    resume: bool = False  # continue from the newest checkpoint in dir
    init: str = ""  # start from its weights and tokenizer: a checkpoint or run of ltrain, or a Hugging Face model's folder
    init_optimizer: str = "reset"  # with init: reset (new moments) | keep (init's, where it has any)
    sample_tokens: int = 64  # length of the sample generated at the end; 0: none
    sample_prompt: str = "def "


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    engine: str = "megatron"  # megatron | deepspeed (ZeRO, without pipeline stages)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    precision: str = "fp32"  # fp64 (checks only) | fp32 | bf16 (fp32 master weights)
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> the keys that differ in it; run one after the other


@dataclass
class Stage(Config):
    """What an entry of `stages` may hold: the config's own parts but its model, run, tracking, seed and device, and keys of its own."""

    rope: RopeOptions = field(default_factory=RopeOptions)  # laid over that of every layer kind that has RoPE
    optimizer: str = "keep"  # keep (the moments of the stage before; the first goes by run.init_optimizer) | reset
    batch: str = "tokens"  # what stays as in the stage before where the length changes: tokens (of a step) | sequences (in a step)


COMMAND_LINE = "on the command line"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config at `path`: defaults < the files it extends < the file < `overrides` (`key=value`, values in YAML).

    `extends:` at the top of a file names one file or a list of them, relative to it. `${key}` refers to another key.
    A path that is not there is looked up among the packaged configs (`configs/quickstart.yaml`).
    An option that a later layer's switch leaves without effect (`data.tokenizer.kind=bytes` and the file's `vocab`) goes back to its default;
    a warm-up longer than a later layer's train.steps is cut to it.
    Raises ConfigError for whatever cannot be run on any number of ranks; `validate` checks a given number.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers = [*_read(find(path), ()), (COMMAND_LINE, parse(overrides))]
    given: dict[str, int] = {}  # dotted key -> the last layer that gave it
    merged = OmegaConf.structured(Config)
    for number, (where, data) in enumerate(layers, start=1):
        data = _conform(_renamed(data), partial(_always, where))
        for key, value in _flat(data):
            if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
                raise ConfigError(f"{key} {where} is {value!r}, but only other keys can be referred to, as in ${{model.hidden}}")
            given.update((part, number) for part in _parts(key))
        kinds = data.get("model", {}).get("layers", {})
        for kind in [k for k, options in kinds.items() if options is None]:
            del kinds[kind]
            merged.model.layers.pop(kind, None)
        for name in [n for n, source in data.get("data", {}).get("mixture", {}).items() if source is None]:
            del data["data"]["mixture"][name]
            merged.data.mixture.pop(name, None)
        for name in [n for n, overlay in data.get("stages", {}).items() if overlay is None]:
            del data["stages"][name]
            merged.stages.pop(name, None)
        try:
            merged = OmegaConf.merge(merged, data)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{_first_line(error)} ({where})") from error
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error

    def where_given(key: str) -> str:
        numbers = [given[part] for part in _parts(key) if part in given]
        return layers[numbers[-1] - 1][0] if numbers else "in the defaults"

    assert isinstance(plain, dict)
    config: Config = schema.build(Config, _conform({str(key): value for key, value in plain.items()}, where_given))
    validation.check_values(config)
    validation.drop_superseded(config, given, where_given)
    stages.drop_superseded(config, given)
    validate(config)
    return config


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    """Keys that were once of another name, as the configs in older checkpoints have them."""
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("norm_zero_centred"), bool):
        before = {name: value for name, value in model.items() if name != "norm_zero_centred"}
        return {**data, "model": {"norm": "rms_zero_centred" if model["norm_zero_centred"] else "rms", **before}}
    return data


def _always(where: str, key: str) -> str:
    return where


def _conform(data: dict[str, Any], where: schema.Where) -> dict[str, Any]:
    found: dict[str, Any] = schema.conform(Config, data, "", where)
    if isinstance(found.get("stages"), dict):
        found["stages"] = stages.conform(Stage, found["stages"], where)
    return found


def find(path: str | Path) -> Path:
    """The file at `path`, or the packaged config of that name. Raises ConfigError where there is none."""
    asked = Path(path).expanduser()
    if asked.is_file():
        return asked
    packaged = Path(__file__).parent / "configs"
    relative = Path(*asked.parts[1:]) if asked.parts[:1] == ("configs",) else asked
    if not asked.is_absolute() and (packaged / relative).is_file():
        return packaged / relative
    if asked.is_dir():
        raise ConfigError(f"{path} is a folder: give a YAML file in it")
    known = sorted(str(Path("configs") / p.relative_to(packaged)) for p in packaged.rglob("*.yaml"))
    raise ConfigError(f"there is no config {path}{schema.suggestion(str(path), known)}")


def to_dict(config: Any) -> dict[str, Any]:
    """Every key of the config as plain data."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """Every key of the config as YAML that `load` reads back to the same config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for every key of the config."""
    return dict(_flat(to_dict(config)))


def _read(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, its data) for the files that `path` extends, then for `path` itself. `above`: the files that extend it."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    path = path.resolve()
    if path in above:
        chain = " -> ".join(p.name for p in (*above[above.index(path) :], path))
        raise ConfigError(f"{path.name} extends itself ({chain}): take one `extends:` of these files out")
    shown = _shown(path)
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        at = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{shown}{at} is not YAML: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{shown} cannot be read as YAML: {_first_line(error)}") from error
    data = OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else None
    if not isinstance(data, dict):
        raise ConfigError(f"{shown} is not a mapping of keys: write `train:` and, indented under it, `steps: 100`, for example")
    bases = data.pop("extends", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"extends in {shown} is {base!r}, expected the path of a YAML file or a list of paths")
        beside = path.parent / base
        yield from _read(beside if beside.is_file() else find(base), (*above, path))
    yield f"in {shown}", {str(k): v for k, v in data.items()}


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words to nested data. A text key takes its value as it stands; the others take YAML."""
    import yaml
    from omegaconf import OmegaConf

    nested: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"{word!r} on the command line is not a setting: write it as key=value, for example train.steps=100")
        hint = _hint(names)
        value: Any
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
        except yaml.YAMLError as error:
            value = text
            if hint is not str and not (get_origin(hint) is list and not text.startswith("[")):
                raise ConfigError(f"{key}={text} on the command line is not YAML: put quotes around each text in it") from error
        if hint is str and not isinstance(value, str) and text != "null":
            value = text
        if get_origin(hint) is list and isinstance(value, str) and not schema.is_interpolation(value):
            value = [value]
        inner = nested
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} on the command line is under a key that was given a value there before: give only one of the two")
        inner[names[-1]] = value
    return nested


def _hint(names: list[str]) -> Any:
    """The declared type of a key, None where the schema does not fix one."""
    hint: Any = Config
    if names[0] == "stages" and len(names) > 2:
        hint, names = Stage, names[2:]
    for name in names:
        if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            hint = get_args(hint)[1]
            continue
        if not is_dataclass(hint) or name not in (f.name for f in fields(hint)):
            return None
        hint, _ = schema.optional(schema.hints(hint)[name])  # type: ignore[arg-type]
    return hint


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parts(key: str) -> Iterator[str]:
    """model.ffn.top_k -> model, model.ffn, model.ffn.top_k"""
    names = key.split(".")
    return (".".join(names[:n]) for n in range(1, len(names) + 1))


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
