"""Several corpora in one stream, by shares of tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ltrain.data.order import Corpus, Cursor, Document, Reader
from ltrain.data.sources import digest


class Part(NamedTuple):
    name: str  # '' where it is the only one
    weight: float
    corpus: Corpus
    whole: bool = False  # its documents are never cut


class Mixture:
    """Parts whose shares of the packed tokens are their weights' shares of all weights.

    Attributes:
        fingerprint: of the training documents; that of its corpus where there is one part.
        weights: they add up to 1.
    """

    def __init__(self, parts: Sequence[Part]):
        total = sum(part.weight for part in parts)
        assert parts and total > 0, parts
        self.parts = tuple(parts)
        self.weights = tuple(part.weight / total for part in parts)
        self.fingerprint = (
            parts[0].corpus.fingerprint if len(parts) == 1 else digest("mixture", [[p.name, w, p.corpus.fingerprint] for p, w in self._weighted()])
        )

    @classmethod
    def of(cls, corpus: "Corpus | Mixture") -> "Mixture":
        return corpus if isinstance(corpus, Mixture) else cls([Part("", 1.0, corpus)])

    def _weighted(self) -> Iterator[tuple[Part, float]]:
        return zip(self.parts, self.weights, strict=True)

    def readers(self, shards: int, places: Mapping[int, Sequence[Cursor]]) -> list[Reader]:
        """One reader for each part, for the given shards out of `shards`, each from its cursors on."""
        return [part.corpus.reader(shards, {shard: cursors[n] for shard, cursors in places.items()}) for n, part in enumerate(self.parts)]

    def training(self) -> Iterator[Document]:
        """The training documents that are text, those of all parts by the weights' shares of characters."""
        return self._interleaved([part.corpus.training() for part in self.parts])

    def held_out(self) -> Iterator[Document]:
        """The held-out documents once, those of all parts by the weights' shares of characters."""
        return self._interleaved([part.corpus.held_out() for part in self.parts])

    def _interleaved(self, parts: Iterable[Iterator[Document]]) -> Iterator[Document]:
        """The next one from whichever part has the least of its share; parts that end leave the others to go on."""
        left = dict(enumerate(parts))
        taken = dict.fromkeys(left, 0)
        while left:
            n = min(left, key=lambda i: (taken[i] / self.weights[i], i))
            document = next(left[n], None)
            if document is None:
                del left[n]
                continue
            taken[n] += len(document.text or ()) + 1
            yield document
