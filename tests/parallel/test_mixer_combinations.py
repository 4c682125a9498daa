"""Every mixer x number of ranks x layout x documents x type of numbers, against one rank: outputs, the loss and every gradient.

By default all pairs of these are there, in float64 each mixer with each kind of documents, and on up to four ranks each mixer with each layout;
with LTRAIN_TEST_ALL=1 all with all.
"""

import os
import random
from collections.abc import Callable
from itertools import accumulate, combinations, pairwise, product
from typing import Any

import pytest
import torch

from ltrain.config import ParallelConfig
from ltrain.model.layers import LocalLayers
from ltrain.model.sequence import Sequence
from ltrain.parallel.context.layout import KINDS, ContextLayout
from ltrain.parallel.context.scan import LONGEST
from tests.model.mixers.cases import CASES, build
from tests.parallel.mixers import Run, over_ranks, supported, wrong

ALL = os.environ.get("LTRAIN_TEST_ALL") == "1"
HALF = 12  # tokens of a span in zigzag, half of those of a rank: fewer than most windows and blocks
CHUNK = 64  # tokens that recurrences work on at a time
WORLDS = [(size, kind) for size in (2, 3, 4, 8) for kind in KINDS]
TYPES = (torch.float64, torch.float32, torch.bfloat16)


def between(tokens: int, boundaries: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise([0, *boundaries, tokens])]


def edges(by: int) -> Callable[[int], list[int]]:
    """Documents that end so many tokens behind the edges of spans, every third one, so that some lie over several ranks."""
    return lambda size: between(2 * HALF * size, [HALF * n + by for n in range(1, 2 * size, 3)])


def chunks(size: int) -> list[int]:
    """Ranks of two chunks each, and documents that end on and beside edges of chunks inside them; the last one is over several ranks."""
    return between(2 * CHUNK * size, [CHUNK - 1, CHUNK, 2 * CHUNK + 1, 3 * CHUNK] if size > 2 else [CHUNK - 1, CHUNK + 1, 2 * CHUNK + 1])


def tiny(tokens: int) -> list[int]:
    ends = [end for end in accumulate(1 + n * 2 % 5 for n in range(tokens)) if end < tokens]
    return between(tokens, ends)


SHORT = 4  # tokens of a span in which no block of a selection ends

DOCUMENTS: dict[str, Callable[[int], list[int]]] = {
    "one": lambda size: [2 * HALF * size],
    "on the edges": edges(0),
    "one past the edges": edges(1),
    "one before the edges": edges(-1),
    "over three ranks": lambda size: between(2 * HALF * size, [HALF + 5, 2 * HALF * size - HALF + 3]),
    "a rank without labels": lambda size: [2 * HALF * size - 7, 7],
    "on the edges of chunks": chunks,
    "tiny": lambda size: tiny(2 * HALF * size),
    "cut early": lambda size: [SHORT, 2 * SHORT * size - SHORT],
    "cut late": lambda size: [2 * SHORT * size - SHORT, SHORT],
    "empty ones": lambda size: [0, 7, 0, 0, 2 * HALF * size - 7, 0],
    "two long": lambda size: [HALF * size + 1, HALF * size - 1],
}


