"""The verb `ltrain eval`: long-context evaluation of a checkpoint, on one device or under torchrun."""

import dataclasses
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ltrain.checkpoint import Checkpoint
from ltrain.checkpoint.parameters import fill
from ltrain.config import Config, ConfigError, ParallelConfig, resolve_layers
from ltrain.config import load as load_config
from ltrain.data.dataset import build
from ltrain.data.tokenizer import Tokenizer
from ltrain.evals.evaluation import Evaluation
from ltrain.evals.generate import find
from ltrain.evals.report import Report
from ltrain.parallel.engines.base import build_stage
from ltrain.parallel.mesh import Mesh
from ltrain.parallel.pipeline import Stage
from ltrain.pattern import ropes
from ltrain.train.feed import joined
from ltrain.train.progress import duration
from ltrain.validation import NEEDLE_TASKS

WORKERS = 8  # processes that generate prompts, where the machine has so many cores to spare


@dataclass(frozen=True)
class Request:
    """What the command line asks for; a key=value in `overrides` is laid over the checkpoint's config last."""

    checkpoint: str
    overrides: list[str]
    tasks: list[str]
    lengths: list[int]
    samples: int
    depths: int
    out: str


def configure(request: Request, folder: Path) -> Config:
    """The checkpoint's config with the evaluation that is asked for: in the run's layout where the command line says none and it fits the ranks of
    torchrun, else from one rank on, with what the command line says. Without FP8, in which no evaluation is."""
    saved, ranks = load_config(folder / "config.yaml").parallel, int(os.environ.get("WORLD_SIZE", 1))
    layout = [f.name for f in dataclasses.fields(ParallelConfig) if f.name not in ("context_layout", "timeout")]
    asked = any(word.split("=")[0].strip() in (f"parallel.{name}" for name in layout) for word in request.overrides)
    fits = ranks % (saved.tensor * saved.context * saved.pipeline) == 0 and ranks // saved.pipeline % saved.expert == 0
    words = [f"eval.needles.{name}={getattr(request, name)}" for name in ("lengths", "samples", "depths")] if request.tasks else []
    words += [f"eval.needles.tasks=[{','.join(request.tasks)}]", "eval.needles.every=0", "engine=megatron", "fp8.recipe=none"]
    words += [] if fits and not asked else [f"parallel.{name}={getattr(ParallelConfig(), name)}" for name in layout]
    words += [f"eval.positions={max(request.lengths)}"] if request.lengths else []
    config = load_config(folder / "config.yaml", [*(word.replace(" ", "") for word in words), *request.overrides])
    parallel = config.parallel
    # of training alone: whatever fits these ranks
    data_ranks = max(1, ranks // (parallel.tensor * parallel.context * parallel.pipeline))
    config.train.tokens_per_step = config.data.tokens * data_ranks
    config.data.shards = data_ranks
    if not any(word.startswith("data.workers=") for word in request.overrides):
        config.data.workers = max(1, min(WORKERS, (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) - 1))
    return config


@torch.no_grad()
def read_stage(config: Config, checkpoint: Checkpoint, mesh: Mesh) -> Stage:
    """This rank's stage of the saved model, without an optimizer."""
    stage = build_stage(config, checkpoint.shape("embed.weight", "param")[0], mesh)
    for name, param in stage.stack.named_parameters():
        fill(name, param, "param", param, checkpoint)
    for name, router in stage.stack.routers().items():
        router.bias.copy_(checkpoint.read(f"{name}.bias", "buffer"))
    return stage.eval()


class Counter:
    """How far the needle tests are: one line that is written again in a terminal, a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._began, self._printed = time.monotonic(), -float("inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        left = (now - self._began) / done * (total - done)
        line = f"needles: {done} of {total} streams of prompts, ETA {duration(left)}"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif now - self._printed >= 10 or done == total:
            self._printed = now
            print(line, file=sys.stderr, flush=True)


def main(request: Request) -> Report:
    """Evaluate, print the table and write needles.json, needles.png, positions.json and positions.png."""
    for task in request.tasks:
        if task not in NEEDLE_TASKS:
            raise ConfigError(f"--tasks {task} is not known: choose from {', '.join(NEEDLE_TASKS)}")
    planned = find(request.checkpoint)
    config = configure(request, planned)
    with ExitStack() as open_files:
        mesh = open_files.enter_context(joined(config))
        folder = find(request.checkpoint, mesh)
        if folder != planned:  # which is damaged
            asked, config = config, mesh.agree(lambda: configure(request, folder))
            if (config.parallel, config.device) != (asked.parallel, asked.device):
                raise ConfigError(f"{planned} is damaged and {folder.name} before it has another layout: write ltrain eval {folder}")
        checkpoint = open_files.enter_context(Checkpoint(folder))
        stage = mesh.agree(lambda: read_stage(config, checkpoint, mesh))
        dataset = mesh.agree(lambda: build(config.data, config.seed, Tokenizer.load(folder)))
        out = Path(request.out) if request.out else folder.parent.parent / "eval" / folder.name
        about = {
            "command": shlex.join(["ltrain", *sys.argv[1:]]),
            "checkpoint": str(folder),
            "torch": torch.__version__,
            "precision": config.precision,
            "rope": {".".join((spec.kind, *place[:-1])): vars(rope) for spec in resolve_layers(config.model) for place, rope in ropes(spec).items()},
        }
        progress = Counter() if mesh.rank == 0 else (lambda done, total: None)
        report = Evaluation(config, dataset, mesh).run(stage, checkpoint.step, True, out, about, progress)
        if mesh.rank == 0:
            print("\n".join(report.table()))
            print(f"written to {out}")
    return report
