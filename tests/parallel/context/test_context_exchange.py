"""Ring, halo and scan over real ranks against one rank.

Any three of mixer, number of ranks, layout and stream of documents meet; with LTRAIN_TEST_ALL=1 all four.
"""

import os
import random
from itertools import combinations, product
from typing import Any

import pytest
import torch

from ltrain.kernels.attention import Mask
from tests.parallel.context.streams import LAYOUTS, SHARED, Case, error, over_ranks, streams, whole

MIXERS = {
    "attention": {"op": "attention"},
    "window": {"op": "attention", "mask": Mask(window=5)},
    "window of one": {"op": "attention", "scored": True, "mask": Mask(window=1)},
    "window longer than a rank": {"op": "attention", "mask": Mask(window=31)},
    "window and anchors": {"op": "attention", "mask": Mask(window=4, anchors=3), "start": 1},
    "many anchors": {"op": "attention", "mask": Mask(window=3, anchors=17)},
    "chunks": {"op": "attention", "mask": Mask(chunk=8), "start": 5},
    "scores and sinks": {"op": "attention", "scored": True},
    "scores and sinks in a window": {"op": "attention", "scored": True, "mask": Mask(window=9, anchors=2)},
    "both ways, scores and sinks": {"op": "attention", "scored": True, "mask": Mask(causal=False)},
    "window both ways and globals": {"op": "attention", "scored": True, "mask": Mask(window=4, causal=False, globals=3), "start": 1},
    "latent": {"op": "latent"},
    "latent in a window": {"op": "latent", "mask": Mask(window=9, anchors=2)},
    "gather": {"op": "gather"},
    "gather a row for three": {"op": "gather thirds"},
    "short convolution": {"op": "short_conv"},
    "delta and decay near 1": {"op": "linear_recurrence"},
    "delta and strong decay": {"op": "linear_recurrence", "strength": 5.0},
    "delta": {"op": "linear_recurrence", "decay": "none"},
    "add and decay near 1": {"op": "linear_recurrence", "update": "add"},
    "add": {"op": "linear_recurrence", "update": "add", "decay": "none"},
    "add and constant decay": {"op": "linear_recurrence", "update": "add", "decay": "constant", "strength": 1e-2},
    "delta and constant decay": {"op": "linear_recurrence", "decay": "constant", "strength": 1e-2},
    "delta and decay by channel": {"op": "linear_recurrence", "decay": "channel"},
    "add and decay by channel": {"op": "linear_recurrence", "update": "add", "decay": "channel"},
    "token shift": {"op": "before"},
    "elementwise": {"op": "elementwise"},
    "selective": {"op": "selective"},
    "selective and strong decay": {"op": "selective", "strength": 3.0},
    "generalised delta": {"op": "generalised", "strength": 1.0},
}
ALL = os.environ.get("LTRAIN_TEST_ALL") == "1"
KINDS = ("contiguous", "zigzag", "balanced")
SIZES = (2, 3, 4)
OTHERS = ("token shift", "gather", "latent", "elementwise", "selective", "generalised delta")


def _cases(size: int, mixer: str, **options: Any) -> dict[str, Case]:
    return {name: Case(lengths=tuple(lengths), **{**MIXERS[mixer], **options}) for name, lengths in streams(size).items()}


def of_layout(cases: dict[str, Case], kind: str, row: int) -> dict[str, Case]:
    """Every third stream, others in each layout: with rows that count mixers and worlds, any three of mixer, world, layout and stream meet."""
    return {name: case for i, (name, case) in enumerate(cases.items()) if ALL or (i + row) % 3 == KINDS.index(kind)}


def test_any_three_meet() -> None:
    met = [
        (mixer, size, kind, stream)
        for (n, mixer), (size, kind) in product(enumerate(MIXERS), LAYOUTS)
        for stream in of_layout(_cases(size, mixer), kind, n + SIZES.index(size))
    ]
    values = list(MIXERS), list(SIZES), list(KINDS), list(streams(2))
    for three in combinations(range(4), 3):
        assert {tuple(row[i] for i in three) for row in met} == set(product(*(values[i] for i in three)))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("size", "kind"), LAYOUTS)
