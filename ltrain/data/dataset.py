"""A run's data: its documents, its tokenizer, a loader per data rank and the held-out micro-batches."""

from typing import TYPE_CHECKING, Any

from ltrain.config import DataConfig
from ltrain.data.order import Corpus, RandomAccessCorpus, StreamedCorpus
from ltrain.data.packing import MicroBatch
from ltrain.data.sources import HubStream, open_source
from ltrain.data.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from ltrain.data.loader import Loader


class Dataset:
    """What `build` gives.

    Attributes:
        tokenizer: the run's tokenizer.
        fingerprint: equal for equal training documents.
    """

    def __init__(self, config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, seed: int):
        self.config, self.corpus, self.tokenizer, self.seed = config, corpus, tokenizer, seed
        self.fingerprint = corpus.fingerprint
        self._held_out: tuple[int, list[MicroBatch]] | None = None  # of the last size asked for

    def loader(self, rank: int = 0, ranks: int = 1, state: dict[str, Any] | None = None) -> "Loader":
        """Micro-batches rank, rank + ranks, ... without end; close it after use.

        Args:
            rank, ranks: the data rank and the number of data ranks, which must divide data.shards.
            state: from `merge_states`, saved with any number of ranks; None: from the beginning.

        Raises:
            ValueError: see `Loader`.
        """
        from ltrain.data.loader import Loader  # torch, which opening a data set does not need

        c = self.config
        return Loader(
            self.corpus, self.tokenizer, tokens=c.tokens, shards=c.shards, workers=c.workers, rank=rank, ranks=ranks, seed=self.seed, state=state
        )

    def held_out(self, n_tokens: int, rank: int = 0, ranks: int = 1) -> list[MicroBatch]:
        """Held-out micro-batches of this data rank: n_tokens in all, rounded down to whole micro-batches, fewer where the documents end.

        Together the ranks get the same micro-batches for any `ranks`, and each gets equally many: a rank that would be one
        short gets one without labels.

        Raises:
            ValueError: nothing is held out, or too little for one micro-batch.
        """
        from ltrain.data.held_out import held_out_batches, rank_share

        if self.config.held_out == 0:
            raise ValueError("data.held_out=0 keeps no documents for evaluation: write a share such as 0.1")
        if self._held_out is None or self._held_out[0] != n_tokens:
            self._held_out = n_tokens, held_out_batches(self.corpus, self.tokenizer, tokens=self.config.tokens, n_tokens=n_tokens)
        return rank_share(self._held_out[1], rank, ranks)


def build(config: DataConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open the documents and the tokenizer that `config` names.

    Args:
        seed: of the training order.
        tokenizer: a checkpoint's, to go on with; None: the configured one, trained now where it is not cached.

    Raises:
        ValueError: one sentence about what in `config` cannot be used.
    """
    source = open_source(config)
    corpus: Corpus
    if isinstance(source, HubStream):
        corpus = StreamedCorpus(source, config.held_out)
    else:
        corpus = RandomAccessCorpus(source, config.held_out, seed, config.shards)
    if tokenizer is None:
        # Lazily: read only where a tokenizer has to be trained.
        texts = (document.text for document in corpus.training() if document.text is not None)
        tokenizer = build_tokenizer(config.tokenizer, texts, corpus.fingerprint)
    return Dataset(config, corpus, tokenizer, seed)
