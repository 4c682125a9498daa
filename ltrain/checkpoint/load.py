"""Loading: any rectangle of any logical tensor, from whatever layout it was saved."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltrain.checkpoint import folder
from ltrain.checkpoint.collectives import CheckpointError, Collectives, DamagedError, LocalCollectives, first, gather
from ltrain.checkpoint.index import DTYPES, INDEX, Index, Logical, Shape, Stored
from ltrain.checkpoint.shard import read_crc


class Checkpoint:
    """A complete checkpoint on the disk. Files are mapped as they are first read; `close` (or `with`) lets go of them.

    path: the checkpoint's folder; verify: also read every file once and compare checksums (one rank reads them all:
    `newest_whole` shares that work between ranks).
    Errors: DamagedError (a CheckpointError, a ValueError) where a file is missing, cut short or changed; CheckpointError for another
    format version or a tensor that is not in the checkpoint.
    """

    def __init__(self, path: Path | str, verify: bool = False):
        self.path = Path(path)
        try:
            text = (self.path / INDEX).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{self.path} has no {INDEX}, so it is not a complete checkpoint: name a folder step-*") from error
        except OSError as error:
            raise CheckpointError(f"{self.path / INDEX} cannot be read ({error.strerror}): check its permissions and its disk") from error
        self._index = Index.decode(text, str(self.path / INDEX))
        self._open: dict[str, Any] = {}
        for name, record in self._index.files.items():
            file = self.path / name
            if not file.is_file():
                raise DamagedError(f"{file} is missing: use an older checkpoint")
            if file.stat().st_size != record.size:
                raise DamagedError(f"{file} has {file.stat().st_size} bytes and should have {record.size}: use an older checkpoint")
        if verify:
            self.verify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.clear()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._index.step

    @property
    def meta(self) -> dict[str, Any]:
        """What the run saved beside its tensors."""
        return self._index.meta

    @property
    def kinds(self) -> list[str]:
        return list(self._index.tensors)

    def names(self, kind: str) -> list[str]:
        """Global names of the tensors of a kind."""
        return list(self._index.tensors.get(kind, {}))

    def shape(self, name: str, kind: str) -> Shape:
        """Of the whole tensor."""
        return self._logical(name, kind).shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self._logical(name, kind).dtype

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of the part-th of `parts` shares of the files; DamagedError names the first that differs."""
        for name in sorted(self._index.files)[part::parts]:
            try:
                crc = read_crc(self.path / name)
            except OSError as error:
                raise DamagedError(f"{self.path / name} cannot be read ({error.strerror}): use an older checkpoint") from error
            if crc != self._index.files[name].crc32:
                raise DamagedError(f"{self.path / name} does not match its checksum: use an older checkpoint")

    def read(self, name: str, kind: str, start: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """The rectangle `shape` at `start` of a logical tensor (all of it without them), in its saved dtype, on the CPU.

        Reads only the bytes of the rectangle. Errors: CheckpointError for an unknown tensor or a rectangle outside it.
        """
        logical = self._logical(name, kind)
        start = (0,) * len(logical.shape) if start is None else tuple(start)
        shape = tuple(n - s for n, s in zip(logical.shape, start, strict=False)) if shape is None else tuple(shape)
        if not len(start) == len(shape) == len(logical.shape) or not all(
            0 <= s and 0 <= n and s + n <= full for s, n, full in zip(start, shape, logical.shape, strict=True)
        ):
            raise CheckpointError(
                f"{kind} of {name} has shape {list(logical.shape)} in {self.path} and {list(shape)} at {list(start)} was asked for: "
                "give the model that was saved"
            )
        out = torch.empty(shape, dtype=logical.dtype)
        filled = 0
        for piece in logical.pieces:
            low = [max(s, p) for s, p in zip(start, piece.start, strict=True)]
            high = [min(s + n, p + m) for s, n, p, m in zip(start, shape, piece.start, piece.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = self._piece(piece, logical)[tuple(slice(a - p, b - p) for a, b, p in zip(low, high, piece.start, strict=True))]
            out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))].copy_(source)
            filled += source.numel()
        assert filled == math.prod(shape)  # the index was checked to cover every element once
        return out

    def _logical(self, name: str, kind: str) -> Logical:
        try:
            return self._index.tensors[kind][name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}: give the model that was saved") from None

    def _piece(self, piece: Stored, logical: Logical) -> Any:
        """A lazy view of a stored piece: indexing it reads."""
        path = self.path / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(path, framework="pt")
            stored = self._open[piece.file].get_slice(piece.key)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{path} cannot be read ({error}): use an older checkpoint") from error
        found, expected = (stored.get_dtype(), list(stored.get_shape())), (DTYPES[logical.dtype], list(piece.shape))
        if found != expected:
            raise DamagedError(
                f"{path} holds {piece.key} as {found[0]} {found[1]} and the index says {expected[0]} {expected[1]}: use an older checkpoint"
            )
        return stored


def newest_sized(root: Path | str) -> Path | None:
    """The newest checkpoint that has all its files in their sizes, else the newest; nothing but indices is read.

    Errors: CheckpointError where one that would be it has another version, as of `newest_whole`.
    """

    def sized(path: Path) -> bool:
        try:
            Checkpoint(path).close()
        except DamagedError:
            return False
        return True

    found = list(reversed(folder.steps(Path(root)).values()))
    return next(filter(sized, found), found[0] if found else None)


def newest_whole(root: Path | str, collectives: Collectives | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every checksum holds, the same on all ranks, and one warning per damaged newer one.

    root: the run's `checkpoints` folder; (None, []) where it holds none. The ranks share the reading.
    Errors: CheckpointError where there are checkpoints and none is whole (starting over would be a surprise), or the newest has another version.
    """
    collectives = collectives or LocalCollectives()
    warnings: list[str] = []
    for path in first(collectives, lambda: list(reversed(folder.steps(Path(root)).values()))):
        fault = _shared_fault(path, collectives)
        if fault is None:
            return path, warnings
        warnings.append(f"checkpoint {path.name} is damaged and is passed over: {fault}")
    if warnings:
        raise CheckpointError(f"none of the {len(warnings)} checkpoints in {root} is whole: {warnings[0]}; move them away to start over")
    return None, warnings


def _shared_fault(path: Path, collectives: Collectives) -> str | None:
    """What is damaged in a checkpoint, on every rank alike; each rank reads its share of the files."""

    def work() -> str | None:
        try:
            with Checkpoint(path) as checkpoint:
                checkpoint.verify(collectives.rank, collectives.size)
        except DamagedError as error:
            return str(error)
        return None

    faults = gather(collectives, work)
    return first(collectives, lambda: next(filter(None, faults or []), None))
