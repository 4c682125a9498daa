"""Attention whose heads are divided over some of the context ranks, alone and between rings, against one rank.

Any three of mixer, ranks, layout and stream of documents meet; with LTRAIN_TEST_ALL=1 all four.
"""

from typing import Any

import pytest
import torch

from tests.parallel.context.streams import Case, error, over_ranks, streams, whole
from tests.parallel.context.test_context_exchange import MIXERS, drawn, of_layout

ATTENTION = [name for name, options in MIXERS.items() if options["op"] in ("attention", "latent")]
WORLDS = [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4)]  # ranks, and those of them that divide 4 heads and 2 K/V heads


@pytest.mark.parametrize("mixer", ATTENTION)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize(("size", "ulysses"), WORLDS[:3])
def test_divided_heads_give_the_output_and_gradients_of_one_rank(pool: Any, size: int, ulysses: int, kind: str, mixer: str) -> None:
    every = {name: Case(lengths=tuple(lengths), **MIXERS[mixer]) for name, lengths in streams(size).items()}
    cases = of_layout(every, kind, ATTENTION.index(mixer) + WORLDS.index((size, ulysses)))
    results = over_ranks(pool, size, kind, list(cases.values()), ulysses)
    errors = {name: error(values, whole(case)) for (name, case), (values, _) in zip(cases.items(), results, strict=True)}
    assert {name: e for name, e in errors.items() if e[0] > 1e-10} == {}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize(("size", "ulysses"), WORLDS)
def test_random_combinations(pool: Any, size: int, ulysses: int, kind: str) -> None:
    cases = [drawn(seed, size) for seed in range(100, 116)]
    results = over_ranks(pool, size, kind, cases, ulysses)
    errors = [(*error(values, whole(case)), case) for case, (values, _) in zip(cases, results, strict=True)]
    assert [e for e in errors if e[0] > 1e-10] == []


@pytest.mark.parametrize("mixer", ["attention", "chunks", "scores and sinks in a window", "latent"])
def test_recomputed(pool: Any, mixer: str) -> None:
    plain, recomputed = ([Case(lengths=(5, 39, 4), recompute=r, **MIXERS[mixer])] for r in (False, True))
    got, want = (over_ranks(pool, 4, "zigzag", cases, 2)[0][0] for cases in (recomputed, plain))
    assert error(got, want)[0] < 1e-13


@pytest.mark.parametrize(("size", "ulysses"), WORLDS)
def test_what_travels(pool: Any, size: int, ulysses: int) -> None:
    n = 12  # tokens of a rank
    ((_, sent),) = over_ranks(pool, size, "contiguous", [Case(op="attention", lengths=(n * size,), dtype=torch.bfloat16)], ulysses)
    shared = max(2, ulysses)  # K/V heads: with more members than there are, some have the same one
    row = (4 * 8 + shared * (8 + 6) + 4 * 6) * 2  # q, k, v and the outputs of one token
    assert [b["ulysses forward"] for b in sent] == [n * row * (ulysses - 1) // ulysses] * size
    assert [b["ulysses"] for b in sent] == [2 * n * row * (ulysses - 1) // ulysses] * size  # and their gradients
    groups, key = size // ulysses, ulysses * n * shared // ulysses * (8 + 6) * 2  # of the heads that a rank has, for its group's tokens
    assert [b.get("ring forward", 0) for b in sent] == [(groups - 1 - r // ulysses) * key for r in range(size)]
