"""The schema of a run: these dataclasses, filled by defaults < YAML (with `extends:`) < key=value."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from ltrain import schema, validation
from ltrain.model.options import ModelConfig
from ltrain.schema import ConfigError
from ltrain.validation import LayerSpec, resolve_layers, validate

__all__ = ["Config", "ConfigError", "LayerSpec", "find", "flatten", "load", "resolve_layers", "to_dict", "to_yaml", "validate"]


@dataclass
class TokenizerConfig:
    kind: str = "bpe"  # bpe (trained on the training documents, cached) | bytes | file (a tokenizer.json at `path`)
    vocab: int = 4096  # for bpe
    path: str = ""  # for file
    cache: str = "~/.cache/ltrain"  # where trained tokenizers are kept


@dataclass
class DataConfig:
    source: str = "stdlib"  # stdlib | text | jsonl | parquet | hub
    files: list[str] = field(default_factory=list)  # globs, for text, jsonl and parquet
    name: str = ""  # for hub: the data set, with `subset` and `split`
    subset: str = ""
    split: str = "train"
    held_out: float = 0.1  # share of the documents kept for evaluation
    tokens: int = 2048  # tokens of one micro-batch: the length of the packed stream
    shards: int = 64  # fixed virtual shards; data-parallel ranks must divide it
    workers: int = 1  # tokenising processes per loading rank; 0: in the training process
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    field: str = "text"  # column that holds a document, for jsonl, parquet and hub


@dataclass
class TrainConfig:
    steps: int = 200
    tokens_per_step: int = 4096  # tokens of one optimizer step over all ranks: a multiple of data.tokens x data ranks
    lr: float = 3e-3
    min_lr: float = 3e-4  # at the end of the cosine
    warmup_steps: int = 20
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; norms, biases, decays and convolutions have none
    clip: float = 1.0  # global gradient norm; 0: no clipping
    recompute: str = "none"  # none | full (each block's activations again in the backward)


@dataclass
class ParallelConfig:
    """Degrees of each parallelism; data parallelism is what is left of the ranks. Sequence parallelism comes with `tensor`."""

    tensor: int = 1
    context: int = 1
    expert: int = 1  # folds over the non-pipeline ranks
    pipeline: int = 1
    context_layout: str = "zigzag"  # zigzag | contiguous
    timeout: int = 600  # seconds after which a stalled exchange is an error


@dataclass
class EvalConfig:
    every: int = 100  # steps; 0: only at the end
    tokens: int = 65536  # held-out tokens per evaluation, rounded down to whole micro-batches


@dataclass
class CheckpointConfig:
    every: int = 100  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept; 0: all


@dataclass
class TrackingConfig:
    enabled: bool = True
    uri: str = ""  # MLflow tracking URI; empty: sqlite in run.dir
    experiment: str = "ltrain"
    every: int = 1  # steps between logged metrics


@dataclass
class RunConfig:
    dir: str = "runs/default"  # everything the run leaves
    name: str = ""  # MLflow run name; empty: the folder's
    resume: bool = False  # continue from the newest checkpoint in dir
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
    precision: str = "fp32"  # fp64 (checks only) | fp32 | bf16 (fp32 master weights)
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda


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

    layers = [*_read(find(path), ()), (COMMAND_LINE, _parse(overrides))]
    given: dict[str, int] = {}  # dotted key -> the last layer that gave it
    merged = OmegaConf.structured(Config)
    for number, (where, data) in enumerate(layers, start=1):
        data = schema.conform(Config, data, "", partial(_always, where))
        for key, value in _flat(data):
            if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
                raise ConfigError(f"{key} {where} is {value!r}, but only other keys can be referred to, as in ${{model.hidden}}")
            given.update((part, number) for part in _parts(key))
        kinds = data.get("model", {}).get("layers", {})
        for kind in [k for k, options in kinds.items() if options is None]:
            del kinds[kind]
            merged.model.layers.pop(kind, None)
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

    config: Config = schema.build(Config, schema.conform(Config, plain, "", where_given))
    validation.check_values(config)
    validation.drop_superseded(config, given, where_given)
    validate(config)
    return config


def _always(where: str, key: str) -> str:
    return where


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


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
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
    for name in names:
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