def test_any_layout_gives_the_output_and_gradients_of_one_rank(pool: Any, size: int, kind: str, mixer: str) -> None:
    cases = of_layout(_cases(size, mixer), kind, list(MIXERS).index(mixer) + SIZES.index(size))
    results = over_ranks(pool, size, kind, list(cases.values()))
    errors = {name: error(values, whole(case)) for (name, case), (values, _) in zip(cases.items(), results, strict=True)}
    assert {name: e for name, e in errors.items() if e[0] > 1e-10} == {}


def drawn(seed: int, size: int) -> Case:
    """Any mixer on any documents: many tiny ones, few long ones, empty ones."""
    rng = random.Random(f"{seed} {size}")
    options = dict(MIXERS[rng.choice(list(MIXERS))])
    if options["op"] in ("attention", "latent") and rng.random() < 0.5:
        window, chunk = rng.randint(1, 40), rng.randint(1, 30)
        both = [Mask(causal=False), Mask(window, 0, 0, False, rng.choice((0, rng.randint(1, 9)))), Mask(chunk=chunk, causal=False)]
        options["mask"] = rng.choice([Mask(window=window, anchors=rng.choice((0, rng.randint(1, 9)))), Mask(chunk=chunk), *both])
        options["start"] = rng.choice((0, rng.randint(1, 20)))
    left = 2 * size * rng.randint(1, 20)
    lengths: list[int] = []
    while left:
        lengths.append(min(left, rng.choice((0, 1, rng.randint(1, 5), rng.randint(1, 200)))))
        left -= lengths[-1]
    return Case(lengths=tuple(lengths), recompute=rng.random() < 0.3, **options)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize(("size", "draws"), [(2, 24), (3, 24), (4, 24), (8, 16)])
def test_random_combinations(pool: Any, size: int, kind: str, draws: int) -> None:
    cases = [drawn(seed, size) for seed in range(draws)]
    errors = [(*error(values, whole(case)), case) for case, (values, _) in zip(cases, over_ranks(pool, size, kind, cases), strict=True)]
    assert [e for e in errors if e[0] > 1e-10] == []


@pytest.mark.parametrize("mixer", ["attention", "short convolution", "delta and decay near 1", "add and decay near 1", *OTHERS])
@pytest.mark.parametrize(("size", "kind"), [(3, "zigzag"), (4, "contiguous")])
def test_float32(pool: Any, size: int, kind: str, mixer: str) -> None:
    cases = _cases(size, mixer, dtype=torch.float32)
    results = over_ranks(pool, size, kind, list(cases.values()))
    errors = {name: error(values, whole(case)) for (name, case), (values, _) in zip(cases.items(), results, strict=True)}
    assert {name: e for name, e in errors.items() if e[0] > 1e-5} == {}


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_bfloat16_is_at_most_twice_as_far_from_float64_as_on_one_rank(pool: Any, kind: str) -> None:
    names = [name for name in MIXERS if name != "elementwise"]  # which takes float32 or wider
    cases = [Case(lengths=(5, 85, 6), dtype=torch.bfloat16, **MIXERS[name]) for name in names]
    wrong = []
    for name, case, (values, _) in zip(names, cases, over_ranks(pool, 4, kind, cases), strict=True):
        exact, one = whole(case, torch.float64), whole(case)
        for key, x in exact.items():
            errors = [float((found[key].double() - x).square().mean().sqrt() / x.square().mean().sqrt()) for found in (values, one)]
            # of a parameter's gradient every rank rounds its part
            if not errors[0] <= 2 * errors[1] + (2**-7 if key in SHARED else 1e-6):
                wrong.append((name, key, errors))
    assert wrong == []


