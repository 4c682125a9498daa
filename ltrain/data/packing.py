"""Documents of one virtual shard, packed into streams of exactly `tokens` tokens.

A document that crosses the end of a stream is cut; its rest opens the shard's next stream as a document of its own whose positions continue.
With a sequence length, documents are cut into pieces of it, each a document of its own from position 0. Nothing is padded and nothing is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ltrain.data.order import Cursor, Document, mix
from ltrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

NO_LABEL = -100


@dataclass
class Stream:
    """One packed stream as a worker process sends it: what cannot be derived, and nothing else."""

    tokens: NDArray[np.int32]  # [T]
    cu_seqlens: NDArray[np.int32]  # [segments + 1]
    starts: NDArray[np.int64]  # [segments] position of each segment's first token in its document
    documents: list[str]
    shard: int
    cursors: tuple[Cursor, ...]  # of each source, after this stream


@dataclass
class MicroBatch:
    """One packed stream, on the host. T = data.tokens; a segment is a document or the part of one that is in this stream."""

    tokens: "torch.Tensor"  # [T] int64
    labels: "torch.Tensor"  # [T] int64: the next token of the segment; -100 for a segment's last token
    positions: "torch.Tensor"  # [T] int64: position in the document; a cut document's rest continues, without data.sequence_length
    cu_seqlens: "torch.Tensor"  # [segments + 1] int32: where each segment begins, and T
    documents: list[str]  # name of each segment's document
    index: int  # among all micro-batches of the run (of the evaluation), from 0
    cursors: tuple[Cursor, ...]  # of its shard's sources, after it

    @classmethod
    def of(cls, stream: Stream, index: int) -> "MicroBatch":
        import torch

        cu_seqlens, tokens = stream.cu_seqlens, stream.tokens.astype(np.int64)
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        labels[cu_seqlens[1:] - 1] = NO_LABEL
        positions = np.arange(len(tokens)) + np.repeat(stream.starts - cu_seqlens[:-1], np.diff(cu_seqlens))
        return cls(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            documents=stream.documents,
            index=index,
            cursors=stream.cursors,
        )


class Packer:
    """Packs one shard, from its cursors on.

    With several sources, each next piece comes from the one that is furthest behind its share of the tokens packed so far. The stream is a
    function of the shard and the cursors alone.

    Args:
        reads: of each source, its document at (epoch, index in the shard), None past the last.
        tokenizer: encodes each document when it is first needed.
        tokens: length of a stream.
        shares: of the tokens, for each source; they add up to 1.
        whole: for each source, whether its documents are never cut. One that does not fit into what is left of a stream waits for the next, and
            another source, of which there has to be one, fills the stream.
        sequence_length: longest piece of a document; each piece, and what the end of a stream cuts off, begins at position 0. 0: documents are
            cut by the ends of streams only, and the rest goes on with its positions.
        shard: the shard's number, for the streams, for messages, and for which source begins.
        cursors: where to begin, one for each source; a document cut there is encoded again.
        epochs: each source stops after so many; None: never.
        notice: called with a document's name before it is encoded.
    """

    def __init__(
        self,
        reads: Sequence[Callable[[int, int], Document | None]],
        tokenizer: Tokenizer,
        tokens: int,
        *,
        shares: Sequence[float] = (1.0,),
        whole: Sequence[bool] = (False,),
        sequence_length: int = 0,
        shard: int = 0,
        cursors: Sequence[Cursor] | None = None,
        epochs: int | None = None,
        notice: Callable[[str], None] = lambda name: None,
    ):
        if tokens < 2:
            raise ValueError(f"data.tokens={tokens} is too short for a stream: write at least 2")
        assert len(reads) == len(shares) == len(whole) and not all(whole)
        longest = min(sequence_length or tokens, tokens)
        self.tokenizer, self.tokens, self.shard = tokenizer, tokens, shard
        # Shards begin with different sources, so that their shares of what all have packed are right from the start.
        ahead = [(mix(mix(shard) + n) / 2**64 - 0.5) * longest for n in range(len(reads))]
        self.sources = [
            Source(read, tokenizer, share, ahead[n], whole[n], longest if sequence_length else 0, shard, epochs, notice)
            for n, (read, share) in enumerate(zip(reads, shares, strict=True))
        ]
        for source, cursor in zip(self.sources, cursors or [Cursor()] * len(reads), strict=True):
            source.cursor = cursor

    def next(self) -> Stream | None:
        """The next stream, or None when the last epochs end before it is full."""
        parts: list[NDArray[np.int32]] = []
        starts, documents = [], []
        room = self.tokens
        while room:
            source = self._choose(room)
            if source is None:
                return None
            name, start, part = source.take(room)
            parts.append(part)
            starts.append(start)
            documents.append(name)
            room -= len(part)
        lengths = [len(part) for part in parts]
        return Stream(
            tokens=np.concatenate(parts),
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            starts=np.array(starts, dtype=np.int64),
            documents=documents,
            shard=self.shard,
            cursors=tuple(source.cursor for source in self.sources),
        )

    def _choose(self, room: int) -> "Source | None":
        """The source of the next piece; None where all have ended."""
        # What the end of a stream cut goes on before any other text, but not before a whole document that is due: it would never find a stream empty.
        cut = next((s for s in self.sources if s.cursor.offset and not s.longest and not s.ended()), None)
        total = sum(source.cursor.packed for source in self.sources)
        for source in sorted(self.sources, key=lambda s: s.cursor.packed - s.share * total - s.ahead):
            if not source.ended() and source.fits(room):
                return cut if cut is not None and not source.whole else source
        return None


class Source:
    """One source of a shard: its cursor and the document under it."""

    def __init__(
        self,
        read: Callable[[int, int], Document | None],
        tokenizer: Tokenizer,
        share: float,
        ahead: float,
        whole: bool,
        longest: int,
        shard: int,
        epochs: int | None,
        notice: Callable[[str], None],
    ):
        self.read, self.tokenizer, self.share, self.ahead, self.whole, self.longest = read, tokenizer, share, ahead, whole, longest
        self.shard, self.epochs, self.notice = shard, epochs, notice
        self.cursor = Cursor()
        self.current: tuple[str, NDArray[np.integer]] | None = None

    def ended(self) -> bool:
        if self.current is None:
            self.current = self._open()
        return self.current is None

    def fits(self, room: int) -> bool:
        assert self.current is not None  # it has not ended
        return not self.whole or len(self.current[1]) <= room

    def take(self, room: int) -> tuple[str, int, NDArray[np.int32]]:
        """A piece of at most `room` tokens: the document's name, the position of the first token and the ids."""
        assert self.current is not None  # it was chosen
        name, ids = self.current
        epoch, index, offset, packed = self.cursor
        limit = min(room, self.longest) if self.longest else room
        part = np.asarray(ids[offset : offset + limit], dtype=np.int32)
        start = 0 if self.longest else offset
        offset += len(part)
        self.cursor = Cursor(epoch, index, offset, packed + len(part))
        if offset == len(ids):
            self.cursor, self.current = Cursor(epoch, index + 1, 0, packed + len(part)), None
        return name, start, part

    def _open(self) -> tuple[str, NDArray[np.integer]] | None:
        """The document under the cursor, encoded; moves over documents that are left out and to the next epoch."""
        epoch_ends = 0
        while True:
            epoch, index, _, packed = self.cursor
            if self.epochs is not None and epoch >= self.epochs:
                return None
            document = self.read(epoch, index)
            if document is None:
                epoch_ends += 1
                if epoch_ends == 2:
                    raise ValueError(f"data: shard {self.shard} has no document in a whole epoch: lower data.shards or add documents")
                self.cursor = Cursor(epoch + 1, 0, 0, packed)
            elif document.text is None and document.ids is None:
                self.cursor = Cursor(epoch, index + 1, 0, packed)
            else:
                return document.name, self._ids(document)

    def _ids(self, document: Document) -> NDArray[np.integer]:
        ids = document.ids
        if ids is None:
            assert document.text is not None
            ids = self._encode(document.name, document.text)
            if document.keep is not None:
                ids = document.keep(ids)
        if self.cursor.offset >= len(ids):
            had = self.cursor.offset
            raise ValueError(f"data: {document.name} has {len(ids)} tokens and the run had read {had} of it: restore it, or start a new run")
        return ids

    def _encode(self, name: str, text: str) -> NDArray[np.int32]:
        self.notice(name)
        try:
            return self.tokenizer.document_ids(text)
        except Exception as error:
            raise ValueError(f"data: {name} cannot be tokenised: {error}") from error
