"""A ring inside a node and one across nodes, against one rank; and what crosses between the nodes."""

from typing import Any

import pytest
import torch

from ltrain.kernels.attention import Mask
from tests.parallel.context.streams import Case, error, over_ranks, streams, whole
from tests.parallel.context.test_context_exchange import MIXERS, drawn

ATTENTION = [name for name, options in MIXERS.items() if options["op"] in ("attention", "latent")]
WORLDS = [(4, 1, 2), (8, 1, 2), (8, 1, 4), (8, 2, 2)]  # ranks, those that divide heads, and those of a node among the ring's


@pytest.mark.parametrize("mixer", ATTENTION)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
def test_a_double_ring_gives_the_output_and_gradients_of_one_rank(pool: Any, kind: str, mixer: str) -> None:
    cases = {name: Case(lengths=tuple(lengths), **MIXERS[mixer]) for name, lengths in streams(4).items()}
    results = over_ranks(pool, 4, kind, list(cases.values()), 1, 2)
    errors = {name: error(values, whole(case)) for (name, case), (values, _) in zip(cases.items(), results, strict=True)}
    assert {name: e for name, e in errors.items() if e[0] > 1e-10} == {}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize(("size", "ulysses", "inner_ring"), WORLDS)
def test_random_combinations(pool: Any, size: int, ulysses: int, inner_ring: int, kind: str) -> None:
    cases = [drawn(seed, size) for seed in range(200, 216)]
    results = over_ranks(pool, size, kind, cases, ulysses, inner_ring)
    errors = [(*error(values, whole(case)), case) for case, (values, _) in zip(cases, results, strict=True)]
    assert [e for e in errors if e[0] > 1e-10] == []


@pytest.mark.parametrize("mixer", ["attention", "chunks", "latent"])
def test_recomputed_without_a_second_exchange(pool: Any, mixer: str) -> None:
    plain, recomputed = ([Case(lengths=(5, 39, 4), recompute=r, **MIXERS[mixer])] for r in (False, True))
    (want, sent), (got, again) = (over_ranks(pool, 4, "zigzag", cases, 1, 2)[0] for cases in (plain, recomputed))
    assert error(got, want)[0] < 1e-13 and again == sent


KEY = 2 * (8 + 6)  # numbers of one token's key and value heads


@pytest.mark.parametrize(("size", "inside"), [(4, 2), (8, 2), (8, 4)])
def test_rows_cross_between_nodes_once(pool: Any, size: int, inside: int) -> None:
    """One document, in one span for each rank: all later nodes read all rows, and in a node all later ranks."""
    n = 6
    case = Case(op="attention", lengths=(n * size,), dtype=torch.bfloat16)
    (_, flat), (_, double) = (over_ranks(pool, size, "contiguous", [case], 1, inner)[0] for inner in (1, inside))
    rows, nodes = n * KEY, size // inside
    for rank, (one, two) in enumerate(zip(flat, double, strict=True)):
        node, place = divmod(rank, inside)
        later = nodes - 1 - node
        assert one["ring forward"] == 2 * rows * (size - 1 - rank) and "ring across nodes" not in one
        assert two.get("ring across nodes forward", 0) == 2 * rows * later
        # to later places of its node its own rows, and to all places what it holds of earlier nodes
        assert two.get("ring forward", 0) == 2 * rows * (inside - 1 - place + node * (inside - 1))
        # backward the keys again; of gradients those of rows that came
        assert two.get("ring across nodes", 0) == 2 * rows * 2 * later + 2 * rows * node
    assert sum(b.get("ring across nodes forward", 0) for b in double) * inside == sum(
        2 * rows * (size - (rank // inside + 1) * inside) for rank in range(size)
    )


def test_rows_that_no_rank_of_a_node_sees_stay_outside(pool: Any) -> None:
    window = Case(op="attention", lengths=(48,), mask=Mask(window=5))
    ((_, sent),) = over_ranks(pool, 4, "contiguous", [window], 1, 2)
    assert [b.get("ring across nodes forward", 0) for b in sent] == [0, 4 * KEY * 8, 0, 0]  # the rows before the cut between the nodes
    documents = Case(op="attention", lengths=(24, 24))
    ((_, sent),) = over_ranks(pool, 4, "contiguous", [documents], 1, 2)
    assert [b.get("ring across nodes", 0) for b in sent] == [0] * 4 and sum(b["ring"] for b in sent) > 0