@pytest.mark.parametrize("mixer", ["attention", "scores and sinks in a window", "short convolution", "delta and decay near 1", *OTHERS[1:]])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_a_document_changes_nothing_outside_it(pool: Any, kind: str, mixer: str) -> None:
    lengths = (7, 30, 1, 10)
    before, *after = over_ranks(pool, 4, kind, [Case(lengths=lengths, changed=d, **MIXERS[mixer]) for d in (None, 0, 1, 2, 3)])
    start = 0
    for length, (values, _) in zip(lengths, after, strict=True):
        inside = torch.zeros(48, dtype=torch.bool)
        inside[start : start + length] = True
        for name, x in values.items():
            if name not in SHARED:
                assert torch.equal(x[~inside], before[0][name][~inside]), name
        assert not torch.equal(values["out"][inside], before[0]["out"][inside])
        start += length


@pytest.mark.parametrize(
    "mixer", ["attention", "scores and sinks in a window", "short convolution", "delta and decay near 1", "add and decay near 1", *OTHERS]
)
@pytest.mark.parametrize(("size", "kind"), [(2, "zigzag"), (4, "zigzag"), (3, "contiguous")])
def test_recomputation_sends_nothing_again(pool: Any, size: int, kind: str, mixer: str) -> None:
    plain = list(_cases(size, mixer).values())
    recomputed = list(_cases(size, mixer, recompute=True).values())
    for case, (got, bytes_got), (want, bytes_want) in zip(
        plain, over_ranks(pool, size, kind, recomputed), over_ranks(pool, size, kind, plain), strict=True
    ):
        assert bytes_got == bytes_want, case
        assert error(got, want)[0] < 1e-13, case


# Volumes. One document of T tokens over P ranks; n = tokens of a rank; head counts and widths as in streams.Case.