def run_of(name: str, documents: str, size: int, kind: str, dtype: torch.dtype) -> Run:
    lengths, unlabelled = DOCUMENTS[documents](size), ()
    if documents == "a rank without labels":
        layout = ContextLayout(sum(lengths), 0, size, kind).of(Sequence.of(lengths).cu_seqlens)
        unlabelled = tuple(layout.spans(size // 2))
    return Run(name, tuple(lengths), dtype, unlabelled)


def chosen(world: int) -> list[tuple[str, str, torch.dtype]]:
    """Of the so-manieth of WORLDS the mixers, documents and types: rows of a Latin square, so that a mixer is in each world with other documents.

    Eight ranks on a few cores take seven times as long as two: there a mixer is in one layout, and what it has in the others is on two ranks.
    """
    names, documents = list(CASES), list(DOCUMENTS)
    if ALL:
        return [(name, pattern, dtype) for name in names for pattern in documents for dtype in TYPES]
    found = []
    for i, name in enumerate(names):
        for row, (size, kind) in enumerate(WORLDS):
            few = size == 8 and KINDS.index(kind) != (i + i // 12) % 3
            if WORLDS[world] != (2 if few else size, kind):
                continue
            pattern = documents[(i + row) % len(documents)]
            found.append((name, pattern, TYPES[0]))
            # each mixer once in each other type, in rows and with documents that go round
            found += [(name, pattern, dtype) for n, dtype in enumerate(TYPES[1:], 1) if (5 * i + n + i // 12) % len(WORLDS) == row]
    return found


def test_the_choice_has_all_pairs() -> None:
    rows = [(name, *world, pattern, dtype) for number, world in enumerate(WORLDS) for name, pattern, dtype in chosen(number)]
    for one, other in combinations(range(5), 2):
        have = {(row[one], row[other]) for row in rows}
        assert len(have) == len({row[one] for row in rows}) * len({row[other] for row in rows}), (one, other)
    # no kind of documents lacks a layout on any number of ranks, and no mixer one on up to four
    assert {row[1:4] for row in rows} == {(*world, pattern) for world in WORLDS for pattern in DOCUMENTS}
    assert {row[:3] for row in rows if row[1] < 8} == {(name, *world) for name in CASES for world in WORLDS if world[0] < 8}
    assert {(row[0], row[3]) for row in rows if row[4] == torch.float64} == set(product(CASES, DOCUMENTS))


@pytest.mark.parametrize("number", range(len(WORLDS)), ids=[f"{size}-{kind}" for size, kind in WORLDS])
def test_as_on_one_rank(pool: Any, number: int) -> None:
    size, kind = WORLDS[number]
    parallel = ParallelConfig(context=size, context_layout=kind)
    runs = [run_of(name, pattern, size, kind, dtype) for name, pattern, dtype in chosen(number) if supported(name, parallel)]
    for first in range(0, len(runs), 200):  # a pool waits for an answer so long
        some = runs[first : first + 200]
        off = wrong(some, pool(size).run(over_ranks, some, parallel, timeout=600))
        assert not off, "\n".join(off)


def test_a_document_over_so_many_spans_that_maps_are_composed(pool: Any) -> None:
    parallel = ParallelConfig(context=8, context_layout="zigzag")
    assert 2 * parallel.context - 2 > LONGEST
    recurrent = [name for name in CASES if any(need.kind == "scan" for need in build(name, LocalLayers()).exchanges(2 * SHORT * 8))]
    runs = [Run(name, (2 * SHORT * 8,)) for name in recurrent if supported(name, parallel)]
    assert len(runs) > 20
    off = wrong(runs, pool(8).run(over_ranks, runs, parallel, timeout=240))
    assert not off, "\n".join(off)


THOUSANDS = ["attention-window-sinks-head-gate", "mla", "gated_delta_net", "kda", "lightning", "mamba", "rg_lru", "mlstm", "rwkv7", "gated_conv"]


@pytest.mark.parametrize(("size", "kind"), [(8, "zigzag"), *([(3, "balanced"), (4, "contiguous")] if ALL else [])])
def test_thousands_of_tiny_documents(pool: Any, size: int, kind: str) -> None:
    lengths = (*(1, 1, 2) * 700, 20)  # and one that may lie over the last cut
    parallel = ParallelConfig(context=size, context_layout=kind)
    runs = [Run(name, (*lengths, -sum(lengths) % (2 * size))) for name in (CASES if ALL else THOUSANDS) if supported(name, parallel)]
    off = wrong(runs, pool(size).run(over_ranks, runs, parallel, timeout=600))
    assert not off, "\n".join(off)


def drawn(seed: int, world: int) -> tuple[ParallelConfig, list[Run]]:
    """Any ranks of tensor and context, ways to divide the latter, layout, mixers, documents, and whether it recomputes."""
    rng = random.Random(seed)
    tensor = rng.choice([n for n in (1, 2) if world % n == 0])
    context = world // tensor
    ulysses = rng.choice([n for n in (1, 2) if context % n == 0])
    inner = rng.choice([n for n in (1, 2) if context // ulysses % n == 0])
    parallel = ParallelConfig(tensor=tensor, context=context, ulysses=ulysses, inner_ring=inner, context_layout=rng.choice(KINDS))
    names = [name for name in CASES if supported(name, parallel)]
    runs = []
    for name in rng.sample(names, min(len(names), 10)):
        left = 2 * world * rng.randint(1, 12)
        lengths: list[int] = []
        while left:
            lengths.append(min(left, rng.choice((0, 1, rng.randint(1, 5), rng.randint(1, 200)))))
            left -= lengths[-1]
        start = rng.randint(0, sum(lengths) - 1)
        unlabelled = ((start, rng.randint(start, sum(lengths))),)
        runs.append(Run(name, tuple(lengths), rng.choice(TYPES[:2]), unlabelled, recompute=rng.random() < 0.3))
    return parallel, runs


@pytest.mark.parametrize("seed", range(60 if ALL else 6))
def test_random_combinations(pool: Any, seed: int) -> None:
    world = (2, 3, 4, 8, 4, 8)[seed % 6]
    parallel, runs = drawn(seed, world)
    off = wrong(runs, pool(world).run(over_ranks, runs, parallel, timeout=240))
    assert not off, "\n".join([str(parallel), *off])
