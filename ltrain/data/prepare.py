"""The verb `ltrain data prepare`: everything that training would otherwise do with texts while it goes on, done before it."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ltrain.config import Config, stage_configs
from ltrain.data.dataset import Dataset, build
from ltrain.data.order import RandomAccessCorpus
from ltrain.data.synthetic.corpus import SyntheticCorpus
from ltrain.data.synthetic.haystack import Ids
from ltrain.data.tokenizer import Tokenizer

EVERY = 5.0  # seconds between lines, where they cannot replace each other


class Job(NamedTuple):
    """Documents to be cached."""

    name: str
    documents: list[int]  # the longest first, so that no process is left alone with it at the end
    encode: Callable[[int], int]  # puts one into the cache and gives its tokens


def prepare(config: Config, processes: int) -> None:
    """Train the tokenizer where there is none yet, and tokenise all documents that the run, with all its stages, may read.

    What is cached already is left as it is, so a run that was stopped goes on where it was.

    Raises:
        ValueError: nothing is to be cached, or a document cannot be read.
    """
    configs = stage_configs(config) if config.stages else [("", config)]
    tokenizer = _given(configs[0][1])
    found = False
    for name, each in configs:
        dataset = build(each.data, each.seed, tokenizer)
        tokenizer = dataset.tokenizer
        for job in _jobs(dataset):
            found = True
            _run(job._replace(name=" ".join(filter(None, (name, job.name)))), processes)
    if not found:
        raise ValueError(
            "there is nothing to prepare: streams of the hub and bytes are not cached, and data.cache_tokens=false caches nothing: train without it"
        )


def _given(config: Config) -> Tokenizer | None:
    """The tokenizer of the checkpoint that the run begins with."""
    if not config.run.init:
        return None
    from ltrain.checkpoint import newest
    from ltrain.checkpoint.index import INDEX
    from ltrain.train.start import locate

    path: Path | None = locate(Path(config.run.init).expanduser(), Path(config.run.dir) / "init")
    if path and not (path / INDEX).is_file():
        path = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if path is None:
        raise ValueError(f"run.init={config.run.init} holds no checkpoint: name a run that has saved one")
    return Tokenizer.load(path)


def _jobs(dataset: Dataset) -> Iterator[Job]:
    for part in dataset.corpus.parts:
        corpus = part.corpus
        if isinstance(corpus, RandomAccessCorpus) and corpus.cache is not None:
            cache, documents = corpus.cache, [int(corpus.split[i]) for i in range(corpus.n_held_out + corpus.n_training)]
            sizes = corpus.documents.sizes()

            def encode(index: int, corpus: RandomAccessCorpus = corpus) -> int:
                document = corpus.document(index, encoded=True)
                if document.ids is not None or document.text is None or document.keep is None:
                    return len(document.ids) if document.ids is not None else 0
                return len(document.keep(dataset.tokenizer.document_ids(document.text)))

            left = sorted((i for i in documents if i not in cache), key=lambda i: (-sizes[i], i))
            yield Job(part.name or dataset.config.source, left, encode)
        elif isinstance(corpus, SyntheticCorpus) and corpus.haystack is not None and corpus.haystack.cached:
            size, ids = corpus.haystack.size, corpus.haystack.ids

            def encode_haystack(index: int, ids: Callable[[int], Ids] = ids) -> int:
                return len(ids(index))

            yield Job(f"{part.name} (haystack)", list(range(size)), encode_haystack)


def _run(job: Job, processes: int) -> None:
    global _encode
    _encode = job.encode  # by the fork: a function of documents and a tokenizer does not travel
    begin = shown = time.monotonic()
    done = tokens = 0
    with multiprocessing.get_context("fork").Pool(processes, _start) as pool:
        for count in pool.imap_unordered(_one, job.documents):
            done, tokens, now = done + 1, tokens + count, time.monotonic()
            if now - shown > (0.2 if sys.stderr.isatty() else EVERY):
                shown = now
                _show(job, done, tokens, now - begin, end="" if sys.stderr.isatty() else "\n")
    _show(job, done, tokens, time.monotonic() - begin, end="\n")


def _show(job: Job, done: int, tokens: int, seconds: float, end: str) -> None:
    back = "\r" if sys.stderr.isatty() else ""
    rate = tokens / max(seconds, 1e-9)
    words = f"{job.name}: {done}/{len(job.documents)} documents, {tokens / 1e6:.1f}M tokens, {rate / 1e3:.0f}k tokens/s"
    print(f"{back}{words}", end=end, file=sys.stderr, flush=True)


_encode: Callable[[int], int]


def _start() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork


def _one(index: int) -> int:
    return _encode(index)
