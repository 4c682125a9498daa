import math
import subprocess
import sys

import pytest
import torch

from ltrain import data
from ltrain.config import DataConfig, TokenizerConfig


@pytest.fixture
def config(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (i + 1))
    return DataConfig(
        source="text", files=[str(tmp_path / "*.txt")], held_out=0.25, tokens=64, shards=4, workers=0, tokenizer=TokenizerConfig(kind="bytes")
    )


def test_ranks_share_the_same_micro_batches_for_every_seed(config):
    whole = data.build(config, seed=1).held_out(64 * 7 + 5)
    assert [b.index for b in whole] == list(range(7)) and all(b.tokens.shape == (64,) for b in whole)
    for ranks in (1, 2, 4):
        dataset = data.build(config, seed=2)
        parts = [dataset.held_out(64 * 7 + 5, rank, ranks) for rank in range(ranks)]
        assert {len(part) for part in parts} == {-(-7 // ranks)}  # equally many forwards
        labelled = sorted((b for part in parts for b in part if (b.labels >= 0).any()), key=lambda b: b.index)
        assert len(labelled) == 7
        assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) for a, b in zip(labelled, whole, strict=True))


def test_no_held_out_document_trains(config):
    dataset = data.build(config)
    held = {name for b in dataset.held_out(10**9) for name in b.documents}
    with dataset.loader() as loader:
        trained: set[str] = set()
        while len(trained) < 30:
            trained |= set(next(loader).documents)
        for _ in range(400):
            trained |= set(next(loader).documents)
    assert len(held) >= 9 and not held & trained  # the last, cut by the end, may be missing


def test_unigram_entropy():
    def batch(labels):
        t = torch.tensor(labels)
        return data.MicroBatch(t, t, t, torch.tensor([0, len(labels)]), ["d"], 0, (data.Cursor(),))

    assert data.unigram_entropy([batch([1, 2, -100]), batch([3, 4, -100])]) == pytest.approx(math.log(4), abs=1e-12)
    assert data.unigram_entropy([batch([7, 7, 7, 9])]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-12)
    with pytest.raises(ValueError, match="no token has a label"):
        data.unigram_entropy([batch([-100])])


def test_too_little_held_out_text_is_refused(config):
    with pytest.raises(ValueError, match="eval.tokens=63 is less than one micro-batch"):
        data.build(config).held_out(63)
    config.tokens = 100000
    with pytest.raises(ValueError, match="raise data.held_out or lower data.tokens"):
        data.build(config).held_out(100000)
    config.held_out = 0.0
    with pytest.raises(ValueError, match="data.held_out=0 keeps no documents"):
        data.build(config).held_out(100000)


def test_the_standard_library_trains_without_torch_or_datasets_to_open_it(tmp_path):
    code = """
import sys
from ltrain import data
from ltrain.config import DataConfig
config = DataConfig(workers=0)
config.tokenizer.kind = "bytes"
dataset = data.build(config)
assert "torch" not in sys.modules and "datasets" not in sys.modules
batch = next(dataset.loader(1, 2))
assert batch.index == 1 and len(batch.tokens) == 2048 and batch.documents[0].endswith(".py")
assert dataset.tokenizer.decode(batch.tokens[:-1]).isprintable() is False
held = dataset.held_out(65536)
assert len(held) == 32 and 2.5 < data.unigram_entropy(held) < 3.7  # English and code by bytes
assert "datasets" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
