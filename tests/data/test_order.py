import itertools
from collections import Counter

import pytest

from ltrain.data.order import Cursor, Permutation, RandomAccessCorpus, StreamedCorpus


class Texts:
    """Documents in memory."""

    def __init__(self, texts: list[str | None]):
        self.texts, self.fingerprint = texts, "texts"

    def __len__(self):
        return len(self.texts)

    def name(self, index):
        return f"document {index}"

    def text(self, index):
        return self.texts[index]


class Stream:
    """A stream in memory that counts how often and how far it was read."""

    fingerprint = "stream"

    def __init__(self, size):
        self.size, self.opened, self.read = size, [], 0

    def open(self, skip):
        self.opened.append(skip)
        for i in range(skip, self.size):
            self.read += 1
            yield f"document {i}", str(i)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_permutation_is_one(size):
    order = Permutation(size, "a", 1)
    assert sorted(order[i] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_permutation_is_the_same_everywhere_and_mixes():
    assert [Permutation(1000, "train", 0, 0)[i] for i in range(6)] == [679, 35, 111, 206, 498, 444]  # written down once
    # Over many keys every element comes first about equally often: chi-square with 9 degrees of freedom, p < 1e-5 above 39.
    first = Counter(Permutation(10, "k", key)[0] for key in range(2000))
    assert sum((first[i] - 200) ** 2 / 200 for i in range(10)) < 39
    # and neighbours do not stay together
    order = [Permutation(1000, "k", 5)[i] for i in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 10


def epoch_of(corpus, shards, epoch):
    read = corpus.reader(shards, {s: Cursor(epoch) for s in range(shards)})
    out = []
    for shard in range(shards):
        index = 0
        while (document := read(shard, epoch, index)) is not None:
            out.append(document.text)
            index += 1
    return out


def corpora():
    return [
        (lambda share, seed: RandomAccessCorpus(Texts([str(i) for i in range(103)]), share, seed, 4)),
        (lambda share, seed: StreamedCorpus(Stream(103), share)),
    ]


@pytest.mark.parametrize("make", corpora())
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_every_document_trains_once_an_epoch_or_is_held_out(make, share):
    corpus = make(share, 3)
    held = [d.text for d in corpus.held_out()]
    assert abs(len(held) - 103 * share) <= 1
    for epoch in (0, 1):
        trained = epoch_of(corpus, 4, epoch)
        assert sorted(trained + held, key=int) == [str(i) for i in range(103)]
    assert sorted(d.text for d in corpus.training()) == sorted(epoch_of(corpus, 4, 0))


def test_epochs_and_seeds_reshuffle_but_keep_what_is_held_out():
    make = corpora()[0]
    assert epoch_of(make(0.1, 3), 4, 0) == epoch_of(make(0.1, 3), 4, 0)
    assert epoch_of(make(0.1, 3), 4, 0) != epoch_of(make(0.1, 3), 4, 1)
    assert epoch_of(make(0.1, 3), 4, 0) != epoch_of(make(0.1, 4), 4, 0)
    assert list(make(0.1, 3).held_out()) == list(make(0.1, 4).held_out())


@pytest.mark.parametrize(("share", "size", "skipped"), [(0.0, 40, 19), (0.25, 54, 26)])  # 40 training documents either way
def test_a_stream_resumes_by_skipping_and_serves_shards_out_of_step(share, size, skipped):
    corpus = StreamedCorpus(Stream(size), share)
    order = [i for i in range(size) if not share or i % 4]
    whole = corpus.reader(4, {s: Cursor() for s in range(4)})
    expected = {(s, e, i): whole(s, e, i) for e in range(2) for i in range(11) for s in range(4)}
    assert expected[2, 1, 3].text == str(order[14]) and expected[2, 1, 10] is None
    corpus.stream.opened.clear()
    read = corpus.reader(4, {1: Cursor(0, 7), 3: Cursor(0, 4)})
    steps = [(3, 0, 4), (1, 0, 7), (1, 0, 8), (1, 0, 9), (1, 0, 10), (1, 1, 0), (1, 1, 1), (3, 0, 5), (3, 0, 6)]
    for step in steps:
        assert read(*step) == expected[step], step
    assert corpus.stream.opened[0] == skipped  # document 4 of shard 3


def test_too_few_documents_and_impossible_shares_are_refused():
    with pytest.raises(ValueError, match=r"data.shards=8 .* there are 5 \(1 of 6 are held out\): write data.shards=5 or less"):
        RandomAccessCorpus(Texts(["a"] * 6), 0.1, 0, 8)
    with pytest.raises(ValueError, match="data.held_out=1 is not a share"):
        RandomAccessCorpus(Texts(["a"] * 6), 1.0, 0, 1)
    with pytest.raises(ValueError, match="write 0.5 or less"):
        StreamedCorpus(Stream(3), 0.6)
