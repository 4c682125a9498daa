"""`ltrain extend`: plan the stages that take a trained model to a longer context, and write them as a config."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ltrain import families, schema
from ltrain.checkpoint import Checkpoint, last_stage
from ltrain.config import COMMAND_LINE, Config, ConfigError, load, parse, resolve_layers, to_dict
from ltrain.model.options import RopeOptions
from ltrain.pattern import ropes
from ltrain.stages import laid_over, length
from ltrain.train.start import locate

METHODS = ("yarn", "ntk", "linear", "base")
LARGEST_STEP, USUAL_STEP = 8, 4  # how far one stage stretches the sequence: the first, and those after it
SHARES = {"long": 0.5, "short": 0.4, "recall": 0.1}  # of the tokens; short documents keep what the model could do (Gao et al. 2024, section 3)
RECOMPUTE_ABOVE = 32768  # tokens of a sequence above which every block's activations are computed again
PRETRAINED_LR = 2e-5  # for a model whose own learning rate is not known (Peng et al. 2023, section 4.1)


@dataclass(frozen=True)
class Plan:
    file: Path
    text: str  # of the file
    config: Config  # what the file loads as
    ranks: int  # that trained the checkpoint

    @property
    def command(self) -> list[str]:
        start = ["ltrain"] if self.ranks == 1 else ["torchrun", "--nproc-per-node", str(self.ranks), "-m", "ltrain"]
        return [*start, "train", str(self.file)]


def lengths(trained: int, target: int) -> list[int]:
    """The sequence lengths of the stages, the last one `target`: each about four times the one before, the first at most eight times `trained`."""
    found = [target]
    while found[0] > LARGEST_STEP * trained:
        found.insert(0, max(found[0] // USUAL_STEP // 128 * 128, 2 * trained))
    return found


def rope_of(rope: RopeOptions, trained: int, target: int, method: str) -> dict[str, Any]:
    """What a stage of sequences of `target` tokens lays over the RoPE of a model trained at `trained`, by one of METHODS.

    The factor counts from the length before any extension. base: times factor^(4/3), as Gao et al. 2024 (ProLong) chose it for 8K -> 64K -> 512K.
    """
    if method == "base":
        if rope.scaling != "none":
            raise ConfigError(f"--rope base does not go with the checkpoint's rope.scaling={rope.scaling}: write --rope {rope.scaling}, or yarn")
        return {"base": round(rope.base * (target / trained) ** (4 / 3))}
    original = rope.original_length if rope.scaling in ("dynamic", "yarn", "longrope", "llama3") else max(1, round(trained / rope.factor))
    scaled = {"scaling": method, "factor": target / original}
    return scaled | {"original_length": original} if method == "yarn" else scaled


def mixture(config: Config, trained: int) -> dict[str, Any]:
    """Long and short documents and recall tasks, by SHARES. A mixture that the checkpoint has already stays; recall is added where it has none."""
    data, before = to_dict(config)["data"], config.data.mixture
    synthetic = {"source": "synthetic"}
    if before:
        if any(source.source == "synthetic" for source in before.values()):
            return {}
        rest = sum(source.weight for source in before.values())
        return {"recall": synthetic | {"weight": round(rest * SHARES["recall"] / (1 - SHARES["recall"]), 6)}}
    names = {"stdlib": (), "packages": ("roots",), "text": ("files",), "hub": ("name", "subset", "split", "field")}
    source = {"source": data["source"]} | {name: data[name] for name in names.get(data["source"], ("files", "field")) if data[name]}
    if data["source"] == "hub":  # a stream, whose lengths are not known
        return {"documents": source | {"weight": SHARES["long"] + SHARES["short"]}, "recall": synthetic | {"weight": SHARES["recall"]}}
    bucketed = data["source"] != "stdlib"
    return {
        "long": (source | {"min_tokens": trained} if bucketed else {"source": "packages"}) | {"weight": SHARES["long"]},
        "short": source | ({"max_tokens": trained} if bucketed else {}) | {"weight": SHARES["short"]},
        "recall": synthetic | {"weight": SHARES["recall"]},
    }


def plan(checkpoint: str, target: int, budget: int, method: str = "", out: str = "", overrides: Sequence[str] = ()) -> Plan:
    """Write the config that extends `checkpoint` (of ltrain, a run's folder, or a Hugging Face model's) to `target` tokens, with `budget` tokens.

    A Hugging Face model is converted into run.dir/init first. Raises ConfigError for what cannot be extended so.
    """
    given = schema.conform(Config, parse(overrides), "", lambda key: COMMAND_LINE)
    folder = Path(checkpoint).expanduser()
    named = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    run_dir = Path(given.get("run", {}).get("dir") or f"runs/{named.resolve().name}-{_short(target)}")
    file = Path(out or f"{run_dir}.yaml")
    if file.exists():
        raise ConfigError(f"{file} is there already: remove it, or name another with --out")
    start, path = _located(folder, run_dir)
    base = _sized(load(path / "config.yaml"), given)
    with Checkpoint(path) as saved:
        meta, moments = saved.meta, "exp_avg" in saved.kinds
    imported = meta.get("source") or {}
    trained = (families.family_of(imported).longest(imported) if imported else 0) or length(base.data)
    if target <= trained:
        raise ConfigError(f"--to {target} is not above the {trained} tokens that {checkpoint} was trained with: write a larger length")
    fixed = base.parallel.tensor * base.parallel.context * base.parallel.pipeline
    ranks = max(fixed, meta.get("ranks", 1))
    steps = lengths(trained, target)
    document = _document(base, start, file, run_dir, trained, bool(imported), moments)
    document["stages"] = {f"extend-{_short(tokens)}": _stage(base, trained, tokens, budget // len(steps), ranks // fixed, method) for tokens in steps}
    document = laid_over(Config, document, given)
    lines = [
        f"# {checkpoint} from {trained} to {target} tokens: {' -> '.join(_short(n) for n in (trained, *steps))}.",
        "# What is not written here is as in the file under extends; `ltrain config show` with --stage NAME shows a stage in full.",
    ]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    try:
        config = load(file)
    except ValueError:
        file.unlink()
        raise
    return Plan(file, text, config, ranks)


def _sized(base: Config, given: dict[str, Any]) -> Config:
    """The checkpoint's config with what the command line says about sizes and layout, by which the stages are planned."""
    sizes = {"data": ("tokens",), "train": ("tokens_per_step",), "eval": ("tokens",), "parallel": ("tensor", "context", "pipeline")}
    asked = {part: {name: given[part][name] for name in names if name in given.get(part, {})} for part, names in sizes.items()}
    sized: Config = schema.build(Config, laid_over(Config, to_dict(base), asked))
    return sized


