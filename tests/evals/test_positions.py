"""Loss by position against a direct sum, and which held-out documents it is told of."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ltrain.data.order import Document
from ltrain.data.tokenizer import Tokenizer
from ltrain.evals.positions import Bucket, edges, longest_documents, loss_by_position, mean, short_pieces, streams
from ltrain.model.sequence import Sequence
from tests.parallel.parity import VOCAB, Layout, Reference, config, prepare

LENGTHS = [300, 40, 513, 129, 2]


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def on_rank(layout: Layout) -> list[Bucket]:
    from ltrain.parallel import cpu
    from ltrain.parallel.engines.megatron import MegatronEngine
    from ltrain.parallel.inference import Inference
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    settings = config(layout, "fp64")
    mesh = Mesh(settings.parallel, torch.device("cpu"))
    try:
        engine = MegatronEngine(settings, VOCAB, mesh)
        prepare(engine.stack)
        engine.stage.eval()
        return loss_by_position(Inference(engine.stage, VOCAB), mesh, documents(), 600, 400)
    finally:
        mesh.close()


@pytest.mark.parametrize(("world", "layout"), [(1, Layout()), (2, Layout(expert=2)), (4, Layout(context=2, pipeline=2))], ids=str)
def test_buckets_are_a_direct_sum(pool: Any, world: int, layout: Layout) -> None:
    """Of four streams, of which two data ranks have two each; with three documents in the buckets from 128 on."""
    stack = Reference(config(Layout(), "fp64")).stack.eval()
    by_position: dict[int, list[float]] = {}
    with torch.no_grad():
        for ids in documents():
            tokens = torch.tensor(ids)
            logits = stack.logits(stack(tokens, Sequence.of([len(ids)])))
            for position in range(len(ids) - 1):
                by_position.setdefault(position, []).append(float(torch.nn.functional.cross_entropy(logits[position], tokens[position + 1])))
    for buckets in pool(world).run(on_rank, layout):
        assert [b.name for b in buckets] == ["0-127", "128-255", "256-511", "512-599"]
        for b in buckets[:3]:
            losses = [loss for position in range(b.start, b.stop) for loss in by_position.get(position, [])]
            assert b.tokens == len(losses) and b.loss == pytest.approx(sum(losses) / len(losses), rel=1e-10)
        assert buckets[3].tokens == 0 and math.isnan(buckets[3].loss)
        assert mean(buckets) == pytest.approx(sum(map(sum, by_position.values())) / sum(n - 1 for n in LENGTHS), rel=1e-10)


def test_buckets_double_up_to_the_length() -> None:
    assert edges(100) == [0, 100] and edges(128) == [0, 128] and edges(129) == [0, 128, 129]
    assert edges(4096) == [0, 128, 256, 512, 1024, 2048, 4096]


class Held:
    """A corpus with these held-out documents."""

    def __init__(self, *texts: str | None):
        self.texts = texts

    def held_out(self) -> Iterator[Document]:
        return (Document(str(i), text) for i, text in enumerate(self.texts))


def test_the_longest_documents_are_cut_at_the_length() -> None:
    tokenizer = Tokenizer("bytes", 256)
    corpus: Any = Held("ab", None, "c" * 50, "", "d" * 7, "e" * 7)
    assert longest_documents(corpus, tokenizer, 10, 3) == [[99] * 10, [*[100] * 7, 256], [*[101] * 7, 256]]
    assert longest_documents(corpus, tokenizer, 10, 9)[3:] == [[97, 98, 256]]


def test_short_pieces_are_documents_of_their_own() -> None:
    tokenizer = Tokenizer("bytes", 256)
    corpus: Any = Held("abcdefg", None, "hi", "jkl")
    assert short_pieces(corpus, tokenizer, 3, 100) == [[97, 98, 99], [100, 101, 102], [103, 256], [104, 105, 256], [106, 107, 108]]
    assert short_pieces(corpus, tokenizer, 3, 5) == [[97, 98, 99], [100, 101]]
    assert streams([[1] * 3, [2] * 3, [3] * 9, [4]], 6) == [[[1] * 3, [2] * 3], [[3] * 9], [[4]]]
