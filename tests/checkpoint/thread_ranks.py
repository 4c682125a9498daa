"""Ranks as threads of one process, for checkpoints saved by several."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ThreadCollectives:
    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]):
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def gather_object(self, obj: Any) -> list[Any] | None:
        self._slots[self.rank] = obj
        self._barrier.wait()
        gathered = list(self._slots) if self.rank == 0 else None
        self._barrier.wait()
        return gathered

    def broadcast_object(self, obj: Any) -> Any:
        if self.rank == 0:
            self._slots[0] = obj
        self._barrier.wait()
        value = self._slots[0]
        self._barrier.wait()
        return value

    def all(self, flag: bool) -> bool:
        gathered = self.gather_object(flag)
        return self.broadcast_object(gathered is not None and all(gathered))


def on_ranks(size: int, work: Callable[[ThreadCollectives], Any]) -> list[Any]:
    """work(collectives) on every rank; each rank's result, or the exception it raised. A rank left waiting fails after 10 s."""
    barrier, slots = threading.Barrier(size, timeout=10), [None] * size

    def run(rank: int) -> Any:
        try:
            return work(ThreadCollectives(rank, size, barrier, slots))
        except Exception as error:  # the test looks at it
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
