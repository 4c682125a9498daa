"""The checkpoints of a run, saved one at a time, while training goes on."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.checkpoint.collectives import Collectives, first, gather
from ltrain.checkpoint.save import Entry, Save, plan

PATIENCE = 0.02  # seconds between two looks at a save that is waited for


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete on the disk."""

    path: Path
    step: int
    seconds: float  # from the beginning of the save
    blocked_seconds: float  # of them, those in which training stood still


class HostCopies:
    """Copies of tensors in host memory that is kept from one round to the next: pinned for tensors of a GPU, which copy faster into it."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._used = 0

    def again(self) -> None:
        """Begin a round: the copies of the last one are given up."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy, complete after `arrived`; `tensor` may then change."""
        if self._used < len(self._memory):
            held = self._memory[self._used]
            if (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                del held, self._memory[self._used :]  # another state than the last: its memory goes before more is taken
        if self._used == len(self._memory):
            self._memory.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))
        self._used += 1
        return self._memory[self._used - 1].copy_(tensor.detach(), non_blocking=True)

    def arrived(self) -> None:
        """Wait for the copies, and let go of memory that this round did not need."""
        del self._memory[self._used :]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


class _Work[T]:
    """A function's result, made in a thread."""

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._value: T | None = None
        self._failure: BaseException | None = None
        # a daemon: a process that must end does not wait for a disk
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as failure:  # noqa: BLE001 - raised where the result is asked for
            self._failure = failure

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._value  # type: ignore[return-value]


class Saver:
    """Saves into `root`, at most one checkpoint at a time.

    `save` copies this rank's tensors to host memory and returns; a thread writes them. No thread talks to other ranks: `poll`, which the
    ranks call at each step, lets them see together that all have written, and publishes. Host memory holds one copy of the state.
    Every method is called by all ranks together. Errors, on every rank where one rank fails, and possibly in a later call than the one that
    began the save: CheckpointError, as of `save`; the checkpoints that were there stay.

    root, keep: as of `ltrain.checkpoint.save`. asynchronous: False makes `save` wait until its checkpoint is complete.
    """

    def __init__(self, root: Path | str, collectives: Collectives, keep: int = 0, asynchronous: bool = True):
        self.root, self.collectives, self.keep, self.asynchronous = Path(root), collectives, keep, asynchronous
        self._copies = HostCopies()
        self._save: Save | None = None  # the one under way
        self._work: _Work[Any] | None = None  # this rank's shard; once that is published, on rank 0 the deletion of old checkpoints
        self._published = False
        self._began = self._blocked = 0.0

    def save(self, step: int, tensors: Iterable[Entry], meta: dict[str, Any], files: Mapping[str, bytes] | None = None) -> list[Saved]:
        """Begin to save, after the one under way. The tensors may change as soon as this returns. Returns what became complete."""
        began = time.perf_counter()
        complete = self.wait()
        self._began, self._blocked = began, 0.0
        with self._blocking(began):
            self._copies.again()
            try:
                planned = plan(tensors, self.collectives, self._copies.copy)
            finally:
                self._copies.arrived()
            self._save = Save(planned, self.root, step, meta, self.collectives, files or {}, self.keep)
            self._published = False
            self._work = _Work(self._save.write)
        return complete if self.asynchronous else complete + self.wait()

    def poll(self) -> Saved | None:
        """Without waiting: the checkpoint that became complete, if all ranks have written it."""
        if self._work is None or not self.collectives.all(self._work.done):
            return None
        with self._blocking(time.perf_counter()):
            return self._advance()

    def wait(self) -> list[Saved]:
        """Until no save is under way. Returns what became complete."""
        complete: list[Saved] = []
        while self._work is not None:
            began = time.perf_counter()
            # many short looks and not one long wait, so that no collective outlasts its timeout while another rank still writes
            while not self.collectives.all(self._work.done):
                time.sleep(PATIENCE)
            with self._blocking(began):
                saved = self._advance()
            complete += [saved] if saved else []
        return complete

    def _advance(self) -> Saved | None:
        save, work = self._save, self._work
        assert save is not None and work is not None
        self._work = None
        try:
            if not self._published:
                shards = gather(self.collectives, work.result)
                path = first(self.collectives, lambda: save.publish(shards or []))
                self._published = True
                self._work = _Work(save.prune if self.collectives.rank == 0 else lambda: None)
                now = time.perf_counter()
                return Saved(path, save.step, now - self._began, self._blocked + now - self._entered)
            first(self.collectives, work.result)
            return None
        finally:
            if self._work is None:
                self._save = None
                save.close()

    @contextmanager
    def _blocking(self, since: float) -> Iterator[None]:
        self._entered = since
        try:
            yield
        finally:
            self._blocked += time.perf_counter() - since
