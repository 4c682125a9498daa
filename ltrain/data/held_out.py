"""Evaluation on held-out documents: the same micro-batches for every layout and every seed."""

import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ltrain.data.mixture import Mixture
from ltrain.data.order import Document
from ltrain.data.packing import NO_LABEL, MicroBatch, Packer
from ltrain.data.tokenizer import Tokenizer


def held_out_batches(mixture: Mixture, tokenizer: Tokenizer, *, tokens: int, n_tokens: int, sequence_length: int = 0) -> list[MicroBatch]:
    """The first n_tokens // tokens micro-batches of the held-out documents; fewer where the documents end before.

    Of several sources, all that hold documents out take part with their weights, until each has ended.

    Raises:
        ValueError: nothing is held out, or not even one micro-batch comes together.
    """
    if n_tokens < tokens:
        raise ValueError(f"eval.tokens={n_tokens} is less than one micro-batch: write at least data.tokens={tokens}")
    parts = [(weight, part.corpus.held_out(encoded=True)) for part, weight in zip(mixture.parts, mixture.weights, strict=True) if not part.whole]

    def reader(documents: Iterator[Document]) -> Callable[[int, int], Document | None]:
        return lambda epoch, index: next(documents, None)

    total = sum(weight for weight, _ in parts)
    packer = Packer(
        [reader(documents) for _, documents in parts],
        tokenizer,
        tokens,
        shares=[weight / total for weight, _ in parts],
        whole=[False] * len(parts),
        sequence_length=sequence_length,
        epochs=1,
    )
    batches: list[MicroBatch] = []
    while len(batches) < n_tokens // tokens and (stream := packer.next()) is not None:
        batches.append(MicroBatch.of(stream, len(batches)))
    if not batches:
        raise ValueError(f"the held-out documents hold less than one micro-batch of data.tokens={tokens}: raise data.held_out or lower data.tokens")
    return batches


def rank_share(batches: list[MicroBatch], rank: int, ranks: int) -> list[MicroBatch]:
    """Micro-batches rank, rank + ranks, ...

    Every rank gets equally many, since their forwards may meet in collectives: one short of a batch gets the last one again, without labels.
    """
    share = batches[rank::ranks]
    if len(share) < -(-len(batches) // ranks):
        filler = copy.copy(batches[-1])
        filler.labels = filler.labels.new_full(filler.labels.shape, NO_LABEL)
        share.append(filler)
    return share


def unigram_entropy(batches: Iterable[MicroBatch]) -> float:
    """Entropy in nats per token of the empirical distribution of the labels: what a model reaches that knows only their frequencies.

    Raises:
        ValueError: no token has a label.
    """
    labels = np.concatenate([batch.labels.numpy()[batch.labels.numpy() >= 0] for batch in batches])
    if not len(labels):
        raise ValueError("unigram_entropy: no token has a label: give micro-batches with labels")
    p = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(p * np.log(p)).sum())
