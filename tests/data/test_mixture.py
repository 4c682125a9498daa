import json
import random

import numpy as np
import pytest
import torch

from ltrain import data
from ltrain.config import ConfigError, DataConfig, MixtureConfig, TokenizerConfig, load
from ltrain.data.loader import Loader
from ltrain.data.mixture import Mixture, Part
from ltrain.data.order import Cursor, Document, RandomAccessCorpus
from ltrain.data.packing import Packer
from ltrain.data.synthetic.corpus import SyntheticCorpus
from ltrain.data.tokenizer import Tokenizer
from tests.data.doubles import CountingTokenizer
from tests.data.test_loader import Texts, same

V, T = 8, 256


def mixture(sequence_length=0):
    """Short documents, long ones of which there are fewer than shards, and whole ones."""
    rng = random.Random(1)
    short = [f"s{i} " + "ab" * rng.randint(0, 60) for i in range(90)]
    long = [f"l{i} " + "cd" * rng.randint(300, 1500) for i in range(5)]
    config = DataConfig(tokens=T, sequence_length=sequence_length)
    recall = MixtureConfig(source="synthetic")
    recall.synthetic.haystack, recall.synthetic.tasks = "filler", ["kv", "passkey"]
    synthetic = SyntheticCorpus(recall.synthetic, config, 5)
    synthetic.attach(Tokenizer("bytes", 256), "")
    return Mixture([
        Part("short", 3.0, RandomAccessCorpus(Texts(short), 0.1, 5, V)),
        Part("long", 5.0, RandomAccessCorpus(Texts(long), 0.0, 5, V, shared=True)),
        Part("recall", 2.0, synthetic, whole=True),
    ])  # fmt: skip


def read(ranks, count, workers=0, state=None, sequence_length=0):
    batches, states = [], []
    for rank in range(ranks):
        with Loader(
            mixture(sequence_length), Tokenizer("bytes", 256), tokens=T, sequence_length=sequence_length, shards=V,
            workers=workers, rank=rank, ranks=ranks, seed=5, state=state,
        ) as loader:  # fmt: skip
            batches += [next(loader) for _ in range(count)]
            states.append(json.loads(json.dumps(loader.state())))
    return sorted(batches, key=lambda b: b.index), data.merge_states(states)


