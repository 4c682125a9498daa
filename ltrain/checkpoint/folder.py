"""The folder that holds a run's checkpoints, and the renames that make a save all or nothing.

step-00000100/           a complete checkpoint: it got this name after everything in it was on the disk
.tmp-step-00000100-1f3a/ being written, or left by a process that died
.old-step-00000100/      moved aside for its replacement; still the checkpoint of its step until that has its name
.trash-.../              being deleted
.lock                    held (flock) by rank 0 of the process that saves
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ltrain.checkpoint.collectives import CheckpointError, Collectives, first
from ltrain.checkpoint.index import INDEX
from ltrain.checkpoint.shard import sync_folder

_STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> dict[int, Path]:
    """The complete checkpoints by step, ascending. A step whose replacement was interrupted is found where it was moved to."""
    found: dict[int, Path] = {}
    for path in sorted(Path(root).glob("*step-*")):  # `.old-` sorts before the step's own name, which then wins
        match = _STEP.fullmatch(path.name)
        if match and (path / INDEX).is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest(root: Path | str) -> Path | None:
    """The checkpoint of the highest step in `root` (the `checkpoints` folder of a run), or None. Looks at names only."""
    return next(reversed(steps(Path(root)).values()), None)


def last_stage(run: Path) -> Path:
    """The folder of the last stage (`NN-NAME`) that has saved in the folder of a run with stages; any other folder itself."""
    saved = (path.parent for path in sorted(run.glob("[0-9][0-9]-*/checkpoints"), reverse=True) if newest(path))
    return next(saved, run)


@contextmanager
def locked(root: Path) -> Iterator[bool]:
    """Hold the folder's lock; False where another process holds it. The system releases it when its holder dies."""
    descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            # A file system without locks (some network ones) cannot tell: then this process is taken to be alone.
            free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        try:
            yield free
        finally:
            if free:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked process has a copy
    finally:
        os.close(descriptor)


def clean(root: Path | str, collectives: Collectives) -> None:
    """Remove what dead saves left, at the start of a run. Rank 0 acts; while another process saves here, nothing is touched."""

    def work() -> None:
        if Path(root).is_dir():
            with locked(Path(root)) as free:
                if free:
                    remove_leftovers(Path(root))

    first(collectives, work)


def remove_leftovers(root: Path) -> None:
    """Finish or undo what a dead save left. The caller holds the lock."""
    for old in root.glob(".old-step-*"):
        current = root / old.name.removeprefix(".old-")
        if current.exists():
            discard(old)
        else:
            os.rename(old, current)
            sync_folder(root)
    for pattern in (".tmp-step-*", ".trash-*"):
        for path in root.glob(pattern):
            discard(path)


def temporary(root: Path, step: int) -> Path:
    """A new hidden folder to write a step into. Its name is new, so a dying rank of an earlier run cannot write into it."""
    path = root / f".tmp-{step_name(step)}-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def publish(path: Path, root: Path, step: int) -> Path:
    """Give a complete temporary folder its step's name; a kill at any point leaves the old checkpoint of the step or the new one."""
    final, old = root / step_name(step), root / f".old-{step_name(step)}"
    sync_folder(path)
    if final.exists():
        os.rename(final, old)
        try:
            os.rename(path, final)
        except OSError:
            os.rename(old, final)
            raise
    else:
        os.rename(path, final)
    sync_folder(root)
    if old.exists():
        discard(old)
    return final


def prune(root: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to `step` (0: all).

    Those of later steps are left alone: a run that resumed from before them did so because they were damaged, and they must
    not push out whole ones.
    """
    if keep:
        for path in [p for s, p in steps(root).items() if s <= step][:-keep]:
            discard(path)


def discard(path: Path) -> None:
    """Delete a folder, first taking away the name under which it counts as a checkpoint."""
    trash = path.with_name(f".trash-{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    os.rename(path, trash)
    sync_folder(path.parent)
    # Where a file cannot go yet (still open on a network file system) the next save tries again.
    shutil.rmtree(trash, ignore_errors=True)


def refuse_busy(root: Path, free: bool) -> None:
    if not free:
        raise CheckpointError(f"another process is saving a checkpoint into {root}: give each run its own run.dir")
