import random

import numpy as np
import pytest

from ltrain.data.order import Cursor, Document
from ltrain.data.packing import MicroBatch, Packer
from tests.data.doubles import CountingTokenizer


def random_documents(rng: random.Random, count: int, tokens: int) -> list[str | None]:
    """Empty, short, longer than a stream, much longer, and left-out documents."""
    lengths = [rng.choice([0, 1, rng.randint(0, tokens), tokens - 1, tokens, 5 * tokens + rng.randint(0, 9)]) for _ in range(count)]
    texts = ["".join(rng.choice("abcdefgh") for _ in range(n)) for n in lengths]
    return [None if rng.random() < 0.1 else text for text in texts[:-1]] + ["the last one"]


def reader(texts, rotate=3):
    """Documents of one shard; every epoch has another order."""

    def read(epoch, index):
        i = (index + rotate * epoch) % len(texts)
        return Document(f"d{i}", texts[i]) if index < len(texts) else None

    return read


def flat(texts, epochs):
    """The plain reference: every token of the shard in order, as (document, position in it, id, next id or None)."""
    read, out = reader(texts), []
    for epoch in range(epochs):
        for index in range(len(texts)):
            document = read(epoch, index)
            if document.text is not None:
                ids = [*document.text.encode(), 256]
                out += [(document.name, i, t, ids[i + 1] if i + 1 < len(ids) else None) for i, t in enumerate(ids)]
    return out


@pytest.mark.parametrize("seed", range(30))
def test_streams_hold_every_token_once_with_its_position_and_label(seed):
    rng = random.Random(seed)
    tokens = rng.choice([2, 3, 7, 16, 64])
    texts = random_documents(rng, rng.randint(1, 20), tokens)
    expected = flat(texts, 3)
    packer = Packer([reader(texts)], CountingTokenizer(), tokens)
    for n in range(len(expected) // tokens):
        stream = packer.next()
        batch, part = MicroBatch.of(stream, n), expected[n * tokens : (n + 1) * tokens]
        assert [str(t.dtype) for t in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens)] == ["torch.int64"] * 3 + ["torch.int32"]
        assert batch.tokens.tolist() == [token for _, _, token, _ in part]
        assert batch.positions.tolist() == [position for _, position, _, _ in part]
        cu = batch.cu_seqlens.tolist()
        assert cu[0] == 0 and cu[-1] == tokens and len(cu) == len(batch.documents) + 1 and all(np.diff(cu) > 0)
        for name, begin, end in zip(batch.documents, cu, cu[1:], strict=False):
            assert {d for d, _, _, _ in part[begin:end]} == {name}
            assert np.diff(batch.positions[begin:end]).tolist() == [1] * (end - begin - 1)  # one document, unbroken
            assert batch.labels[begin:end].tolist() == [*(label for *_, label in part[begin : end - 1]), -100]
        # Two segments in a row are two documents (or one document in two epochs), not one that was split for nothing.
        assert all(part[c][1] == 0 for c in cu[1:-1])


@pytest.mark.parametrize("seed", range(10))
def test_every_cursor_resumes_with_at_most_one_document_encoded_again(seed):
    rng = random.Random(seed)
    texts = random_documents(rng, 8, 16)
    tokenizer = CountingTokenizer()
    packer = Packer([reader(texts)], tokenizer, 16)
    streams, counts = [], []
    for _ in range(40):
        streams.append(packer.next())
        counts.append(len(tokenizer.encoded))
    for n in range(39):
        again = CountingTokenizer()
        resumed = Packer([reader(texts)], again, 16, cursors=streams[n].cursors)
        for expected in streams[n + 1 :]:
            stream = resumed.next()
            assert stream.tokens.tolist() == expected.tokens.tolist() and stream.starts.tolist() == expected.starts.tolist()
            assert stream.documents == expected.documents and stream.cursors == expected.cursors
        assert len(again.encoded) - (counts[-1] - counts[n]) in (0, 1)


def test_a_long_document_is_encoded_once():
    tokenizer = CountingTokenizer()
    packer = Packer([reader(["x" * 999])], tokenizer, 10)
    assert [packer.next().starts[0] for _ in range(100)] == list(range(0, 1000, 10))
    assert len(tokenizer.encoded) == 1


def test_one_epoch_ends_without_a_part_stream():
    packer = Packer([reader(["abc", "defg"])], CountingTokenizer(), 4, epochs=1)  # 4 and 5 tokens
    assert [packer.next().tokens.tolist() for _ in range(2)] == [[97, 98, 99, 256], [100, 101, 102, 103]]
    assert packer.next() is None


def test_a_shard_without_documents_and_a_changed_document_are_refused():
    with pytest.raises(ValueError, match="shard 3 has no document in a whole epoch"):
        Packer([reader([None, None])], CountingTokenizer(), 4, shard=3).next()
    with pytest.raises(ValueError, match="d0 has 4 tokens and the run had read 9 of it"):
        Packer([reader(["abc"])], CountingTokenizer(), 4, cursors=[Cursor(0, 0, 9)]).next()
    with pytest.raises(ValueError, match="data: d0 cannot be tokenised: .*lone surrogate"):
        Packer([reader(["\ud800"])], CountingTokenizer(), 4).next()
    with pytest.raises(ValueError, match="data.tokens=1 is too short"):
        Packer([reader(["abc"])], CountingTokenizer(), 1)
