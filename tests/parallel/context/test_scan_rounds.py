"""Documents over so many spans that maps are composed on the way, against one rank; and how many maps travel."""

from typing import Any

import pytest
import torch

from ltrain.parallel.context.scan import LONGEST
from tests.parallel.context.streams import Case, error, over_ranks, streams, whole
from tests.parallel.context.test_context_exchange import MIXERS, drawn

SIZE = 8
RECURRENCES = [name for name, options in MIXERS.items() if options["op"] in ("linear_recurrence", "generalised", "elementwise", "selective")]


@pytest.mark.parametrize("mixer", RECURRENCES)
def test_fifteen_spans_give_the_output_and_gradients_of_one_rank(pool: Any, mixer: str) -> None:
    assert 2 * SIZE - 2 > LONGEST
    cases = {name: Case(lengths=tuple(lengths), **MIXERS[mixer]) for name, lengths in streams(SIZE).items() if name != "over several chunks"}
    results = over_ranks(pool, SIZE, "zigzag", list(cases.values()))
    errors = {name: error(values, whole(case)) for (name, case), (values, _) in zip(cases.items(), results, strict=True)}
    assert {name: e for name, e in errors.items() if e[0] > 1e-10} == {}


def test_random_combinations(pool: Any) -> None:
    cases = [case for seed in range(300, 330) if (case := drawn(seed, SIZE)).op not in ("attention", "latent")]
    results = over_ranks(pool, SIZE, "zigzag", cases)
    errors = [(*error(values, whole(case)), case) for case, (values, _) in zip(cases, results, strict=True)]
    assert [e for e in errors if e[0] > 1e-10] == []


@pytest.mark.parametrize(("mixer", "state", "matrix"), [("delta and decay near 1", 4 * 8 * 6, 4 * 8 * 8), ("add and constant decay", 4 * 8 * 6, 0)])
def test_a_span_sends_as_many_maps_as_there_are_rounds(pool: Any, mixer: str, state: int, matrix: int) -> None:
    ((_, sent),) = over_ranks(pool, SIZE, "zigzag", [Case(lengths=(12 * SIZE,), dtype=torch.float32, **MIXERS[mixer])])
    owners = [*range(SIZE), *reversed(range(SIZE - 1))]  # the last rank's two spans touch and are one
    expected = [0] * SIZE
    for span, owner in enumerate(owners):
        for reach in (1, 2, 4, 8):  # the last span goes nowhere, and so no map of all of the document is made
            if span + reach < len(owners) - 1 and owners[span + reach] != owner:
                expected[owner] += 4 * (state + (matrix if span >= reach else 0))
        if span + 1 < len(owners) and owners[span + 1] != owner:
            expected[owner] += 4 * state
    assert [b.get("scan forward", 0) for b in sent] == expected
    gathered = sum(4 * (state + (matrix if span else 0)) for span in range(len(owners)) for _ in set(owners[span + 1 :]) - {owners[span]})
    assert sum(expected) < 0.7 * gathered
