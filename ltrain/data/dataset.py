"""A run's data: its documents, its tokenizer, a loader per data rank and the held-out micro-batches."""

from typing import TYPE_CHECKING, Any

from ltrain.config import DataConfig, MixtureConfig, SourceConfig
from ltrain.data.mixture import Mixture, Part
from ltrain.data.order import Corpus, RandomAccessCorpus, StreamedCorpus
from ltrain.data.packing import MicroBatch
from ltrain.data.sources import HubStream, open_source
from ltrain.data.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from ltrain.data.loader import Loader

BYTES_PER_TOKEN = 3.5  # of Python source and English in a vocabulary of 4096 (3.57 for the standard library), by which min_tokens is estimated


class Dataset:
    """What `build` gives.

    Attributes:
        tokenizer: the run's tokenizer.
        corpus: all sources.
        fingerprint: equal for equal training documents.
    """

    def __init__(self, config: DataConfig, corpus: Mixture, tokenizer: Tokenizer, seed: int):
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
            self.corpus,
            self.tokenizer,
            tokens=c.tokens,
            sequence_length=c.sequence_length,
            shards=c.shards,
            workers=c.workers,
            rank=rank,
            ranks=ranks,
            seed=self.seed,
            state=state,
        )

    def held_out(self, n_tokens: int, rank: int = 0, ranks: int = 1) -> list[MicroBatch]:
        """Held-out micro-batches of this data rank: n_tokens in all, rounded down to whole micro-batches, fewer where the documents end.

        Of a mixture, all sources but synthetic ones take part with their weights.

        Together the ranks get the same micro-batches for any `ranks`, and each gets equally many: a rank that would be one
        short gets one without labels.

        Raises:
            ValueError: nothing is held out, or too little for one micro-batch.
        """
        from ltrain.data.held_out import held_out_batches, rank_share

        if self.config.held_out == 0:
            raise ValueError("data.held_out=0 keeps no documents for evaluation: write a share such as 0.1")
        if self._held_out is None or self._held_out[0] != n_tokens:
            c = self.config
            batches = held_out_batches(self.corpus, self.tokenizer, tokens=c.tokens, n_tokens=n_tokens, sequence_length=c.sequence_length)
            self._held_out = n_tokens, batches
        return rank_share(self._held_out[1], rank, ranks)


def build(config: DataConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open the documents and the tokenizer that `config` names.

    Args:
        seed: of the training order.
        tokenizer: a checkpoint's, to go on with; None: the configured one, trained now where it is not cached.

    Raises:
        ValueError: one sentence about what in `config` cannot be used.
    """
    sources: dict[str, SourceConfig] = {**config.mixture} or {"": config}
    mixture = Mixture([_part(name, source, config, seed) for name, source in sources.items()])
    if tokenizer is None:
        text = Mixture([part for part in mixture.parts if not part.whole])
        # Lazily: read only where a tokenizer has to be trained.
        texts = (document.text for document in text.training() if document.text is not None)
        tokenizer = build_tokenizer(config.tokenizer, texts, text.fingerprint)
    for part in mixture.parts:
        part.corpus.attach(tokenizer, config.tokenizer.cache if config.cache_tokens else "")
    return Dataset(config, mixture, tokenizer, seed)


def _part(name: str, config: SourceConfig, data: DataConfig, seed: int) -> Part:
    if isinstance(config, MixtureConfig):
        if config.source == "synthetic":
            from ltrain.data.synthetic.corpus import SyntheticCorpus

            return Part(name, config.weight, SyntheticCorpus(config.synthetic, data, seed), whole=True)
        try:
            return Part(name, config.weight, _corpus(config, data, seed, shared=True))
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from error
    return Part(name, 1.0, _corpus(config, data, seed, shared=False))


def _corpus(config: SourceConfig, data: DataConfig, seed: int, shared: bool) -> Corpus:
    source = open_source(config)
    if isinstance(source, HubStream):
        return StreamedCorpus(source, data.held_out)
    each = 1 if data.tokenizer.kind == "bytes" else BYTES_PER_TOKEN
    most = round(config.max_tokens * each) if config.max_tokens else 1 << 62
    sizes = (round(config.min_tokens * each), most) if config.min_tokens or config.max_tokens else None
    return RandomAccessCorpus(source, data.held_out, seed, data.shards, sizes, shared)
