"""Micro-batches for one data rank, in an order that no number of ranks or workers changes.

The data is V virtual shards, each packed alone; micro-batch j comes from shard j mod V. Data rank r of D yields
j = r, r + D, r + 2D, ...; as D divides V, a shard is read by one rank only. The state is the shards' cursors after the
micro-batches that were handed out, whatever the workers have packed ahead.
"""

import atexit
import mmap
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ltrain.data.mixture import Mixture
from ltrain.data.order import Corpus, Cursor
from ltrain.data.packing import MicroBatch, Packer, Stream
from ltrain.data.tokenizer import Tokenizer

SLOT = 1024  # bytes in which a worker notes the document it is at


@dataclass
class Failure:
    """An exception in a worker, as it travels to the training process."""

    message: str
    trace: str


class PackedShards(IterableDataset[Stream | Failure]):
    """Streams of this rank's shards in turn, from the shard that is next. Worker w of W takes every W-th."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        tokens: int,
        sequence_length: int,
        shards: int,
        turns: list[int],
        cursors: dict[int, tuple[Cursor, ...]],
        desk: mmap.mmap,
    ):
        self.mixture, self.tokenizer, self.tokens, self.sequence_length, self.shards = mixture, tokenizer, tokens, sequence_length, shards
        self.turns, self.cursors, self.desk = turns, cursors, desk

    def streams(self, worker: int, workers: int) -> Iterator[Stream]:
        turns = self.turns[worker::workers]
        cursors = {shard: self.cursors[shard] for shard in turns}
        readers = self.mixture.readers(self.shards, cursors)

        def notice(name: str) -> None:
            self.desk[worker * SLOT : (worker + 1) * SLOT] = name.encode(errors="replace")[:SLOT].ljust(SLOT, b"\0")

        packers = [
            Packer(
                [partial(read, shard) for read in readers],
                self.tokenizer,
                self.tokens,
                shares=self.mixture.weights,
                whole=[part.whole for part in self.mixture.parts],
                sequence_length=self.sequence_length,
                shard=shard,
                cursors=cursors[shard],
                notice=notice,
            )
            for shard in turns
        ]
        while True:
            for each in packers:
                stream = each.next()
                assert stream is not None  # without a last epoch a packer never ends
                yield stream

    def __iter__(self) -> Iterator[Stream | Failure]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self.streams(info.id, info.num_workers)
        except Exception as error:  # noqa: BLE001 (whatever it is, the training process raises it)
            yield Failure(str(error) if isinstance(error, ValueError) else f"data: {type(error).__name__}: {error}", traceback.format_exc())


def start_worker(worker: int) -> None:
    # The training process decides when to stop: a signal to the whole process group must not take its data away before that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's thread pool does not survive a fork


def as_is(stream: Any) -> Any:
    return stream


class Loader:
    """Iterates over this rank's micro-batches without end. Workers start with the loader; `close` ends them.

    Args:
        corpus, tokenizer: the documents and what encodes them.
        tokens: length of a micro-batch.
        sequence_length: longest piece of a document, 0: that of the micro-batch; see `Packer`.
        shards: V, the fixed number of virtual shards.
        workers: tokenising processes at most; as many run as divide this rank's shards. 0: none.
        rank, ranks: the data rank and how many there are.
        seed: of the training order.
        state: a merged state to go on from; None: the beginning.

    Raises:
        ValueError: `ranks` does not divide V, or the state belongs to other shards, documents, tokenizer or seed.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        tokenizer: Tokenizer,
        *,
        tokens: int,
        sequence_length: int = 0,
        shards: int,
        workers: int,
        rank: int,
        ranks: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        if shards < 1 or shards % ranks:
            raise ValueError(f"data.shards={shards} does not divide over {ranks} data ranks: write a multiple of {ranks}")
        if tokens < 2:
            raise ValueError(f"data.tokens={tokens} is too short for a micro-batch: write at least 2")
        if workers < 0:
            raise ValueError(f"data.workers={workers} is not a number of processes: write 0 or more")
        self.ranks = ranks
        mixture = Mixture.of(corpus)
        self.parts = len(mixture.parts)
        self.identity = {"shards": shards, "seed": seed, "documents": mixture.fingerprint, "tokenizer": tokenizer.fingerprint}
        mine = range(rank, shards, ranks)
        self.cursors, begin = self._restore(state, mine)
        self.index = begin + (rank - begin) % ranks  # this rank's next micro-batch
        self.next_index = begin  # the lowest micro-batch that no rank has handed out, when all have handed out equally many
        turn = mine.index(self.index % shards)
        turns = [*mine[turn:], *mine[:turn]]
        self.workers = max((n for n in range(1, workers + 1) if len(mine) % n == 0), default=0)
        self._desk = mmap.mmap(-1, SLOT * max(1, self.workers))  # shared with the workers through the fork
        packed = PackedShards(mixture, tokenizer, tokens, sequence_length, shards, turns, self.cursors.copy(), self._desk)
        self._streams: Iterator[Stream | Failure] | None = self._start(packed) if self.workers else packed.streams(0, 1)

    def _restore(self, state: dict[str, Any] | None, mine: range) -> tuple[dict[int, tuple[Cursor, ...]], int]:
        if state is None:
            return {shard: (Cursor(),) * self.parts for shard in mine}, 0
        what = {"shards": "data.shards", "seed": "seed", "documents": "the training documents", "tokenizer": "the tokenizer"}
        for key, value in self.identity.items():
            if state[key] != value:
                raise ValueError(f"{what[key]} changed since the run was saved ({state[key]} then, {value} now): restore it, or start a new run")
        missing = [shard for shard in mine if str(shard) not in state["cursors"]]
        if missing:
            raise ValueError(f"the loader state has no cursor of shards {missing}: merge the states of all data ranks")
        return {shard: cursors_of(state["cursors"][str(shard)]) for shard in mine}, state["next"]

    def _start(self, packed: PackedShards) -> Iterator[Stream | Failure]:
        import torch

        loader = DataLoader(
            packed,
            batch_size=None,  # a stream is whole as it is
            collate_fn=as_is,
            num_workers=self.workers,
            multiprocessing_context="fork",
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own, or starting a loader would move the training's random numbers
        )
        on_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if on_main_thread else None
        streams = iter(loader)
        if on_main_thread:
            # torch would raise a worker's death anywhere in the training step; __next__ notices it too, and can name the document.
            signal.signal(signal.SIGCHLD, handler)
        # Workers ignore SIGTERM, by which multiprocessing ends them at exit: end them before it waits for that.
        self._at_exit = close_at_exit(weakref.ref(self))
        return streams

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        if self._streams is None:
            raise ValueError("the loader is closed: open another with its state")
        try:
            stream = next(self._streams)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise ValueError(
                f"data: a tokenising process died at {self._documents()} ({error}): give it more memory, or leave the document out"
            ) from error
        if isinstance(stream, Failure):
            self.close()
            raise ValueError(stream.message) from RuntimeError(stream.trace)  # noqa: TRY004 (a message, not a type, arrived)
        batch = MicroBatch.of(stream, self.index)
        self.cursors[stream.shard] = stream.cursors
        self.index += self.ranks
        self.next_index += self.ranks
        return batch

    def _documents(self) -> str:
        names = [self._desk[i * SLOT : (i + 1) * SLOT].rstrip(b"\0").decode(errors="replace") for i in range(self.workers)]
        return " or ".join(name for name in names if name) or "its first document"

    def state(self) -> dict[str, Any]:
        """JSON-able: this rank's cursors after the micro-batches it handed out, and the next global micro-batch."""
        cursors = {str(shard): [list(cursor) for cursor in cursors] for shard, cursors in sorted(self.cursors.items())}
        return {"next": self.next_index, **self.identity, "cursors": cursors}

    def close(self) -> None:
        """End the workers; the state can still be read."""
        streams, self._streams = self._streams, None
        if streams is not None and self.workers:
            atexit.unregister(self._at_exit)
            end_workers(streams)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cursors_of(saved: list[Any]) -> tuple[Cursor, ...]:
    """A shard's cursors out of a state; the first states had the one cursor of the one source there was."""
    return tuple(Cursor(*cursor) for cursor in (saved if isinstance(saved[0], list) else [saved]))


def end_workers(streams: Any) -> None:
    """Now, not when the last reference goes: the traceback of an error may hold one for long."""
    streams._shutdown_workers()
    for process in streams._workers:
        if process.is_alive():  # inside a document that takes longer than torch waits, and deaf to SIGTERM
            process.kill()
            process.join()


def close_at_exit(loader: "weakref.ref[Loader]") -> Any:
    def close() -> None:
        alive = loader()
        if alive is not None:
            alive.close()

    return atexit.register(close)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state out of those of all data ranks, saved at the same step; it restores on any number of ranks that divides V.

    Raises:
        ValueError: the states were taken at different micro-batches or from different data, or a shard is missing.
    """
    merged = {**states[0], "cursors": {}}
    for state in states:
        for key, value in state.items():
            if key == "cursors":
                merged["cursors"].update(value)
            elif merged[key] != value:
                raise ValueError(f"the data ranks disagree about '{key}' ({merged[key]} and {value}): save all of them after the same step")
    missing = merged["shards"] - len(merged["cursors"])
    if missing:
        raise ValueError(f"{missing} of {merged['shards']} shards have no cursor: merge the states of all data ranks")
    merged["cursors"] = dict(sorted(merged["cursors"].items(), key=lambda item: int(item[0])))
    return merged
