"""Which documents train, which are held out, and in which order each virtual shard reads its own.

Both corpora give a shard the document at (epoch, index in the shard). The order is a pure function of (seed, epoch), so a
cursor says everything about where a shard stands.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ltrain.data.cache import TokenCache
from ltrain.data.sources import Documents, HubStream, digest
from ltrain.data.tokenizer import Tokenizer, token_cache

_MASK64 = (1 << 64) - 1


class Cursor(NamedTuple):
    """Where a shard's next stream begins."""

    epoch: int = 0
    document: int = 0  # index among the shard's documents of this epoch
    offset: int = 0  # tokens of that document already packed
    packed: int = 0  # tokens packed since the first document


@dataclass(frozen=True)
class Document:
    name: str
    text: str | None  # None: left out, unless there are ids
    ids: NDArray[np.integer] | None = None  # where it is tokenised already, end-of-document token included
    keep: Callable[[NDArray[np.int32]], NDArray[np.integer]] | None = None  # takes the ids of a document that is to be cached, and gives them back


class Reader(Protocol):
    """Reads documents for some shards; each shard moves forward only."""

    def __call__(self, shard: int, epoch: int, index: int) -> Document | None:
        """Document `index` of the shard in this epoch, or None past its last."""
        ...


class Permutation:
    """A seeded permutation of range(size) that takes no memory: a six-round Feistel network with cycle walking.

    Black & Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). Integers only, so it is the same on every machine.
    """

    def __init__(self, size: int, *key: int | str):
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of each half
        digests = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
        self.keys = [int.from_bytes(digests[8 * i : 8 * i + 8], "little") for i in range(6)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        half, mask = self.half, (1 << self.half) - 1
        while True:
            left, right = index >> half, index & mask
            for key in self.keys:
                left, right = right, left ^ (mix(right ^ key) & mask)
            index = left << half | right
            if index < self.size:  # else walk the cycle until back inside
                return index


def mix(x: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Corpus(Protocol):
    """Documents split into training and held-out ones."""

    fingerprint: str  # of the training documents

    def reader(self, shards: int, cursors: Mapping[int, Cursor]) -> Reader:
        """For the given shards out of `shards`, each from its cursor on."""
        ...

    def training(self) -> Iterator[Document]:
        """The training documents once, in an order that depends on nothing but the corpus."""
        ...

    def held_out(self, encoded: bool = False) -> Iterator[Document]:
        """The held-out documents once, always in the same order; `encoded`: those in the cache as ids, without their text."""
        ...

    def attach(self, tokenizer: Tokenizer, cache: str) -> None:
        """Tell the tokenizer that encodes the documents, and the folder where their ids are kept ('': they are not)."""
        ...


class Split(NamedTuple):
    """Indices of documents: the first `n_held_out` are held out, the others train."""

    order: "Permutation | NDArray[np.int64]"
    n_held_out: int
    n_training: int


def split(documents: Documents, held_out: float, sizes: tuple[int, int] | None = None) -> Split:
    """A share of the documents held out, at least one of them, always the same; of both parts only those of `sizes` (least and most bytes).

    Packages are held out by their names: what one run held out, another with more packages or other sizes does not train on.
    """
    _check_share(held_out)
    size = len(documents)
    permutation = Permutation(size, "split")
    n_held_out = min(max(1, round(size * held_out)), size) if held_out else 0
    by_name = getattr(documents, "by_name", False)
    if sizes is None and not by_name:
        return Split(permutation, n_held_out, size - n_held_out)
    if by_name:
        # by the most significant bits: a share of all possible digests, so nearly one of the documents
        rank = {i: int(digest("split", documents.name(i))[:13], 16) / 16**13 for i in range(size)}
        order = sorted(rank, key=lambda i: rank[i])
        n_held_out = max(min(1, n_held_out), sum(rank[i] < held_out for i in order))
    else:
        order = [permutation[i] for i in range(size)]
    parts = order[:n_held_out], order[n_held_out:]
    if sizes is not None:
        least, most = sizes
        fit = np.asarray([least <= n <= most for n in documents.sizes()])
        parts = [i for i in parts[0] if fit[i]], [i for i in parts[1] if fit[i]]
    return Split(np.array([*parts[0], *parts[1]], dtype=np.int64), len(parts[0]), len(parts[1]))


class RandomAccessCorpus:
    """A share of the documents is held out; the others are reshuffled in every epoch by (seed, epoch).

    Which documents are held out does not depend on the seed: runs of different seeds are evaluated on the same text.

    Args:
        sizes: least and most bytes of a document; None: all.
        shared: where there are fewer documents than shards, each shard reads all of them, in its own order, instead of a refusal.

    Attributes:
        cache: token ids of the documents, once the tokenizer is known.
    """

    def __init__(self, documents: Documents, held_out: float, seed: int, shards: int, sizes: tuple[int, int] | None = None, shared: bool = False):
        self.documents, self.seed, self.size = documents, seed, len(documents)
        self.split, self.n_held_out, self.n_training = split(documents, held_out, sizes)
        self.cache: TokenCache | None = None
        self.shared = shared and 0 < self.n_training < shards
        if sizes is not None and not self.n_training:
            raise ValueError(f"none of the {self.size} documents to train on is as long as min_tokens and max_tokens ask: widen them")
        if self.n_training < shards and not self.shared:
            raise ValueError(
                f"data.shards={shards} needs as many training documents and there are {self.n_training} ({self.n_held_out} of "
                f"{self.size} are held out): " + (f"write data.shards={self.n_training} or less" if self.n_training else "add documents")
            )
        self.fingerprint = digest(documents.fingerprint, self.n_held_out, *([self.n_training] if sizes is not None else []))

    def attach(self, tokenizer: Tokenizer, cache: str) -> None:
        self.cache = token_cache(cache, self.documents, tokenizer)

    def document(self, index: int, encoded: bool = False) -> Document:
        name = self.documents.name(index)
        if self.cache is None or not encoded:
            return Document(name, self.documents.text(index))
        ids = self.cache.get(index)
        return Document(name, self.documents.text(index) if ids is None else None, ids, partial(self.cache.put, index))

    def reader(self, shards: int, cursors: Mapping[int, Cursor]) -> Reader:
        orders: dict[tuple[int, ...], Permutation] = {}

        def read(shard: int, epoch: int, index: int) -> Document | None:
            position, key = (index, (epoch, shard)) if self.shared else (shard + index * shards, (epoch,))
            if position >= self.n_training:
                return None
            if key not in orders:
                orders[key] = Permutation(self.n_training, "train", self.seed, *key)
            return self.document(int(self.split[self.n_held_out + orders[key][position]]), encoded=True)

        return read

    def training(self) -> Iterator[Document]:
        return (self.document(int(self.split[self.n_held_out + i])) for i in range(self.n_training))

    def held_out(self, encoded: bool = False) -> Iterator[Document]:
        return (self.document(int(self.split[i]), encoded) for i in range(self.n_held_out))


class StreamedCorpus:
    """A stream in its own order, the same in every epoch: every n-th document is held out, shard s takes every V-th of the others."""

    def __init__(self, stream: HubStream, held_out: float):
        _check_share(held_out)
        if held_out > 0.5:
            raise ValueError(f"data.held_out={held_out:g} leaves a stream nothing to train on: write 0.5 or less for data.source=hub")
        self.stream = stream
        self.every = round(1 / held_out) if held_out else 0  # 0: none is held out
        self.fingerprint = digest(stream.fingerprint, self.every)

    def attach(self, tokenizer: Tokenizer, cache: str) -> None:
        pass  # what comes from the hub is not kept

    def _documents(self, skip: int = 0) -> Iterator[tuple[int, Document]]:
        for number, (name, text) in enumerate(self.stream.open(skip), skip):
            yield number, Document(name, text)

    def _is_held_out(self, number: int) -> bool:
        return self.every > 0 and number % self.every == 0

    def _training_number(self, index: int) -> int:
        """Where training document `index` lies in the stream."""
        return index + index // (self.every - 1) + 1 if self.every else index

    def reader(self, shards: int, cursors: Mapping[int, Cursor]) -> Reader:
        first = min((c.epoch, c.document * shards + s) for s, c in cursors.items())
        return _StreamReader(self._training_from, shards, list(cursors), *first)

    def _training_from(self, index: int) -> Iterator[tuple[int, Document]]:
        """(training index, document) from training document `index` on."""
        for number, document in self._documents(self._training_number(index)):
            if not self._is_held_out(number):
                yield index, document
                index += 1

    def training(self) -> Iterator[Document]:
        return (document for _, document in self._training_from(0))

    def held_out(self, encoded: bool = False) -> Iterator[Document]:
        if not self.every:
            return iter(())
        return (document for number, document in self._documents() if self._is_held_out(number))


class _StreamReader:
    """Reads a stream once for all shards of a process; documents that another of its shards will need wait in that shard's queue."""

    def __init__(self, open_at: Callable[[int], Iterator[tuple[int, Document]]], shards: int, mine: Iterable[int], epoch: int, index: int):
        self.open_at, self.shards, self.epoch = open_at, shards, epoch
        self.stream = open_at(index)
        self.waiting: dict[int, deque[tuple[int, int, Document | None]]] = {shard: deque() for shard in mine}

    def __call__(self, shard: int, epoch: int, index: int) -> Document | None:
        queue = self.waiting[shard]
        while True:
            while queue:
                at_epoch, at_index, document = queue[0]
                if document is None and at_epoch == epoch:  # the shard's documents of this epoch end here
                    return None
                queue.popleft()
                if (at_epoch, at_index) == (epoch, index):
                    return document
            self._advance()

    def _advance(self) -> None:
        item = next(self.stream, None)
        if item is None:
            for queue in self.waiting.values():
                queue.append((self.epoch, -1, None))
            self.epoch, self.stream = self.epoch + 1, self.open_at(0)
            return
        position, document = item
        shard, index = position % self.shards, position // self.shards
        if shard in self.waiting:
            self.waiting[shard].append((self.epoch, index, document))


def _check_share(held_out: float) -> None:
    if not 0 <= held_out < 1:
        raise ValueError(f"data.held_out={held_out:g} is not a share of the documents: write a number from 0 to below 1")
