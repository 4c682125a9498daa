"""Saving: agree on who writes what (`plan`), then write it as one atomic step (`write`)."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.checkpoint import folder
from ltrain.checkpoint.collectives import CheckpointError, Collectives, first, gather
from ltrain.checkpoint.index import DTYPES, INDEX, FileRecord, Index, Logical, Shape, Stored, check_meta, coverage_fault, dtype_name
from ltrain.checkpoint.shard import FULL, write_file, write_shard


@dataclass(frozen=True)
class Entry:
    """A rectangle of a logical tensor that this rank holds."""

    name: str  # global: layers.3.ffn.experts.17.up
    kind: str  # param (master weight) | exp_avg | exp_avg_sq | buffer
    shape: Shape  # of the whole logical tensor
    start: Shape  # of `tensor` in it
    tensor: Tensor


@dataclass(frozen=True)
class _Description:
    """An Entry without its values, as it travels to rank 0."""

    name: str
    kind: str
    shape: Shape
    start: Shape
    extent: Shape
    dtype: torch.dtype
    size: int  # bytes

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{','.join(map(str, self.start))}"


@dataclass(frozen=True)
class Plan:
    """What this rank writes, and on rank 0 what everybody does."""

    shard: str  # file name of this rank
    own: list[tuple[str, Tensor]]  # key in the file, values
    tensors: dict[str, dict[str, Logical]]  # of the whole checkpoint; rank 0 only
    total_bytes: int  # of tensors, over all ranks


def save(
    root: Path | str,
    step: int,
    tensors: Iterable[Entry],
    meta: dict[str, Any],
    collectives: Collectives,
    files: Mapping[str, bytes] | None = None,
    keep: int = 0,
) -> Path:
    """Save a checkpoint of all ranks together, whole or not at all, and return its folder.

    root: the run's `checkpoints` folder, on a file system that all ranks share; step: optimizer steps done;
    tensors: everything this rank holds, replicas included: one of the ranks that hold a piece writes it;
    meta: plain JSON (tokens seen, layout, loader and random states); rank 0's is kept; files: further files by name
    (config.yaml, the tokenizer's), rank 0's; keep: how many checkpoints up to this step stay, 0 for all.

    Errors, on every rank where one rank fails: CheckpointError for a full disk, pieces that do not make up their tensor, or another
    process saving into the same folder. The checkpoints that were there stay.
    """
    return write(plan(tensors, collectives), Path(root), step, meta, collectives, files or {}, keep)


def plan(tensors: Iterable[Entry], collectives: Collectives, copy: Callable[[Tensor], Tensor] = Tensor.cpu) -> Plan:
    """Check that all ranks' pieces make up whole tensors and choose one writer for each; nothing touches the disk.

    copy: what of a tensor is kept until it is written, on the host.
    """
    entries: list[Entry] = []

    def describe() -> list[_Description]:
        entries.extend(_copies(tensors, copy))
        return [_describe(e) for e in entries]

    everyone = gather(collectives, describe)
    tensors_of_all: dict[str, dict[str, Logical]] = {}

    def choose() -> tuple[list[list[int]], int]:
        assert everyone is not None
        writes = _choose_writers(everyone)
        tensors_of_all.update(_assemble(everyone, writes))
        return writes, sum(everyone[r][i].size for r, chosen in enumerate(writes) for i in chosen)

    writes, total = first(collectives, choose)
    own = [(_describe(entries[i]).key, entries[i].tensor) for i in writes[collectives.rank]]
    return Plan(shard_name(collectives.rank), own, tensors_of_all, total)


def _copies(tensors: Iterable[Entry], copy: Callable[[Tensor], Tensor]) -> list[Entry]:
    """A copy that fails does not end the walk: the other ranks walk with this one, through collectives, before they hear of it."""
    entries: list[Entry] = []
    failure: Exception | None = None
    for entry in tensors:
        if failure is None:
            try:
                entries.append(replace(entry, tensor=copy(entry.tensor)))
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    return entries


class Save:
    """One save under way: every rank's `write`, then rank 0's `publish` and `prune`, none of them a collective; `close` in any case.

    Building it is collective: it checks the arguments (those of `save`), takes the folder's lock and makes the temporary folder.
    """

    def __init__(self, plan: Plan, root: Path, step: int, meta: dict[str, Any], collectives: Collectives, files: Mapping[str, bytes], keep: int):
        self.plan, self.root, self.step, self.meta, self.files, self.keep = plan, root, step, meta, files, keep
        self.need = plan.total_bytes + sum(map(len, files.values()))  # bytes
        self._lock = ExitStack()
        self._temporary: Path | None = None  # on rank 0, until it is published
        try:
            self.path = first(collectives, self._prepare)
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> Path:
        _check_arguments(self.step, self.meta, self.files, self.keep)
        with self._explained():
            self.root.mkdir(parents=True, exist_ok=True)
            folder.refuse_busy(self.root, self._lock.enter_context(folder.locked(self.root)))
            folder.remove_leftovers(self.root)
            if self.need > shutil.disk_usage(self.root).free:
                raise _no_room(self.step, self.root, self.need)
            self._temporary = folder.temporary(self.root, self.step)
            return self._temporary

    def _explained(self) -> AbstractContextManager[None]:
        return _explained(self.step, self.root, self.need)

    def write(self) -> FileRecord | None:
        """This rank's shard."""
        with self._explained():
            return write_shard(self.path / self.plan.shard, self.plan.own) if self.plan.own else None

    def publish(self, shards: list[FileRecord | None]) -> Path:
        """shards: what `write` gave on each rank. After this the checkpoint counts."""
        records = {shard_name(rank): record for rank, record in enumerate(shards) if record is not None}
        with self._explained():
            for name, content in self.files.items():
                records[name] = write_file(self.path / name, [content])
            write_file(self.path / INDEX, [Index(self.step, self.meta, self.plan.tensors, records).encode()])
            final = folder.publish(self.path, self.root, self.step)
        self._temporary = None
        return final

    def prune(self) -> None:
        """Delete what `keep` leaves no place for."""
        with self._explained():
            folder.prune(self.root, self.step, self.keep)

    def close(self) -> None:
        """Let go of the folder; what was not published goes."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
        self._lock.close()


def write(plan: Plan, root: Path, step: int, meta: dict[str, Any], collectives: Collectives, files: Mapping[str, bytes], keep: int) -> Path:
    """Write a plan to the disk; arguments and errors as in `save`."""
    with closing(Save(plan, root, step, meta, collectives, files, keep)) as under_way:
        shards = gather(collectives, under_way.write)
        final = first(collectives, lambda: under_way.publish(shards or []))
        first(collectives, under_way.prune)
        return final


@contextmanager
def _explained(step: int, root: Path, need: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _no_room(step, root, need, os.strerror(error.errno)) from error
        raise CheckpointError(f"cannot save the checkpoint of step {step} into {root} ({error}): check that folder") from error


def _no_room(step: int, root: Path, need: int, cause: str = "") -> CheckpointError:
    free = shutil.disk_usage(root).free
    return CheckpointError(
        f"no room for the checkpoint of step {step}: it needs {need / 1e6:,.1f} MB and {root} has {free / 1e6:,.1f} MB free"
        f"{cause and f' ({cause})'}: free space there, or set run.dir to another disk"
    )


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _check_arguments(step: int, meta: dict[str, Any], files: Mapping[str, bytes], keep: int) -> None:
    if step < 0:
        raise CheckpointError(f"the step of a checkpoint is {step}: give the number of optimizer steps done")
    if keep < 0:
        raise CheckpointError(f"checkpoint.keep is {keep}: give the number of checkpoints to keep, or 0 for all")
    check_meta(meta)
    for name in files:
        if name != os.path.basename(name) or name.startswith(".") or name == INDEX or name.endswith(".safetensors"):
            raise CheckpointError(f"a checkpoint cannot hold a file named {name!r}: give a plain name other than {INDEX} and *.safetensors")


def _describe(entry: Entry) -> _Description:
    t = entry.tensor
    if t.dtype not in DTYPES:
        raise CheckpointError(f"{entry.kind} of {entry.name} is {dtype_name(t.dtype)}, which safetensors does not hold: convert it to a real type")
    return _Description(entry.name, entry.kind, tuple(entry.shape), tuple(entry.start), tuple(t.shape), t.dtype, t.numel() * t.element_size())


def _choose_writers(everyone: list[list[_Description]]) -> list[list[int]]:
    """Per rank the positions it writes: of the ranks that hold the same rectangle, the one with the least to write so far."""
    holders: dict[tuple[str, str, Shape, Shape], list[tuple[int, int]]] = defaultdict(list)
    for rank, descriptions in enumerate(everyone):
        for i, d in enumerate(descriptions):
            if d.size or not all(d.shape):  # an empty piece matters only where the whole tensor is empty
                holders[d.kind, d.name, d.start, d.extent].append((rank, i))
    load = [0] * len(everyone)
    writes: list[list[int]] = [[] for _ in everyone]
    for held in sorted(holders.values(), key=lambda held: (len({rank for rank, _ in held}), -everyone[held[0][0]][held[0][1]].size)):
        rank, i = min(held, key=lambda at: (load[at[0]], at[0]))
        writes[rank].append(i)
        load[rank] += everyone[rank][i].size
    return [sorted(chosen) for chosen in writes]


def _assemble(everyone: list[list[_Description]], writes: list[list[int]]) -> dict[str, dict[str, Logical]]:
    """The index's tensors. Errors: ranks that disagree on a shape or a dtype, elements that no rank or two different pieces hold."""
    seen: dict[tuple[str, str], _Description] = {}
    for rank, descriptions in enumerate(everyone):
        for d in descriptions:
            one = seen.setdefault((d.kind, d.name), d)
            if (one.shape, one.dtype) != (d.shape, d.dtype):
                raise CheckpointError(
                    f"{d.kind} of {d.name} is {dtype_name(d.dtype)} {list(d.shape)} on rank {rank} and {dtype_name(one.dtype)} {list(one.shape)} "
                    "on another: give its whole shape and one dtype on every rank"
                )
    pieces: dict[tuple[str, str], list[Stored]] = {at: [] for at in seen}
    for rank, chosen in enumerate(writes):
        for i in chosen:
            d = everyone[rank][i]
            pieces[d.kind, d.name].append(Stored(d.start, d.extent, shard_name(rank), d.key))
    tensors: dict[str, dict[str, Logical]] = defaultdict(dict)
    for (kind, name), d in seen.items():
        fault = coverage_fault(d.shape, [(p.start, p.shape) for p in pieces[kind, name]])
        if fault:
            raise CheckpointError(f"{kind} of {name} {fault}: give every element in pieces that are equal or disjoint")
        tensors[kind][name] = Logical(d.shape, d.dtype, tuple(pieces[kind, name]))
    return dict(tensors)