def _bytes(pool: Any, size: int, kind: str, **options: Any) -> list[dict[str, int]]:
    ((_, sent),) = over_ranks(pool, size, kind, [Case(**options)])
    return sent


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_sends_the_keys_that_causal_masks_see(pool: Any, size: int) -> None:
    n, row = 12, 2 * (8 + 6)  # K and V of one token
    contiguous = _bytes(pool, size, "contiguous", op="attention", lengths=(n * size,), dtype=torch.bfloat16)
    # Rank r's keys go to the ranks after it.
    assert [b.get("ring forward", 0) for b in contiguous] == [(size - 1 - r) * n * row * 2 for r in range(size)]
    # Backward: keys again, and for what was read, gradients.
    assert [b["ring"] for b in contiguous] == [(size - 1 - r) * n * row * 2 * 2 + r * n * row * 2 for r in range(size)]
    zigzag = _bytes(pool, size, "zigzag", op="attention", lengths=(n * size,), dtype=torch.bfloat16)
    # Later ranks see the first span only, earlier ones both.
    assert [b.get("ring forward", 0) for b in zigzag] == [((size - 1 - r) * n // 2 + r * n) * row * 2 for r in range(size)]
    assert sum(b["ring forward"] for b in zigzag) <= 0.75 * size * (size - 1) / size * (n * size) * row * 2


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_sends_latents_instead_of_the_keys_and_values_of_all_heads(pool: Any, size: int) -> None:
    n, row = 12, 5 + 2  # of K and V it would be 4 x (8 + 6)
    sent = _bytes(pool, size, "contiguous", op="latent", lengths=(n * size,), dtype=torch.bfloat16)
    assert [b.get("ring forward", 0) for b in sent] == [(size - 1 - r) * n * row * 2 for r in range(size)]
    # Backward: latents again, and for what was read their gradients.
    assert [b["ring"] for b in sent] == [(size - 1 - r) * n * row * 2 * 2 + r * n * row * 2 for r in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_sends_the_keys_that_windows_anchors_and_chunks_leave(pool: Any, size: int) -> None:
    n, row = 12, 2 * (8 + 6) * 8  # K and V of one token in float64

    def forward(kind: str, mask: Mask) -> list[int]:
        sent = _bytes(pool, size, kind, op="attention", lengths=(n * size,), mask=mask)
        assert sum(b.get("ring", 0) for b in sent) == 3 * sum(b.get("ring forward", 0) for b in sent)  # backward: keys again, and their gradients
        return [b.get("ring forward", 0) // row for b in sent]

    # One row less than the window over each cut; a window longer than a rank's part reaches further ranks.
    assert forward("contiguous", Mask(window=5)) == [4] * (size - 1) + [0]
    assert sum(forward("zigzag", Mask(window=5))) == 4 * 2 * (size - 1)
    assert forward("contiguous", Mask(window=n + 5)) == [n + (4 if r < size - 2 else 0) for r in range(size - 1)] + [0]
    # The first rank's anchors go to all.
    assert forward("contiguous", Mask(window=5, anchors=3)) == [(size - 1) * (4 + 3) - (size - 2) * 4] + [4] * (size - 2) + [0]
    # A chunk that ends at the cuts asks for nothing; of one of 8 tokens the next rank has the rest.
    assert forward("contiguous", Mask(chunk=6)) == [0] * size
    assert forward("contiguous", Mask(chunk=8)) == [4 if r < size - 1 and n * (r + 1) % 8 else 0 for r in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_sends_both_ways_the_keys_that_masks_see(pool: Any, size: int) -> None:
    n, row = 12, 2 * (8 + 6) * 8  # K and V of one token in float64

    def forward(kind: str, lengths: tuple[int, ...], mask: Mask) -> list[int]:
        sent = _bytes(pool, size, kind, op="attention", lengths=lengths, mask=mask)
        assert sum(b.get("ring", 0) for b in sent) == 3 * sum(b.get("ring forward", 0) for b in sent)  # backward: keys again, and their gradients
        return [b.get("ring forward", 0) // row for b in sent]

    whole, window = (n * size,), Mask(window=5, causal=False)
    ends = [2 if 0 < r < size - 1 else 1 for r in range(size)]  # cuts that each rank has beside it
    for kind in ("contiguous", "zigzag", "balanced"):
        assert forward(kind, whole, Mask(causal=False)) == [(size - 1) * n] * size
    # A halo on both sides of each cut; what is farther away than another rank's part comes from the one behind it.
    assert forward("contiguous", whole, window) == [4 * cuts for cuts in ends]
    assert sum(forward("zigzag", whole, window)) == 2 * 4 * 2 * (size - 1)
    reached = [sum(n if abs(r - o) == 1 else 4 if abs(r - o) == 2 else 0 for o in range(size) if o != r) for r in range(size)]
    assert forward("contiguous", whole, Mask(window=n + 5, causal=False)) == reached
    # The first rank's globals go to all, and all that others have comes to it.
    wide = [(size - 1) * 3 + 4] + [n + (4 if 1 < r else 0) + (4 if r < size - 1 else 0) for r in range(1, size)]
    assert forward("contiguous", whole, window._replace(globals=3)) == wide
    # Of a chunk that is cut both ranks send what they have.
    assert forward("contiguous", whole, Mask(chunk=6, causal=False)) == [0] * size
    cut = [4 if r < size - 1 and n * (r + 1) % 8 else 0 for r in range(size)]
    assert forward("contiguous", whole, Mask(chunk=8, causal=False)) == [c + before for c, before in zip(cut, [0, *cut], strict=False)]
    # A document that lies on one rank sends nothing, and one over a cut to both sides of it alone.
    assert forward("contiguous", (n - 2, 5, n * size - n - 3), window)[:2] == [2, 3 + (4 if size > 2 else 0)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gather_sends_what_later_ranks_may_choose(pool: Any, size: int) -> None:
    n, row = 12, 5 * 8
    for op, rows in (("gather", n), ("gather thirds", n // 3)):
        sent = _bytes(pool, size, "contiguous", op=op, lengths=(n * size,))
        assert [b.get("gather forward", 0) for b in sent] == [(size - 1 - r) * rows * row for r in range(size)]
        assert [b["gather"] - b.get("gather forward", 0) for b in sent] == [r * rows * row for r in range(size)]  # gradients go back
    # In zigzag a rank's earlier span has what comes before it, and its later span the rest: from each other rank one span, or both.
    sent = _bytes(pool, size, "zigzag", op="gather", lengths=(n * size,))
    assert [b.get("gather forward", 0) for b in sent] == [((size - 1 - r) * n // 2 + r * n) * row for r in range(size)]
    # Of two documents that meet at a cut, neither comes to the other's rank.
    assert [sum(b.values()) for b in _bytes(pool, size, "contiguous", op="gather", lengths=(n,) * size)] == [0] * size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_halo_sends_one_row_less_than_the_width_for_each_cut(pool: Any, size: int) -> None:
    contiguous = _bytes(pool, size, "contiguous", op="short_conv", lengths=(12 * size,), dtype=torch.float32)
    cut = 3 * 5 * 4  # (width - 1) rows of 5 float32 channels
    assert [b.get("halo forward", 0) for b in contiguous] == [cut if r < size - 1 else 0 for r in range(size)]
    assert sum(b["halo"] for b in contiguous) == 2 * (size - 1) * cut
    zigzag = _bytes(pool, size, "zigzag", op="short_conv", lengths=(12 * size,), dtype=torch.float32)
    assert sum(b.get("halo forward", 0) for b in zigzag) == 2 * (size - 1) * cut  # 2P - 2 cuts between ranks
    assert sum(b["halo"] for b in zigzag) == 2 * 2 * (size - 1) * cut


@pytest.mark.parametrize(
    ("mixer", "state", "matrix"),
    [
        ("delta and decay near 1", 4 * 8 * 6, 4 * 8 * 8),
        ("add and decay near 1", 4 * 8 * 6, 4),
        ("add", 4 * 8 * 6, 0),
        ("add and constant decay", 4 * 8 * 6, 0),
        ("delta and constant decay", 4 * 8 * 6, 4 * 8 * 8),
        ("add and decay by channel", 4 * 8 * 6, 4 * 8),
        ("elementwise", 3 * 2, 3 * 2),
        ("selective", 6 * 4, 6 * 4),
        ("generalised delta", 3 * 8 * 6, 3 * 8 * 8),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_scan_sends_a_state_and_the_smallest_map(pool: Any, size: int, mixer: str, state: int, matrix: int) -> None:
    sent = _bytes(pool, size, "contiguous", lengths=(12 * size,), dtype=torch.float32, **MIXERS[mixer])
    # Rank r's map goes to each later rank; the first has no M, as its document starts there.
    forward = [(size - 1 - r) * 4 * (state + (matrix if r else 0)) for r in range(size)]
    assert [b.get("scan forward", 0) for b in sent] == forward
    assert [b["scan"] - b.get("scan forward", 0) for b in sent] == forward[::-1]  # the same towards the earlier ones


@pytest.mark.parametrize("mixer", ["attention", "both ways, scores and sinks", "short convolution", "delta and decay near 1", *OTHERS])
@pytest.mark.parametrize(("kind", "lengths"), [("contiguous", (12,) * 4), ("zigzag", (6,) * 8), ("contiguous", (3, 9) * 4)])
def test_documents_that_end_at_the_cuts_send_nothing(pool: Any, kind: str, lengths: tuple[int, ...], mixer: str) -> None:
    assert [sum(b.values()) for b in _bytes(pool, 4, kind, lengths=lengths, **MIXERS[mixer])] == [0] * 4


def test_ranks_that_share_no_document_do_not_speak(pool: Any) -> None:
    sent = _bytes(pool, 4, "contiguous", op="attention", lengths=(20, 4, 24))  # ranks 0 and 1, then 2 and 3
    assert [b.get("ring forward", 0) for b in sent] == [12 * 2 * 14 * 8, 0, 12 * 2 * 14 * 8, 0]
