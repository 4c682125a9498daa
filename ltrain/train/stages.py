"""Which stages of a run are still to be trained, and the file that resumes them all."""

import os
from pathlib import Path

import torch

from ltrain.checkpoint import Checkpoint, newest, newest_whole
from ltrain.config import Config, ConfigError, ParallelConfig, stage_configs, to_yaml
from ltrain.parallel.mesh import Mesh
from ltrain.train.start import writable


def unfinished(config: Config, device: torch.device) -> list[Config]:
    """The configs to train, one after the other: `config` itself, or its stages from the first that is not done. Called by every rank.

    A stage counts as done by a whole checkpoint of its last step: where that is damaged, it is trained again from the one before.
    Raises ConfigError where run.dir holds a run and run.resume is false, or one whose stages do not fit the config's.
    """
    if not config.stages:
        return [config]
    stages = [stage for _, stage in stage_configs(config)]
    mesh = Mesh(ParallelConfig(timeout=config.parallel.timeout), device)  # each stage has its own later
    try:
        mesh.agree(lambda: writable(Path(config.run.dir)) if mesh.rank == 0 else None)
        last = mesh.broadcast_object(mesh.agree(lambda: _last_begun(config, stages) if mesh.rank == 0 else None))
        done = 0 if last is None else last
        if last is not None:
            path, _ = newest_whole(checkpoints(stages[last]), mesh)
            if path and _steps_done(path) >= stages[last].train.steps:
                done += 1
        if mesh.rank == 0:
            if done:
                print(f"{config.run.dir}: {done} of {len(stages)} stages are done", flush=True)
            keep_config(config)
        mesh.barrier()
    finally:
        mesh.close()
    return stages[done:]


def checkpoints(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def _steps_done(path: Path) -> int:
    with Checkpoint(path) as checkpoint:
        return checkpoint.step


def _last_begun(config: Config, stages: list[Config]) -> int | None:
    """The last stage that has a checkpoint, after which nothing can be trained anew."""
    run = Path(config.run.dir)
    if newest(run / "checkpoints"):
        raise ConfigError(f"{run} holds a run without stages: name another folder with run.dir=..., or start from that run with run.init={run}")
    folders = [Path(stage.run.dir).name for stage in stages]
    begun = [folder.parent.name for folder in sorted(run.glob("[0-9][0-9]-*/checkpoints")) if newest(folder)]
    if not begun:
        return None
    if not config.run.resume:
        raise ConfigError(f"{run} already holds a run: add run.resume=true to go on with it, or name another folder with run.dir=...")
    for folder in begun:
        if folder not in folders:
            raise ConfigError(f"{run} holds {folder}, which is none of the config's stages {', '.join(folders)}: restore it, or take another run.dir")
    last = max(folders.index(folder) for folder in begun)
    for stage, folder in list(zip(stages, folders, strict=True))[:last]:
        path = newest(checkpoints(stage))
        if path and (step := _steps_done(path)) < stage.train.steps:
            raise ConfigError(
                f"stage {folder} has done {step} of {stage.train.steps} steps, but {folders[last]} has begun after it: "
                f"write {step} steps for it, or remove what comes after it"
            )
    return last


def keep_config(config: Config) -> None:
    """In run.dir, what resumes the run."""
    folder = Path(config.run.dir)
    part = folder / ".config.yaml"
    part.write_text(to_yaml(config))
    os.replace(part, folder / "config.yaml")
