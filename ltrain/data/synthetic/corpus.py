"""Recall tasks as a source of documents without end, each a function of (seed, shard, epoch, index) alone."""

import math
import random
from collections.abc import Iterator, Mapping

import numpy as np

from ltrain.config import DataConfig, SourceConfig, SyntheticConfig
from ltrain.data.order import Cursor, Document, Reader
from ltrain.data.sources import digest, open_source
from ltrain.data.synthetic import copying
from ltrain.data.synthetic.haystack import Haystack, open_haystack
from ltrain.data.synthetic.recall import document
from ltrain.data.tokenizer import Tokenizer

RECIPE = 6  # counted up when other documents come out of the same numbers
WHOLE = 0.5  # share of the documents of the full length: in shorter ones the longest distances do not occur
PER_EPOCH = 1 << 20  # documents of a shard, by which an epoch is only counted


class SyntheticCorpus:
    """Documents of the training templates, formats and depths; none is held out, since evaluation makes its own.

    The text around them is the training part of the haystack, and so no text that `data.held_out` keeps back.
    """

    def __init__(self, config: SyntheticConfig, data: DataConfig, seed: int):
        self.config, self.seed = config, seed
        self.length = config.length or data.sequence_length or data.tokens
        self.held_out_share = data.held_out
        self.haystack: Haystack | None = None
        source = "filler" if config.haystack == "filler" else open_source(SourceConfig(source=config.haystack)).fingerprint
        options = [sorted(config.tasks), config.needles_per_1k, config.max_needles]
        self.fingerprint = digest("synthetic", RECIPE, source, data.held_out, config.min_length, self.length, *options)

    def attach(self, tokenizer: Tokenizer, cache: str) -> None:
        self.haystack = open_haystack(self.config.haystack, tokenizer, "train", self.held_out_share, cache)

    def reader(self, shards: int, cursors: Mapping[int, Cursor]) -> Reader:
        def read(shard: int, epoch: int, index: int) -> Document | None:
            return self.document(shard, epoch, index) if index < PER_EPOCH else None

        return read

    def document(self, shard: int, epoch: int, index: int) -> Document:
        config = self.config
        haystack = self.haystack
        assert haystack is not None  # the tokenizer was told
        rng = random.Random(digest("synthetic", self.seed, shard, epoch, index))
        # of the others as many in each doubling of the length
        least = config.min_length or self.length
        tokens = self.length if rng.random() < WHOLE else round(math.exp(rng.uniform(math.log(least), math.log(self.length))))
        task = rng.choice(sorted(config.tasks))
        if task == "copy":
            ids = copying.document(tokens, rng, haystack)
        else:
            ids = document(task, tokens, rng, haystack.tokenizer, haystack, per_1k=config.needles_per_1k, most=config.max_needles)
        ended = np.append(ids, np.int32(haystack.tokenizer.eos))
        return Document(f"{task} of {tokens} tokens ({shard}, {epoch}, {index})", None, ended)

    def training(self) -> Iterator[Document]:
        return iter(())  # no text that a tokenizer should be trained on

    def held_out(self, encoded: bool = False) -> Iterator[Document]:
        return iter(())
