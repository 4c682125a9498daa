"""Documents of one virtual shard, packed into streams of exactly `tokens` tokens.

A document that crosses the end of a stream is cut; its rest opens the shard's next stream as a document of its own whose
positions continue. Nothing is padded and nothing is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ltrain.data.order import Cursor, Document
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
    cursor: Cursor  # after this stream


@dataclass
class MicroBatch:
    """One packed stream, on the host. T = data.tokens; a segment is a document or the part of one that is in this stream."""

    tokens: "torch.Tensor"  # [T] int64
    labels: "torch.Tensor"  # [T] int64: the next token of the segment; -100 for a segment's last token
    positions: "torch.Tensor"  # [T] int64: position in the document; a cut document's rest continues
    cu_seqlens: "torch.Tensor"  # [segments + 1] int32: where each segment begins, and T
    documents: list[str]  # name of each segment's document
    index: int  # among all micro-batches of the run (of the evaluation), from 0
    cursor: Cursor  # of its shard, after it

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
            cursor=stream.cursor,
        )


class Packer:
    """Packs one shard, from a cursor on.

    Args:
        read: document at (epoch, index in the shard), None past the last.
        tokenizer: encodes each document when it is first needed.
        tokens: length of a stream.
        shard: the shard's number, for the streams and for messages.
        cursor: where to begin; a document cut there is encoded again.
        epochs: stop after so many; None: never.
        notice: called with a document's name before it is encoded.
    """

    def __init__(
        self,
        read: Callable[[int, int], Document | None],
        tokenizer: Tokenizer,
        tokens: int,
        *,
        shard: int = 0,
        cursor: Cursor = Cursor(),  # noqa: B008 (immutable)
        epochs: int | None = None,
        notice: Callable[[str], None] = lambda name: None,
    ):
        if tokens < 2:
            raise ValueError(f"data.tokens={tokens} is too short for a stream: write at least 2")
        self.read, self.tokenizer, self.tokens, self.shard, self.epochs, self.notice = read, tokenizer, tokens, shard, epochs, notice
        self.epoch, self.index, self.offset = cursor
        self.current: tuple[str, NDArray[np.int32]] | None = None  # name and ids of the document under the cursor

    def next(self) -> Stream | None:
        """The next stream, or None when the last epoch ends before it is full."""
        parts: list[NDArray[np.int32]] = []
        starts, documents = [], []
        room = self.tokens
        while room:
            document = self.current or self._open()
            if document is None:
                return None
            self.current, (name, ids) = document, document
            part = ids[self.offset : self.offset + room]
            parts.append(part)
            starts.append(self.offset)
            documents.append(name)
            room -= len(part)
            self.offset += len(part)
            if self.offset == len(ids):
                self.index, self.offset, self.current = self.index + 1, 0, None
        lengths = [len(part) for part in parts]
        return Stream(
            tokens=np.concatenate(parts),
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            starts=np.array(starts, dtype=np.int64),
            documents=documents,
            shard=self.shard,
            cursor=Cursor(self.epoch, self.index, self.offset),
        )

    def _open(self) -> tuple[str, NDArray[np.int32]] | None:
        """The document under the cursor, encoded; moves over documents that are left out and to the next epoch."""
        epoch_ends = 0
        while True:
            if self.epochs is not None and self.epoch >= self.epochs:
                return None
            document = self.read(self.epoch, self.index)
            if document is None:
                epoch_ends += 1
                if epoch_ends == 2:
                    raise ValueError(f"data: shard {self.shard} has no document in a whole epoch: lower data.shards or add documents")
                self.epoch, self.index, self.offset = self.epoch + 1, 0, 0
            elif document.text is None:
                self.index, self.offset = self.index + 1, 0
            else:
                return document.name, self._encode(document.name, document.text)

    def _encode(self, name: str, text: str) -> NDArray[np.int32]:
        self.notice(name)
        try:
            ids = np.array(self.tokenizer.encode_document(text), dtype=np.int32)
        except Exception as error:
            raise ValueError(f"data: {name} cannot be tokenised: {error}") from error
        if self.offset >= len(ids):
            raise ValueError(f"data: {name} has {len(ids)} tokens and the run had read {self.offset} of it: restore it, or start a new run")
        return ids
