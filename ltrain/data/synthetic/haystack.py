"""Real text, already tokenised, in which needles are hidden: any number of its tokens, and the places where a line may be put between two others."""

import random
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltrain.config import SourceConfig
from ltrain.data.order import split as split_documents
from ltrain.data.sources import HubStream, open_source
from ltrain.data.tokenizer import Tokenizer, token_cache

Ids = NDArray[np.int32]
HAYSTACKS = ("stdlib", "packages", "filler")
KEPT = 256  # documents whose ids stay in memory
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"  # of the passkey paper, Mohtashami & Jaggi 2023
)


class Cuts(NamedTuple):
    """Places for a line in a run of tokens, in order. A line goes before token `at`; its newline comes first where `opens`, else last."""

    at: NDArray[np.int64]
    opens: NDArray[np.bool_]


class _Edges(NamedTuple):
    """Of each id of the vocabulary, what its text begins and ends with."""

    newline_first: NDArray[np.bool_]
    blank_last: NDArray[np.bool_]
    newline_last: NDArray[np.bool_]
    one_newline_last: NDArray[np.bool_]  # and no blank before it in the same id
    newline: NDArray[np.bool_]  # it is one newline


class Haystack:
    """Documents that follow each other without end, from any one of them on.

    Args:
        tokenizer: of all ids.
        document: ids of document `index` without an end-of-document token; empty where it is left out.
        size: how many documents there are.
        fingerprint: equal for equal documents.
        cached: whether `document` keeps the ids on disk.

    Raises:
        ValueError: the tokenizer does not encode a text piece by piece.
    """

    def __init__(self, tokenizer: Tokenizer, document: Callable[[int], Ids], size: int, fingerprint: str, cached: bool = False):
        self.tokenizer, self.size, self.fingerprint, self.cached, self._document = tokenizer, size, fingerprint, cached, document
        self._kept: OrderedDict[int, Ids] = OrderedDict()
        if not tokenizer.piecewise:
            raise ValueError(f"data.tokenizer.kind={tokenizer.kind} does not encode a text piece by piece, which recall tasks need: choose kind=bpe")
        self.newline = np.array(tokenizer.encode("\n"), dtype=np.int32)

    @cached_property
    def _vocabulary(self) -> "_Edges":
        texts = [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]
        return _Edges(
            np.array([t.startswith("\n") for t in texts]),
            np.array([t[-1:].isspace() for t in texts]),
            np.array([t.endswith("\n") for t in texts]),
            np.array([t.endswith("\n") and not t[:-1].endswith(tuple(" \t\r\n")) for t in texts]),
            np.array([t == "\n" for t in texts]),
        )

    def cuts(self, ids: Ids) -> Cuts:
        """Where a line can be put without another tokenisation of what is around it; the two ends are always among them.

        These are places next to a single newline: spaces and newlines that follow each other are tokenised together.
        """
        v = self._vocabulary
        at = np.arange(1, len(ids))
        opens = v.newline_first[ids[1:]] & ~v.blank_last[ids[:-1]]
        text_before = np.concatenate([[True], ~v.blank_last[ids[:-2]]])[: len(at)] | ~v.newline[ids[:-1]]
        closes = v.one_newline_last[ids[:-1]] & text_before
        inside = opens | closes
        return Cuts(
            np.concatenate([[0], at[inside], [len(ids)]]),
            np.concatenate([[False], opens[inside], [not (len(ids) and v.newline_last[ids[-1]])]]),
        )

    def trimmed(self, ids: Ids) -> Ids:
        """Without blanks at the end, unless these are more than a hundredth of it."""
        end = len(ids)
        while end > 1 and self._vocabulary.blank_last[ids[end - 1]]:
            end -= 1
        return ids[:end] if end >= 0.99 * len(ids) else ids

    def ids(self, index: int) -> Ids:
        """Ids of one document, ending with a line's end."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        ids = self._document(index)
        if len(ids) and not self._vocabulary.newline_last[ids[-1]]:
            ids = np.concatenate([ids, self.newline])
        self._kept[index] = ids
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return ids

    def take(self, rng: random.Random, tokens: int, spare: int = 0) -> Ids:
        """`tokens` ids and up to `spare` more, from the beginning of a line somewhere in a random document on."""
        index = rng.randrange(self.size)
        ids = self.ids(index)
        cuts = self.cuts(ids)
        begins = cuts.at[~cuts.opens & (cuts.at < max(1, len(ids)))]
        parts = [ids[begins[rng.randrange(len(begins))] :]]
        have, barren = len(parts[0]), 0
        while have < tokens + spare:
            index = (index + 1) % self.size
            ids = self.ids(index)
            barren = 0 if len(ids) else barren + 1
            if barren == self.size:
                raise ValueError("the haystack of the synthetic documents holds no text: choose another data.synthetic.haystack")
            parts.append(ids)
            have += len(ids)
        return np.concatenate(parts)[: tokens + spare]


def filler(tokenizer: Tokenizer) -> Haystack:
    """A haystack of the same few sentences again and again: no file is read."""
    ids = np.array(tokenizer.encode(FILLER * 64), dtype=np.int32)
    return Haystack(tokenizer, lambda index: ids, 1, "filler")


def open_haystack(name: str, tokenizer: Tokenizer, split: str, held_out: float = 0.1, cache: str = "") -> Haystack:
    """The haystack `name` (stdlib | packages | filler); of its documents, `held_out` takes that share and `train` the others.

    They are those that `data.source` of that name keeps out of training with an equal `data.held_out`.

    Args:
        cache: folder of tokenised documents; empty: they are tokenised when they are needed.

    Raises:
        ValueError: no such haystack.
    """
    if name not in HAYSTACKS:
        raise ValueError(f"haystack={name} is not known: write one of {', '.join(HAYSTACKS)}")
    if name == "filler":
        return filler(tokenizer)
    documents = open_source(SourceConfig(source=name))
    assert not isinstance(documents, HubStream)
    order, n_held_out, n_training = split_documents(documents, held_out)
    first, size = (0, n_held_out) if split == "held_out" else (n_held_out, n_training)
    tokens = token_cache(cache, documents, tokenizer)

    def document(index: int) -> Ids:
        number = int(order[first + index])
        ids = tokens.get(number) if tokens is not None else None
        if ids is None:
            text = documents.text(number)
            ids = tokenizer.document_ids(text or "")
            if tokens is not None and text is not None:
                tokens.put(number, ids)
        return np.asarray(ids[:-1], dtype=np.int32)  # without the end of the document

    return Haystack(tokenizer, document, size, f"{documents.fingerprint} {split}", tokens is not None)
