import json
import multiprocessing
import random

import pytest

from ltrain.config import TokenizerConfig
from ltrain.data.tokenizer import END, PIECE_CHARACTERS, Tokenizer, build_tokenizer, cut, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class A:\n\tpass  # naïve\n" * 20, "import os\n" * 30]


def config(tmp_path, **values):
    return TokenizerConfig(**{"vocab": 285, "cache": str(tmp_path / "cache"), **values})


@pytest.fixture
def bpe(tmp_path):
    return build_tokenizer(config(tmp_path), TEXTS, "texts")


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_any_text_comes_back(tmp_path, kind):
    tokenizer = build_tokenizer(config(tmp_path, kind=kind), TEXTS, "texts")
    rng = random.Random(0)
    texts = ["", " ", "\n\n  \t\r\n", "\0\x01", "e\u0301 \u00e9 \ufeff\u2028", "🙂👨‍👩‍👧", END, f"a{END}b", "x" * 5000]
    ranges = [(0, 0x80), (0, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    texts += ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos for i in ids)
        assert tokenizer.encode_document(text) == [*ids, tokenizer.eos]
        assert tokenizer.decode(tokenizer.encode_document(text)) == text


def test_bytes_are_bytes():
    tokenizer = Tokenizer("bytes", 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9] and tokenizer.vocab_size == 257 and tokenizer.eos == 256
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_lone_surrogates_are_refused(bpe):
    for tokenizer in (bpe, Tokenizer("bytes", 256)):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode("a\ud800b")


def test_bpe_is_trained_once_and_cached(tmp_path, bpe):
    def untouched():
        raise AssertionError("the texts were read although the tokenizer is cached")
        yield

    again = build_tokenizer(config(tmp_path), untouched(), "texts")
    assert again.fingerprint == bpe.fingerprint and bpe.vocab_size == 285
    assert len(bpe.encode(TEXTS[0])) < 0.7 * len(TEXTS[0])
    other = build_tokenizer(config(tmp_path, vocab=270), TEXTS, "texts")
    assert other.vocab_size == 270 and other.fingerprint != bpe.fingerprint
    assert train_bpe(TEXTS, 300).to_str() == train_bpe(TEXTS, 300).to_str()


def build_and_report(queue, values):
    queue.put(build_tokenizer(TokenizerConfig(**values), TEXTS, "race").fingerprint)


def test_processes_may_race_for_the_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=build_and_report, args=(queue, {"vocab": 300, "cache": str(tmp_path / "c")})) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len({queue.get() for _ in processes}) == 1
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("kind", ["bpe", "bytes", "file"])
def test_a_saved_tokenizer_is_the_same(tmp_path, bpe, kind):
    (tmp_path / "saved").mkdir()
    bpe.save(tmp_path / "saved")
    tokenizer = build_tokenizer(config(tmp_path, kind=kind, path=str(tmp_path / "saved" / "tokenizer.json")), TEXTS, "texts")
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again")
    loaded = Tokenizer.load(tmp_path / "again")
    assert (loaded.kind, loaded.eos, loaded.vocab_size, loaded.fingerprint) == (kind, tokenizer.eos, tokenizer.vocab_size, tokenizer.fingerprint)
    assert loaded.encode(TEXTS[1] + END) == tokenizer.encode(TEXTS[1] + END)
    with pytest.raises(ValueError, match="not a saved tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_file_names_its_end_of_document_token_or_is_refused(tmp_path, bpe):
    file = tmp_path / "tokenizer.json"
    values = config(tmp_path, kind="file", path=str(file))
    model = json.loads(bpe._model.to_str())
    text = json.dumps(model).replace(END, "<stop>")
    file.write_text(text)
    with pytest.raises(ValueError, match="has no end-of-document token"):
        build_tokenizer(values, [], "")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert build_tokenizer(values, [], "").eos == bpe.eos
    model = json.loads(text)
    model["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(model))
    with pytest.raises(ValueError, match="does not give text back"):
        build_tokenizer(values, [], "")
    file.write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        build_tokenizer(values, [], "")


@pytest.mark.parametrize(
    ("values", "message"),
    [({"kind": "words"}, "write one of bpe, bytes, file"), ({"vocab": 256}, "at least 257"), ({"kind": "file"}, "data.tokenizer.path is empty")],
)
def test_impossible_options_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(config(tmp_path, **values), TEXTS, "texts")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="data.tokenizer.cache=.* cannot be written"):
        build_tokenizer(config(tmp_path), TEXTS, "texts")


def test_digits_are_tokens_of_their_own_unless_merged(tmp_path):
    texts = [f"the year 2024 and 20245 and {n}" for n in range(2000, 2100)] * 3
    split, merge = (Tokenizer("bpe", 0, train_bpe(texts, 330, digits)) for digits in ("split", "merge"))
    assert [split.decode([i]) for i in split.encode("in 20245,")][-6:] == ["2", "0", "2", "4", "5", ","]
    assert any("202" in merge.decode([i]) for i in merge.encode("in 20245,"))
    both = {build_tokenizer(config(tmp_path, digits=digits), texts, "digits").fingerprint for digits in ("split", "merge")}
    assert len(both) == 2  # each has its own place in the cache


@pytest.mark.parametrize("digits", ["split", "merge"])
def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(digits):
    import argparse
    from pathlib import Path

    text = Path(argparse.__file__).read_text() * 3 + "\n\n  \n\tend\r\n\n中文 2024 \n"
    tokenizer = Tokenizer("bpe", 0, train_bpe([text], 400, digits))
    whole = tokenizer.encode(text)
    for characters in (1, 7, 1000, PIECE_CHARACTERS):
        pieces = list(cut(text, characters))
        assert "".join(pieces) == text and all(len(p) >= characters for p in pieces[:-1])
        assert sum(map(tokenizer.encode, pieces), []) == whole
    assert len(list(cut(text))) == 3 and tokenizer.document_ids(text).tolist() == [*whole, 0]
    assert Tokenizer("bytes", 256).document_ids("é" * 9).tolist() == [0xC3, 0xA9] * 9 + [256]