@pytest.mark.parametrize("sequence_length", [0, 256])
def test_a_mixture_is_one_stream_for_all_ranks_workers_and_resumes(sequence_length):
    expected, end = read(1, 48, sequence_length=sequence_length)
    assert {name.split()[0][0] for b in expected for name in b.documents} >= {"d", "k", "p"}
    for before, after, workers in ((2, 4, 0), (4, 1, 0), (1, 8, 0), (2, 2, 2)):
        first, state = read(before, 16 // before, workers, sequence_length=sequence_length)
        second, last = read(after, 32 // after, workers, state, sequence_length=sequence_length)
        assert all(map(same, first + second, expected)), (before, after)
        assert last == end


def kind(name):
    return "recall" if " tokens (" in name else name.split()[0]


def test_shares_are_of_tokens_within_one_percent_over_a_million():
    def documents(name, least, most, seed):
        rng = random.Random(seed)
        sizes = [rng.randint(least, most) for _ in range(40)]

        def read(epoch, index):
            return Document(f"{name} {index}", None, np.full(sizes[index], index, dtype=np.int32)) if index < 40 else None

        return read

    counts = dict.fromkeys(("short", "long", "whole"), 0)
    for shard in range(4):
        reads = [documents("short", 20, 200, 0), documents("long", 3000, 90000, shard), documents("whole", 700, 2048, 2)]
        packer = Packer(reads, Tokenizer("bytes", 256), 2048, shares=(0.25, 0.6, 0.15), whole=(False, False, True), sequence_length=512, shard=shard)
        for _ in range(128):
            stream = packer.next()
            for name, count in zip(stream.documents, np.diff(stream.cu_seqlens), strict=True):
                counts[name.split()[0]] += int(count)
                assert count <= 512
    total = sum(counts.values())
    assert total == 1 << 20
    for name, share in (("short", 0.25), ("long", 0.6), ("whole", 0.15)):
        assert abs(counts[name] / total - share) < 0.01, counts


def test_shards_begin_with_different_sources():
    reads = [lambda epoch, index, n=n: Document(f"{n}", "x" * 99) for n in range(2)]
    first = [Packer(reads, Tokenizer("bytes", 256), 50, shares=(0.5, 0.5), whole=(False, False), shard=s).next().documents[0] for s in range(64)]
    assert 20 < sum(name == "0" for name in first) < 44


def test_whole_documents_are_never_cut_and_wait_for_room():
    sizes = [40, 64, 10, 33]

    def whole(epoch, index):
        return Document(f"whole {index}", None, np.full(sizes[index % 4], 7, dtype=np.int32))

    packer = Packer([lambda e, i: Document(f"text {i}", "y" * 200), whole], Tokenizer("bytes", 256), 64, shares=(0.4, 0.6), whole=(False, True))
    seen = []
    for _ in range(60):
        stream = packer.next()
        seen += [(name, n) for name, n in zip(stream.documents, np.diff(stream.cu_seqlens), strict=True) if name.startswith("whole")]
    assert [name for name, _ in seen] == [f"whole {i}" for i in range(len(seen))] and len(seen) > 40
    assert all(n == sizes[i % 4] for i, (_, n) in enumerate(seen))


@pytest.mark.parametrize("tokens", [64, 100])
def test_pieces_are_segments_from_position_zero_and_no_token_is_lost(tokens):
    texts = [f"{i}" * n for i, n in enumerate([200, 3, 64, 31, 500, 32])]
    packer = Packer([lambda e, i: Document(str(i), texts[i]) if i < 6 else None], CountingTokenizer(), tokens, sequence_length=32)
    streams = [packer.next() for _ in range(40)]
    assert all((s.starts == 0).all() and np.diff(s.cu_seqlens).max() <= 32 for s in streams)
    ids = np.concatenate([s.tokens for s in streams])
    epoch = np.concatenate([[*text.encode(), 256] for text in texts])
    assert (ids == np.resize(epoch, len(ids))).all()
    for n in range(0, 39, 5):
        again = Packer([lambda e, i: Document(str(i), texts[i]) if i < 6 else None], CountingTokenizer(), tokens, sequence_length=32,
                       cursors=streams[n].cursors)  # fmt: skip
        for expected in streams[n + 1 :]:
            stream = again.next()
            assert (stream.tokens == expected.tokens).all() and (stream.cu_seqlens == expected.cu_seqlens).all()
            assert stream.cursors == expected.cursors


def test_states_of_one_source_from_before_mixtures_still_resume():
    corpus = RandomAccessCorpus(Texts([f"{i} " * 40 for i in range(30)]), 0.1, 5, V)
    args = {"tokens": T, "shards": V, "workers": 0, "rank": 0, "ranks": 1, "seed": 5}
    with Loader(corpus, Tokenizer("bytes", 256), **args) as loader:
        for _ in range(11):
            next(loader)
        state = loader.state()
        expected = [next(loader) for _ in range(5)]
    old = {**state, "cursors": {shard: cursors[0][:3] for shard, cursors in state["cursors"].items()}}
    with Loader(corpus, Tokenizer("bytes", 256), **args, state=old) as loader:
        assert all(torch.equal(next(loader).tokens, b.tokens) for b in expected)


@pytest.fixture
def folders(tmp_path):
    for name, size in (("short", 3), ("long", 60)):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i:02}.txt").write_text(f"{name} {i} " * (size + i))
    return tmp_path


def text_mixture(folders, **weights):
    entries = {n: MixtureConfig(source="text", files=[str(folders / n / "*.txt")], weight=w) for n, w in weights.items()}
    return DataConfig(mixture=entries, tokens=128, shards=4, workers=0, tokenizer=TokenizerConfig(kind="bytes"), held_out=0.25)


def test_evaluation_is_a_weighted_mix_of_what_every_source_holds_out(folders):
    dataset = data.build(text_mixture(folders, short=1.0, long=3.0))
    held = dataset.held_out(128 * 14)
    tokens = {"short": 0, "long": 0}
    for batch in held:
        for name, n in zip(batch.documents, batch.cu_seqlens.diff().tolist(), strict=True):
            tokens[name.split("/")[-2]] += n
    assert tokens["long"] / tokens["short"] == pytest.approx(3, rel=0.5)
    names = {name for batch in dataset.held_out(10**6) for name in batch.documents}
    with dataset.loader() as loader:
        trained = {name for _ in range(400) for name in next(loader).documents}
    assert not names & trained and len(names) == 10 and len(trained) == 30


def test_another_weight_is_another_stream(folders):
    with data.build(text_mixture(folders, short=1.0, long=3.0)).loader() as loader:
        state = data.merge_states([loader.state()])
    with pytest.raises(ValueError, match="the training documents changed"):
        data.build(text_mixture(folders, short=1.0, long=2.0)).loader(state=state)


def test_length_buckets_select_by_bytes_and_keep_what_is_held_out(folders):
    whole = text_mixture(folders, long=1.0)
    held = {d.name for d in data.build(whole).corpus.held_out()}
    chosen, sizes = {}, {}
    for name, least, most in (("low", 0, 575), ("high", 576, 0)):
        config = text_mixture(folders, long=1.0)
        config.mixture["long"].min_tokens, config.mixture["long"].max_tokens = least, most
        corpus = data.build(config).corpus
        chosen[name] = {d.name for d in corpus.training()}, {d.name for d in corpus.held_out()}
        sizes[name] = [len(d.text) for d in [*corpus.training(), *corpus.held_out()]]
    assert max(sizes["low"]) <= 575 and min(sizes["high"]) >= 576
    assert chosen["low"][1] | chosen["high"][1] == held
    assert len(chosen["low"][0] | chosen["high"][0] | held) == 20
    config.mixture["long"].min_tokens = 10**6
    with pytest.raises(ValueError, match=r"data.mixture.long: .*none of the 20 documents to train on is as long"):
        data.build(config)


@pytest.mark.parametrize(("words", "message"), [
    (["data.mixture.a.weight=0"], "data.mixture.a.weight is 0.0, expected above 0"),
    (["data.mixture.a.wieght=1"], "unknown key data.mixture.a.wieght on the command line, did you mean data.mixture.a.weight"),
    (["data.mixture.a.source=text"], r"data.mixture.a.source=text needs data.mixture.a.files"),
    (["data.mixture.a.roots=[x]"], "data.mixture.a.roots=.* has no effect with data.mixture.a.source=stdlib"),
    (["data.mixture.a.synthetic.length=512"], "data.mixture.a.synthetic.length=512 has no effect with data.mixture.a.source=stdlib"),
    (["data.mixture.a.source=synthetic"], "no source but synthetic ones"),
    (["data.mixture.a.weight=1", "data.source=text"], "data.source='text' has no effect with data.mixture=a"),
    (["data.sequence_length=512"], "data.sequence_length=512 is not from 2 to data.tokens=256"),
    (["data.source=synthetic"], "data.source is 'synthetic', expected one of"),
    (["data.mixture.a.weight=1", "data.mixture.b.source=synthetic", "data.mixture.b.synthetic.length=512"], "b.synthetic.length=512 is not from"),
    (["data.mixture.a.min_tokens=9", "data.mixture.a.max_tokens=8"], "data.mixture.a.max_tokens=8 is below min_tokens=9"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load("configs/quickstart.yaml", words)


def test_weights_come_from_the_command_line_and_null_takes_a_source_out(tmp_path):
    (tmp_path / "c.yaml").write_text("extends: quickstart.yaml\ndata: {mixture: {a: {weight: 2}, b: {source: packages, weight: 1}}}\n")
    config = load(tmp_path / "c.yaml", ["data.mixture.b.weight=0.3", "data.mixture.b.roots=x*"])
    assert config.data.mixture == {"a": MixtureConfig(weight=2.0), "b": MixtureConfig(source="packages", weight=0.3, roots=["x*"])}
    assert list(load(tmp_path / "c.yaml", ["data.mixture.b=null"]).data.mixture) == ["a"]
    assert Cursor() == (0, 0, 0, 0)
