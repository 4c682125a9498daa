"""Needle tests on every layout, with answers that are known to be right or wrong by the plain decoding of one device."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ltrain.config import NeedleConfig
from ltrain.evals import needles
from ltrain.evals.generate import generate
from ltrain.evals.needles import Cell, Place, Prompt, Result, wilson
from ltrain.model.sequence import Sequence
from tests.parallel.parity import VOCAB, Layout, Reference, config, prepare

KNOWN = VOCAB // 2  # what the tokenizer has of the vocabulary: the rest is never chosen, but has its part in the loss
LENGTHS, ANSWERS = [40, 3, 61, 18], [5, 2, 7, 5]
LAYOUTS = [(1, Layout()), (4, Layout(tensor=2, context=2)), (2, Layout(pipeline=2)), (2, Layout(expert=2))]


@cache
def oracle() -> tuple[list[Prompt], list[bool], list[float]]:
    """Prompts whose answer is what the model says, or (every second one) that with its last token changed; and the answers' losses."""
    stack = Reference(config(Layout(), "fp64")).stack.eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts, rights, losses = [], [], []
    for i, (ids, said) in enumerate(zip(texts, generate(stack, texts, max(ANSWERS), vocab=KNOWN), strict=True)):
        said = said[: ANSWERS[i]]
        if i % 2:
            said[-1] = (said[-1] + 1) % VOCAB
        tokens = torch.tensor([*ids, *said])
        with torch.no_grad():
            logits = stack.logits(stack(tokens, Sequence.of([len(tokens)])))[len(ids) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(said))))
        prompts.append(Prompt(np.array(ids, dtype=np.int32), np.array(said, dtype=np.int32)))
        rights.append(i % 2 == 0)
    return prompts, rights, losses


def on_rank(layout: Layout, prompts: list[Prompt]) -> list[Result]:
    """The prompts two to a stream over this pool's ranks."""
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
        places = [Place("passkey", 64, n, n) for n in range(len(prompts))]
        work = [places[:2], places[2:3], places[3:]]  # of which two data ranks have two and one
        reads = mesh.replica.rank() == 0
        mine = needles.share(work, mesh.data.rank(), mesh.data.size())
        feed = ([prompts[p.number] for p in group] for group in mine) if reads else None
        seen: list[tuple[int, int]] = []
        results = needles.run(Inference(engine.stage, KNOWN), mesh, work, feed, lambda done, total: seen.append((done, total)))
        assert seen[-1] == (3, 3)
        return results
    finally:
        mesh.close()


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_right_and_wrong_answers_are_told_apart(pool: Any, world: int, layout: Layout) -> None:
    prompts, rights, losses = oracle()
    for results in pool(world).run(on_rank, layout, prompts):
        assert [r.place.number for r in results] == [0, 1, 2, 3]
        assert [r.right for r in results] == rights
        assert [r.loss for r in results] == pytest.approx(losses, rel=1e-10)


def test_wilson_intervals_are_those_of_the_literature() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, samples, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(right, samples) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5) and wilson(0, 0) == (0, 1)


def test_the_grid_has_every_depth_and_streams_are_filled() -> None:
    options = NeedleConfig(tasks=["passkey", "multi_key"], lengths=[512, 2048], depths=3, samples=7)
    work = needles.groups(options, 2048)
    assert [len(group) for group in work] == [4, 3, *[1] * 7] * 2
    places = [place for group in work for place in group]
    assert len(set(places)) == len(places) == 28
    for task in options.tasks:
        for length in options.lengths:
            assert [p.depth for p in places if (p.task, p.length) == (task, length)] == [0, 1, 2, 0, 1, 2, 0]
    shares = [needles.share(work, rank, 4) for rank in range(4)]
    assert {len(share) for share in shares} == {5}
    assert [shares[n % 4][n // 4] for n in range(len(work))] == work


def test_cells_count() -> None:
    place = Place("passkey", 512, 0, 0)
    cell = Cell.of([Result(place, True, 0.5), Result(place, False, 2.5), Result(place, True, 0.0), Result(place, True, 1.0)])
    assert (cell.samples, cell.right, cell.accuracy, cell.loss) == (4, 3, 0.75, 1.0)
    assert np.isnan(Cell.of([]).accuracy)
