"""Where a run begins: after its own newest checkpoint, at the weights of another run, or at its seed."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltrain.checkpoint import Checkpoint, clean, last_stage, newest, newest_whole
from ltrain.checkpoint.index import INDEX
from ltrain.config import Config, ConfigError, load
from ltrain.families.folder import carried_files
from ltrain.parallel.mesh import Mesh


@dataclass
class Start:
    step: int = 0  # of this run
    tokens: int = 0  # seen by this run
    optimizer_step: int | None = None  # updates behind the checkpoint's moments (Adam's bias correction); None: new moments
    loader: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None  # to load from
    resumed: bool = False  # it is the run's own
    damaged: int = 0  # newer checkpoints that were passed over
    tokenizer: Path | None = None  # folder that holds the model's; None: what the config names

    @property
    def origin(self) -> dict[str, Any]:
        """The config.json of the Hugging Face model that the weights once came from, for an export; empty where there was none."""
        meta = self.checkpoint.meta if self.checkpoint else {}
        return dict(meta.get("source") or meta.get("origin") or {})

    @property
    def carried(self) -> dict[str, bytes]:
        """What stands beside those weights and is handed on: files of its tokenizer and of generation."""
        return carried_files(self.tokenizer) if self.tokenizer and self.origin else {}

    def __str__(self) -> str:
        if self.checkpoint is None:
            return "from the start"
        if self.resumed:
            return f"continuing after step {self.step}"
        return f"from the weights{'' if self.optimizer_step is None else ' and moments'} of {self.checkpoint.path}"


def find(config: Config, mesh: Mesh, say: Callable[[str], None]) -> Start:
    """Open run.dir and what the run begins from. Called by every rank; a run that is there already is never overwritten.

    Raises ConfigError for a folder that cannot be used; CheckpointError where there are checkpoints and none is whole.
    """
    folder = Path(config.run.dir)
    mesh.agree(lambda: writable(folder) if mesh.rank == 0 else None)
    path, warnings = newest_whole(folder / "checkpoints", mesh)
    for warning in warnings:
        say(f"warning: {warning}; going on from {path.name if path else 'none'}")
    if path and not config.run.resume:
        raise ConfigError(f"{folder} already holds a run: add run.resume=true to go on with it, or name another folder with run.dir=...")
    clean(folder / "checkpoints", mesh)
    if path:
        checkpoint = mesh.agree(lambda: Checkpoint(path))
        meta = checkpoint.meta
        optimizer_step = meta.get("optimizer_step", meta["step"])
        tokenizer = path if config.run.init else None
        return Start(meta["step"], meta["tokens"], optimizer_step, meta["loader"], checkpoint, True, len(warnings), tokenizer)
    if config.run.init:
        return _from_weights(config, mesh, say)
    return Start()


def writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be used ({error.strerror}): name a folder that can be written") from error


def _from_weights(config: Config, mesh: Mesh, say: Callable[[str], None]) -> Start:
    given = Path(config.run.init).expanduser()
    imported = Path(config.run.dir) / "init"
    found = mesh.broadcast_object(mesh.agree(lambda: locate(given, imported) if mesh.rank == 0 else None))
    if (found / INDEX).is_file():
        path = found
        mesh.agree(lambda: Checkpoint(found).verify(mesh.rank, mesh.size))
    else:
        path, warnings = newest_whole(found / "checkpoints" if (found / "checkpoints").is_dir() else found, mesh)
        for warning in warnings:
            say(f"warning: {warning}")
    if path is None:
        raise ConfigError(f"run.init={config.run.init} holds no checkpoint: name a run that has saved one")
    checkpoint = mesh.agree(lambda: Checkpoint(path))
    mesh.agree(lambda: _same_tokenizer(config, path))
    keep = config.run.init_optimizer == "keep" and "exp_avg" in checkpoint.kinds
    meta = checkpoint.meta
    return Start(checkpoint=checkpoint, optimizer_step=meta.get("optimizer_step", meta["step"]) if keep else None, tokenizer=path)


def locate(given: Path, imported: Path) -> Path:
    """The checkpoint that `given` names, or a folder of checkpoints (of a run with stages, its last one's); the folder of a Hugging Face model is
    first converted into `imported`."""
    given = last_stage(given)
    if (given / INDEX).is_file() or (given / "checkpoints").is_dir() or newest(given):
        return given
    if not (given / "config.json").is_file():
        raise ConfigError(f"run.init={given} is neither a checkpoint or run of ltrain nor a Hugging Face model: name a folder that is")
    done = newest(imported)
    if done is None:
        from ltrain.families.convert import import_checkpoint

        shutil.rmtree(imported, ignore_errors=True)  # of an import that was killed
        done = import_checkpoint(given, imported, log=lambda line: print(line, file=sys.stderr))
    return done


def _same_tokenizer(config: Config, checkpoint: Path) -> None:
    """The checkpoint's tokenizer is used; the config must not say otherwise."""
    saved, asked = load(checkpoint / "config.yaml").data.tokenizer, config.data.tokenizer
    for name in ("kind", "vocab") if asked.kind == "bpe" else ("kind",):
        if getattr(saved, name) != getattr(asked, name):
            raise ConfigError(
                f"data.tokenizer.{name}={getattr(asked, name)}, but run.init={config.run.init} was trained with {getattr(saved, name)}: write that"
            )
