import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from ltrain import data
from ltrain.config import DataConfig, TokenizerConfig
from ltrain.data.loader import Loader, cursors_of
from ltrain.data.order import Cursor, RandomAccessCorpus, StreamedCorpus
from ltrain.data.tokenizer import Tokenizer
from tests.data.doubles import CountingTokenizer

V, T = 8, 32


class Texts:
    fingerprint = "texts"

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def name(self, index):
        return f"document {index}"

    def text(self, index):
        return self.texts[index]


class Stream:
    fingerprint = "stream"

    def __init__(self, texts):
        self.texts = texts

    def open(self, skip):
        yield from ((f"document {i}", text) for i, text in enumerate(self.texts[skip:], skip))


class BadTokenizer(Tokenizer):
    """Fails, dies or hangs at one document."""

    def __init__(self, what):
        super().__init__("bytes", 256)
        self.what = what

    def encode(self, text):
        if "poison" in text:
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "hang":
                time.sleep(1000)
            raise KeyError("inside the tokenizer")
        return super().encode(text)


def texts(seed=0, count=60):
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, T - 1, T, rng.randint(0, 3 * T), 20 * T if rng.random() < 0.2 else 5]) for _ in range(count)]
    return [f"{i}:" + "".join(rng.choice("abcdefgh") for _ in range(n)) if n else "" for i, n in enumerate(lengths)]


def corpus_of(kind, seed=0):
    return StreamedCorpus(Stream(texts(seed)), 0.1) if kind == "stream" else RandomAccessCorpus(Texts(texts(seed)), 0.1, 5, V)


def open_loader(corpus, rank=0, ranks=1, workers=0, state=None, tokenizer=None):
    return Loader(corpus, tokenizer or Tokenizer("bytes", 256), tokens=T, shards=V, workers=workers, rank=rank, ranks=ranks, seed=5, state=state)


def read(corpus, ranks, count, workers=0, state=None):
    """(global micro-batches in order, merged state) after `count` of each rank."""
    batches, states = [], []
    for rank in range(ranks):
        with open_loader(corpus, rank, ranks, workers, state) as loader:
            batches += [next(loader) for _ in range(count)]
            states.append(json.loads(json.dumps(loader.state())))
    return sorted(batches, key=lambda b: b.index), data.merge_states(states)


