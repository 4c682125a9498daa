"""Loss by position in the document: whether what stands far back still helps, and whether short contexts have suffered."""

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ltrain.data.order import Document
from ltrain.parallel.mesh import Mesh

if TYPE_CHECKING:
    from ltrain.data.tokenizer import Tokenizer
    from ltrain.parallel.inference import Inference

FIRST = 128  # tokens of the first bucket; the second is as long, and each later one twice as long as that before it
CHARACTERS = 16  # of text for a token: more than any tokenizer packs into one on average, so that only so much need be encoded


Documents = list[list[int]]  # token ids of each


class HoldsOut(Protocol):
    """What is needed of a corpus."""

    def held_out(self) -> Iterator[Document]:
        """The held-out documents once, always in the same order."""
        ...


class Bucket(NamedTuple):
    """Positions start .. stop - 1; position 0 is a document's first token, which predicts the second."""

    start: int
    stop: int
    tokens: int
    loss: float  # mean, nats per token; NaN without a token

    @property
    def name(self) -> str:
        return f"{self.start}-{self.stop - 1}"


def edges(length: int) -> list[int]:
    """0, 128, 256, 512, ... and length."""
    found, edge = [0], FIRST
    while edge < length:
        found.append(edge)
        edge *= 2
    return [*found, length]


def longest_documents(corpus: HoldsOut, tokenizer: "Tokenizer", length: int, count: int) -> Documents:
    """The `count` held-out documents of the most characters, the first `length` tokens of each, those of one token left out."""
    texts = ((len(d.text), -i, d.text) for i, d in enumerate(corpus.held_out()) if d.text)
    chosen = [_tokens(text, tokenizer, length) for _, _, text in heapq.nlargest(count, texts)]
    return [ids for ids in chosen if len(ids) > 1]


def _tokens(text: str, tokenizer: "Tokenizer", length: int) -> list[int]:
    ids = tokenizer.encode(text[: CHARACTERS * length])
    if len(ids) < length:
        ids = tokenizer.encode_document(text)
    return ids[:length]


def short_pieces(corpus: HoldsOut, tokenizer: "Tokenizer", length: int, tokens: int) -> Documents:
    """The first `tokens` tokens of the held-out documents, in pieces of at most `length` that are documents of their own."""
    pieces: Documents = []
    for ids in _encoded(corpus.held_out(), tokenizer):
        for start in range(0, len(ids), length):
            piece = ids[start : start + min(length, tokens)]
            if len(piece) > 1:
                pieces.append(piece)
            tokens -= len(piece)
            if tokens < 2:
                return pieces
    return pieces


def _encoded(documents: Iterator[Document], tokenizer: "Tokenizer") -> Iterator[list[int]]:
    for document in documents:
        if document.text is not None:
            yield tokenizer.encode_document(document.text)


def streams(documents: Documents, tokens: int) -> list[Documents]:
    """Documents in their order, as many together as `tokens` tokens hold, one at least."""
    found: list[Documents] = []
    room = 0
    for document in documents:
        if not found or len(document) > room:
            found.append([])
            room = tokens
        found[-1].append(document)
        room -= len(document)
    return found


def loss_by_position(inference: "Inference", mesh: Mesh, documents: Documents, length: int, stream_tokens: int) -> list[Bucket]:
    """Mean loss of the documents' tokens in each bucket up to `length`. Every rank calls, with the same documents.

    The data ranks share the streams; one that has fewer scores its last again and counts nothing, as experts may be common to all.
    """
    bounds = edges(length)
    packed = streams(documents, stream_tokens)
    sums = torch.zeros(2, len(bounds) - 1, dtype=torch.float64)  # loss, tokens
    rank, ranks = mesh.data.rank(), mesh.data.size()
    for start in range(0, len(packed), ranks):
        mine = start + rank
        scores = inference.score(packed[min(mine, len(packed) - 1)])
        if mine < len(packed):
            for loss in (s.loss for s in scores):
                place = torch.bucketize(torch.arange(len(loss)), torch.tensor(bounds[1:]), right=True)
                sums.index_add_(1, place, torch.stack((loss, torch.ones_like(loss))))
    total = mesh.sum(sums.to(mesh.device), mesh.data).cpu()
    return [
        Bucket(a, b, int(count), float(loss / count) if count else float("nan"))
        for a, b, loss, count in zip(bounds, bounds[1:], *total.tolist(), strict=False)
    ]


def mean(buckets: list[Bucket]) -> float:
    """Nats per token over all buckets; NaN without a token."""
    tokens = sum(b.tokens for b in buckets)
    return sum(b.loss * b.tokens for b in buckets if b.tokens) / tokens if tokens else float("nan")
