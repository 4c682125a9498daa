"""What the writer and the reader ask of the other ranks. The real one lives in `ltrain.parallel`; one rank needs none."""

from collections.abc import Callable
from typing import Any, Protocol


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, in one sentence for people."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are missing, cut short or changed: an older one may still be whole."""


class Collectives(Protocol):
    """Objects are small and can be pickled. Every rank calls every method, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Every rank's object in rank order on rank 0, None elsewhere."""
        ...

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's object on every rank."""
        ...

    def all(self, flag: bool) -> bool:
        """Whether every rank's flag is true, on every rank."""
        ...


class LocalCollectives:
    """One rank."""

    rank = 0
    size = 1

    def gather_object(self, obj: Any) -> list[Any] | None:
        return [obj]

    def broadcast_object(self, obj: Any) -> Any:
        return obj

    def all(self, flag: bool) -> bool:
        return flag


def gather[T](collectives: Collectives, work: Callable[[], T]) -> list[T] | None:
    """Every rank's work() on rank 0 (None elsewhere). Where it fails on any rank it raises on all of them.

    Any Exception counts: a rank that raised alone would leave the others waiting in their next collective.
    """
    value, failure = _attempt(work)
    gathered = collectives.gather_object((None if failure is None else _sentence(failure), value))
    message = None
    if gathered is not None:
        failed = [(rank, text) for rank, (text, _) in enumerate(gathered) if text is not None]
        if failed:
            rank, message = failed[0]
            if collectives.size > 1:
                others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
                message = f"rank {rank}{others}: {message}"
    message = collectives.broadcast_object(message)
    if message is not None:
        raise CheckpointError(message) from failure
    return None if gathered is None else [value for _, value in gathered]


def first[T](collectives: Collectives, work: Callable[[], T]) -> T:
    """Rank 0's work() on every rank, or its error on every rank."""
    value, failure = _attempt(work) if collectives.rank == 0 else (None, None)
    message, value = collectives.broadcast_object((None if failure is None else _sentence(failure), value))
    if message is not None:
        raise CheckpointError(message) from failure
    return value  # type: ignore[return-value]


def _attempt[T](work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as failure:  # whatever it is, the other ranks must hear of it
        return None, failure


def _sentence(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