def same(a, b):
    return (
        a.index == b.index and a.documents == b.documents and a.cursors == b.cursors
        and all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "labels", "positions", "cu_seqlens"))
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["random access", "stream"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_global_order_is_one_for_all_ranks_workers_and_resumes(kind, workers):
    corpus = corpus_of(kind)
    expected, end = read(corpus, 1, 72)
    assert [b.index for b in expected] == list(range(72)) and max(b.cursors[0].epoch for b in expected) >= 1
    for before, after in ((2, 4), (4, 1), (1, 2)) if workers else ((1, 1), (1, 2), (1, 4), (2, 1), (2, 8), (4, 2), (8, 4)):
        first, state = read(corpus, before, 24 // before, workers)
        second, last = read(corpus, after, 48 // after, workers, state)
        assert all(map(same, first + second, expected)), (before, after)
        assert last == end


@pytest.mark.parametrize("seed", range(6))
def test_any_moment_resumes_on_any_ranks(seed):
    rng = random.Random(seed)
    corpus = corpus_of(rng.choice(["random access", "stream"]), seed)
    expected, _ = read(corpus, 1, 80)
    batches, state, done = [], None, 0
    while done < 80:
        ranks = rng.choice([1, 2, 4, 8])
        count = min(rng.randint(0, 7), (80 - done) // ranks)
        some, state = read(corpus, ranks, count, state=state)
        # Each step of all ranks takes the next `ranks` micro-batches, wherever the last layout stopped.
        assert [b.index for b in some] == list(range(done, done + ranks * count)) and state["next"] == done + ranks * count
        batches, done = batches + some, done + ranks * count
    assert all(map(same, batches, expected))


@pytest.mark.parametrize("kind", ["random access", "stream"])
def test_no_rank_tokenises_what_it_does_not_use(kind):
    corpus = corpus_of(kind)
    alone = CountingTokenizer()
    with open_loader(corpus, tokenizer=alone) as loader:
        for _ in range(40):
            next(loader)
    encoded = []
    for rank in range(4):
        tokenizer = CountingTokenizer()
        with open_loader(corpus, rank, 4, tokenizer=tokenizer) as loader:
            used = {name for _ in range(10) for name in next(loader).documents}
        named = {text or "" for text in tokenizer.encoded}
        assert named <= {corpus_text(corpus, name) for name in used}
        encoded += tokenizer.encoded
    assert sorted(encoded) == sorted(alone.encoded)


def corpus_text(corpus, name):
    source = corpus.stream if isinstance(corpus, StreamedCorpus) else corpus.documents
    return source.texts[int(name.split()[1])]


def test_what_workers_have_packed_ahead_is_not_in_the_state():
    corpus = corpus_of("random access")
    with open_loader(corpus, workers=2) as ahead, open_loader(corpus) as plain:
        for _ in range(5):
            next(ahead), next(plain)
            time.sleep(0.05)
            assert ahead.state() == plain.state()
        assert ahead.workers == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize(("workers", "ranks", "run"), [(3, 1, 2), (5, 1, 4), (4, 4, 2), (2, 8, 1), (0, 1, 0), (99, 1, 8)])
def test_workers_divide_the_shards_of_the_rank(workers, ranks, run):
    with open_loader(corpus_of("random access"), 0, ranks, workers) as loader:
        assert loader.workers == run


def test_starting_workers_moves_no_random_numbers_and_no_signal_handler():
    before, handlers = torch.get_rng_state(), [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)]
    with open_loader(corpus_of("random access"), workers=1) as loader:
        next(loader)
    assert torch.equal(before, torch.get_rng_state())
    assert handlers == [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)]


def children():
    return {p.pid for p in multiprocessing.active_children()}


def test_close_ends_the_workers_and_sigterm_does_not():
    before = children()
    loader = open_loader(corpus_of("random access"), workers=2)
    next(loader), next(loader)  # both have started
    for pid in children() - before:
        os.kill(pid, signal.SIGTERM)
    for _ in range(20):
        next(loader)
    state = loader.state()
    begin = time.time()
    loader.close()
    loader.close()
    assert children() == before and time.time() - begin < 30
    assert loader.state() == state and state["next"] == 22
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


def test_a_worker_inside_an_endless_document_is_ended():
    before = children()
    documents = ["text" * 40] * 8
    documents[3] = "poison"
    loader = open_loader(RandomAccessCorpus(Texts(documents), 0.0, 0, V), workers=1, tokenizer=BadTokenizer("hang"))
    time.sleep(0.5)
    begin = time.time()
    loader.close()
    assert children() == before and time.time() - begin < 60  # torch itself waits 5 s


@pytest.mark.parametrize(("what", "workers", "message"), [
    ("die", 2, r"a tokenising process died at .*document 17 .*memory"),
    ("fail", 2, r"data: document 17 cannot be tokenised: 'inside the tokenizer'"),
    ("fail", 0, r"data: document 17 cannot be tokenised: 'inside the tokenizer'"),
])  # fmt: skip
def test_a_document_that_breaks_a_worker_is_named(what, workers, message):
    before = children()
    documents = [f"{i}" * 40 for i in range(30)]
    documents[17] = "poison"
    loader = open_loader(RandomAccessCorpus(Texts(documents), 0.0, 0, V), workers=workers, tokenizer=BadTokenizer(what))
    with pytest.raises(ValueError, match=message) as caught:
        for _ in range(200):
            next(loader)
    assert "\n" not in str(caught.value)
    loader.close()
    assert children() == before


def test_an_unreadable_file_is_one_sentence_from_a_worker(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_bytes(b"text \xff" if i == 3 else b"text")
    config = DataConfig(source="text", files=[str(tmp_path / "*.txt")], held_out=0.0, tokens=8, shards=2, workers=1)
    config.tokenizer = TokenizerConfig(kind="bytes")
    with data.build(config).loader() as loader, pytest.raises(ValueError, match=r"3\.txt is not UTF-8 at byte 5") as caught:
        for _ in range(50):
            next(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["hub", "jsonl"])
def test_tables_give_every_worker_its_shards(tmp_path, tmp_path_factory, monkeypatch, source):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("tables")))
    for i in range(3):
        (tmp_path / f"train-{i}.jsonl").write_text("".join(json.dumps({"text": f"{i}.{j} " * 9}) + "\n" for j in range(20)))
    orders = []
    for workers in (0, 2):
        config = DataConfig(source=source, tokens=T, shards=V, workers=workers, tokenizer=TokenizerConfig(kind="bytes"))
        config.name, config.files = str(tmp_path), [str(tmp_path / "*.jsonl")]  # a local folder goes the way of a hub name
        with data.build(config).loader() as loader:
            orders.append([next(loader).documents for _ in range(120)])
    assert orders[0] == orders[1] and len({name for documents in orders[0] for name in documents}) == 54  # of 60, 6 are held out


def test_what_cannot_be_resumed_is_said_in_one_sentence():
    corpus = corpus_of("random access")
    _, state = read(corpus, 2, 3)
    for key, name in (("shards", "data.shards"), ("seed", "seed"), ("documents", "the training documents"), ("tokenizer", "the tokenizer")):
        with pytest.raises(ValueError, match=f"^{name} changed since the run was saved"):
            open_loader(corpus, state={**state, key: 99})
    with pytest.raises(ValueError, match="data.shards=8 does not divide over 3 data ranks: write a multiple of 3"):
        open_loader(corpus, 0, 3)
    one = open_loader(corpus, 0, 2).state()
    with pytest.raises(ValueError, match="4 of 8 shards have no cursor"):
        data.merge_states([one])
    with pytest.raises(ValueError, match="disagree about 'next'"):
        data.merge_states([one, {**one, "next": 4}])
    with pytest.raises(ValueError, match="has no cursor of shards"):
        open_loader(corpus, 1, 2, state=one)


def test_the_order_is_the_contract():
    """Micro-batch j is packed from shard j mod V."""
    corpus = corpus_of("random access")
    batches, state = read(corpus, 4, 6)
    reader = corpus.reader(V, {s: Cursor() for s in range(V)})
    for batch in batches[:V]:
        assert batch.documents[0] == reader(batch.index, 0, 0).name
    assert [cursors_of(state["cursors"][str(b.index % V)]) for b in batches[-V:]] == [b.cursors for b in batches[-V:]]
