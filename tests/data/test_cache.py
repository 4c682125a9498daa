import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

from ltrain import data
from ltrain.config import DataConfig, TokenizerConfig
from ltrain.data.cache import RECORD, TokenCache
from ltrain.data.prepare import prepare


def ids_of(document):
    return np.random.default_rng(document).integers(0, 5000, 50 + document % 300, dtype=np.int32)


@pytest.mark.parametrize("vocab", [5000, 100000])
def test_what_was_put_is_found_by_every_process(tmp_path, vocab):
    cache = TokenCache(tmp_path / "c", vocab)
    assert cache.get(3) is None
    for document in (7, 3, 12):
        assert (cache.put(document, ids_of(document)) == ids_of(document)).all()
    for again in (cache, TokenCache(tmp_path / "c", vocab)):
        assert len(again) == 3
        assert all((again.get(d) == ids_of(d)).all() for d in (3, 7, 12)) and again.get(4) is None


def write(folder, seed, count):
    cache = TokenCache(folder, 5000)
    for document in random.Random(seed).sample(range(60), count):
        if document not in cache:
            cache.put(document, ids_of(document))


def write_for_ever(folder):
    cache, document = TokenCache(folder, 5000), 0
    while True:
        cache.put(document, ids_of(document))
        document += 1


def test_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    cache = TokenCache(tmp_path, 5000)
    processes = [context.Process(target=write, args=(tmp_path, seed, 50)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    time.sleep(1.1)  # a cache looks for what others wrote once a second
    found = [d for d in range(60) if cache.get(d) is not None]
    assert len(found) >= 50 and all((cache.get(d) == ids_of(d)).all() for d in found)


def test_a_killed_writer_leaves_whole_documents_only(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.time() + 30
    while sum(p.stat().st_size for p in tmp_path.glob("*.index")) < 200 * RECORD.size and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = TokenCache(tmp_path, 5000)
    assert len(cache) >= 200
    assert all((cache.get(d) == ids_of(d)).all() for d in range(len(cache)))


@pytest.mark.parametrize("damage", ["record cut", "ids cut", "ids changed"])
def test_damage_makes_a_document_again(tmp_path, damage):
    writer = TokenCache(tmp_path, 5000)
    for d in range(3):
        writer.put(d, ids_of(d))
    kind = "index" if damage == "record cut" else "tokens"
    (path,) = tmp_path.glob(f"*.{kind}")
    content = path.read_bytes()
    path.write_bytes(content[:-10] + b"\xff" * 10 if damage == "ids changed" else content[:-10])
    cache = TokenCache(tmp_path, 5000)
    assert cache.get(2) is None and all((cache.get(d) == ids_of(d)).all() for d in (0, 1))
    cache.put(2, ids_of(2))
    assert (cache.get(2) == ids_of(2)).all() and (TokenCache(tmp_path, 5000).get(0) == ids_of(0)).all()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.tokenizer.cache: .* cannot be written"):
        TokenCache(tmp_path / "file" / "c", 5000)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"document {i} says one {i * i} thing and then another\n" * (i + 1))
    tokenizer = TokenizerConfig(vocab=300, cache=str(tmp_path / "cache"))
    return DataConfig(source="text", files=[str(tmp_path / "texts" / "*.txt")], tokens=64, shards=4, workers=0, tokenizer=tokenizer)


def stream(config):
    with data.build(config).loader() as loader:
        return [next(loader).tokens.tolist() for _ in range(150)]  # several epochs


def test_the_stream_is_the_same_with_and_without_cache_and_tokenises_once(config, monkeypatch):
    config.cache_tokens = False
    expected = stream(config)
    held = [b.tokens.tolist() for b in data.build(config).held_out(256)]
    config.cache_tokens = True
    assert stream(config) == expected
    monkeypatch.setattr(data.Tokenizer, "encode", lambda self, text: pytest.fail(f"{text[:20]} was tokenised again"))
    assert stream(config) == expected
    monkeypatch.undo()
    assert [b.tokens.tolist() for b in data.build(config).held_out(256)] == held


def test_a_document_that_was_written_again_is_tokenised_again(config, tmp_path):
    before = stream(config)
    path = tmp_path / "texts" / "20.txt"
    path.write_text(path.read_text().replace("thing", "thong"))  # as many bytes
    os.utime(path, ns=(1, 1))
    assert stream(config) != before


def test_prepare_caches_every_document_of_every_stage(config, tmp_path, capsys, monkeypatch):
    from ltrain.config import load

    (tmp_path / "run.yaml").write_text(f"""
extends: quickstart.yaml
data: {{tokens: 256, shards: 4, workers: 0, tokenizer: {{vocab: 300, cache: {tmp_path}/cache}}}}
stages:
  one: {{data: {{source: text, files: ["{tmp_path}/texts/0*.txt"]}}}}
  two: {{data: {{mixture: {{a: {{source: text, files: ["{tmp_path}/texts/*.txt"], weight: 3}}}}}}}}
""")
    run = load(tmp_path / "run.yaml")
    prepare(run, 2)
    said = capsys.readouterr().err
    assert "one text: 10/10 documents" in said and "two a: 24/24 documents" in said
    from ltrain.config import stage_configs

    (_, one), (_, two) = stage_configs(run)
    tokenizer = data.build(one.data).tokenizer
    monkeypatch.setattr(data.Tokenizer, "encode", lambda self, text: pytest.fail("a document was not cached"))
    for stage in (one, two):
        with data.build(stage.data, tokenizer=tokenizer).loader() as loader:
            assert len(next(loader).tokens) == 256
    prepare(run, 2)
    assert "two a: 0/0 documents" in capsys.readouterr().err


def test_preparing_what_is_never_cached_is_refused(tmp_path):
    from ltrain.config import load

    with pytest.raises(ValueError, match="there is nothing to prepare"):
        prepare(load("configs/quickstart.yaml", ["data.tokenizer.kind=bytes"]), 1)