def _short(tokens: int) -> str:
    if tokens % 1048576 == 0:
        return f"{tokens // 1048576}m"
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _located(folder: Path, run_dir: Path) -> tuple[Path, Path]:
    """(what run.init names, the checkpoint in it)."""
    from ltrain.evals.generate import find

    folder = last_stage(folder)
    if (folder / "config.json").is_file():
        folder = locate(folder, run_dir / "init")
    return folder, find(folder)


def _document(base: Config, start: Path, file: Path, run_dir: Path, trained: int, imported: bool, moments: bool) -> dict[str, Any]:
    """All of the config but its stages."""
    lr = PRETRAINED_LR if imported else base.train.lr / 10
    run: dict[str, Any] = {"dir": str(run_dir), "init": str(start)}
    if base.run.init_optimizer != (kept := "keep" if moments else "reset"):
        run["init_optimizer"] = kept
    run |= {name: "" for name in ("name",) if base.run.name} | ({"resume": False} if base.run.resume else {})
    config_file = _config_file(start)
    document: dict[str, Any] = {
        "extends": os.path.relpath(config_file.resolve(), file.parent.resolve()),
        "run": run,
        "seed": base.seed + 1,  # another order of the documents
        "train": {"schedule": "cosine", "lr": float(f"{lr:.3g}"), "min_lr": float(f"{lr / 10:.3g}")},
        "eval": {"short_length": trained},
    }
    if base.tracking.parent:
        document["tracking"] = {"parent": ""}
    if parts := mixture(base, trained):
        document["data"] = {"mixture": parts}
    return document


def _config_file(start: Path) -> Path:
    from ltrain.evals.generate import find

    return start / "config.yaml" if (start / "config.yaml").is_file() else find(start) / "config.yaml"


def _stage(base: Config, trained: int, tokens: int, budget: int, data_ranks: int, method: str) -> dict[str, Any]:
    stream = max(base.data.tokens, tokens)
    unit = stream * data_ranks
    per_step = -(-max(base.train.tokens_per_step, unit) // unit) * unit
    steps = -(-budget // per_step)
    stage: dict[str, Any] = {
        "data": {"tokens": stream, "sequence_length": tokens},
        "train": {"tokens": budget, "warmup_steps": -(-steps // 20)},
    }
    if per_step != base.train.tokens_per_step:
        stage["train"]["tokens_per_step"] = per_step
    if tokens > RECOMPUTE_ABOVE and base.train.recompute != "full":
        stage["train"]["recompute"] = "full"
    if base.eval.tokens < stream:
        stage["eval"] = {"tokens": stream}
    rotary = [rope for spec in resolve_layers(base.model) for rope in ropes(spec).values()]
    if rotary:
        wanted = [rope_of(rope, trained, tokens, method or "yarn") for rope in rotary]
        if any(other != wanted[0] for other in wanted):
            raise ConfigError(
                f"--rope {method or 'yarn'} gives the layer kinds different options, since their RoPE differs: write the stages by hand"
            )
        stage["rope"] = wanted[0]
    elif method:
        raise ConfigError(f"--rope {method} has no effect, since no layer of the model has RoPE: leave it out")
    return stage


def main(checkpoint: str, target: int, budget: int, method: str, out: str, run: bool, overrides: Sequence[str]) -> None:
    """Show the plan and the command that runs it; run it when told."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ltrain extend writes one file: start it without torchrun; it tells the command for all ranks")
    found = plan(checkpoint, target, budget, method, out, overrides)
    print(f"{found.text}\nwritten to {found.file}; to run it:\n  {shlex.join(['uv', 'run', *found.command])}", flush=True)
    if not run:
        return
    if found.ranks > 1:
        import torch

        from ltrain.launch.local import launch

        sys.exit(launch(str(found.file), [], found.ranks, torch.cuda.is_available()))
    from ltrain.train.loop import train

    train(load(found.file))
