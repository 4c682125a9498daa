"""Spans, segments and plans, on the host."""

import random
import time

import pytest
import torch

from ltrain.model.sequence import Sequence
from ltrain.parallel.context.balance import CAUSAL, FLAT, Cost, balance
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.gather import gather
from ltrain.parallel.context.layout import KINDS, ContextLayout
from ltrain.parallel.context.rows import Piece
from ltrain.plan.context_parallel import lengths as documents_of
from tests.parallel.context.streams import LAYOUTS, streams


@pytest.mark.parametrize(("size", "kind"), LAYOUTS)
def test_spans_cover_the_stream_once_and_equally(size: int, kind: str) -> None:
    for lengths in streams(size).values():
        x, cu = torch.arange(sum(lengths)), Sequence.of(lengths).cu_seqlens
        layouts = [ContextLayout(len(x), rank, size, kind).of(cu) for rank in range(size)]
        assert torch.equal(torch.cat([layout.take(x) for layout in layouts]).sort().values, x)
        assert {len(layout.take(x)) for layout in layouts} == {len(x) // size}


def test_zigzag_pairs_an_early_with_a_late_part() -> None:
    layout = ContextLayout(48, 1, 4, "zigzag")
    assert [layout.spans(rank) for rank in range(4)] == [[(0, 6), (42, 48)], [(6, 12), (36, 42)], [(12, 18), (30, 36)], [(18, 30)]]
    assert layout.take(torch.arange(48)).tolist() == [*range(6, 12), *range(36, 42)]


@pytest.mark.parametrize(("size", "kind"), LAYOUTS)
def test_segments_are_documents_cut_at_spans(size: int, kind: str) -> None:
    for name, lengths in streams(size).items():
        seq = Sequence.of(lengths)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        for rank in range(size):
            layout = ContextLayout(sum(lengths), rank, size, kind).of(seq.cu_seqlens)
            cu, segments = layout.local_segments(seq.cu_seqlens)
            assert cu.dtype == torch.int32 and cu.tolist() == [0, *(s.rows[1] for s in segments)], name
            held = torch.arange(layout.tokens)
            assert [t for s in segments for t in range(s.start, s.stop)] == layout.take(held).tolist(), name
            for s in segments:
                assert set(document[s.start : s.stop].tolist()) == {s.document}, name
                assert s.incoming == (int(seq.positions[s.start]) > 0), name
                assert s.outgoing == (s.stop < layout.tokens and int(document[s.stop]) == s.document), name


def test_one_rank_holds_the_stream() -> None:
    for kind in KINDS:
        layout = ContextLayout(7, 0, 1, kind)
        assert layout.spans() == [(0, 7)]
        assert layout.local_segments(torch.tensor([0, 3, 7], dtype=torch.int32))[0].tolist() == [0, 3, 7]


def test_whole_documents_in_a_row_are_one_piece_of_what_is_gathered() -> None:
    # rank 1 of 2: the rest of a document, a hundred whole ones with empty ones between, and the beginning of the last
    cu = Sequence.of([320, *[3, 0] * 100, 20]).cu_seqlens
    found = gather(ContextLayout(640, 1, 2, "contiguous").plan(cu))
    assert found.rows.local == [Piece(0, 0, 320)] and len(found.parts) == 101 and found.rows.total == 320
    cut = gather(ContextLayout(640, 1, 2, "contiguous").plan(Sequence.of([330, *[3, 0] * 100, 10]).cu_seqlens))
    assert cut.rows.local == [Piece(320, 0, 320)] and cut.rows.read == {0: [Piece(0, 0, 320)]}


def test_a_plan_is_made_once_for_a_micro_batch() -> None:
    exchange = ContextExchange(ContextLayout(8))
    assert exchange.plan(torch.tensor([0, 8], dtype=torch.int32)) is exchange.plan(torch.tensor([0, 8], dtype=torch.int32))
    assert exchange.plan(torch.tensor([0, 3, 8], dtype=torch.int32)).cuts == [0, 3, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 0, 4, "contiguous"), "multiple of 4"),
        ((12, 0, 4, "zigzag"), "multiple of 8"),
        ((16, 0, 2, "striped"), "zigzag, contiguous or balanced"),
        ((16, 2, 2, "zigzag"), "from 0 to 1"),
    ],
)
def test_layouts_that_cannot_be(arguments: tuple[int, int, int, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ContextLayout(*arguments)


@pytest.mark.parametrize("cuts", [[0, 4], [1, 8], [0, 5, 4, 8], []])
def test_boundaries_of_another_stream_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="rise from 0 to 8"):
        ContextLayout(8).plan(torch.tensor(cuts, dtype=torch.int32))


def test_a_stream_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="whole micro-batch"):
        ContextLayout(8).take(torch.zeros(9))
    with pytest.raises(ValueError, match="holds 8"):
        exchange = ContextExchange(ContextLayout(8))
        exchange.short_conv(torch.zeros(9, 2), torch.zeros(2, 4), exchange.sequence(torch.tensor([0, 8], dtype=torch.int32), torch.arange(8)))


def _cu(lengths: list[int]) -> torch.Tensor:
    return Sequence.of(lengths).cu_seqlens


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("stream", ["one", "long", "short"])
def test_a_balanced_layout_has_less_to_wait_for_and_less_to_send(size: int, stream: str) -> None:
    cu = _cu(documents_of(stream, 131072))
    found = {kind: ContextLayout(131072, 0, size, kind).imbalance(cu) for kind in KINDS}
    assert found["balanced"] <= min(found.values()) + 0.03, found
    assert found["balanced"] < 0.05, found
    balanced = balance(tuple(cu.tolist()), size, CAUSAL)
    if stream == "one":
        assert found["zigzag"] == pytest.approx(0, abs=1e-6) and balanced.rows == 131072 * (3 * size - 2) // 4 - 131072 // 4 * size // size
    if stream == "short":  # most documents are whole
        assert balanced.rows < 131072 * size / 20, balanced.rows


def test_documents_that_fit_stay_whole() -> None:
    found = balance((0, 5, 10, 15, 20), 2, CAUSAL)
    assert found.rows == 0 and found.work == (30.0, 30.0) and found.imbalance == 0
    assert sorted(span for spans in found.spans for span in spans) == [(0, 5), (5, 10), (10, 15), (15, 20)] or len(found.spans[0]) == 1


def test_thousands_of_documents_are_laid_out_while_a_step_runs() -> None:
    rng = random.Random(0)
    cuts = (0, *sorted(rng.sample(range(1, 1 << 20), 7000)), 1 << 20)
    started = time.monotonic()
    found = balance(cuts, 8, CAUSAL)
    assert time.monotonic() - started < 20  # 2 seconds of one core; in a time that grows with the square of the documents, a minute
    assert found.imbalance < 0.01


def test_work_is_what_the_cost_says() -> None:
    assert [CAUSAL.between(a, b) for a, b in ((0, 1), (0, 4), (2, 4))] == [1, 10, 7]
    window = Cost.of(lambda n: float(sum(min(i + 1, 8) for i in range(n))), 4096)
    assert window.until(4096) == pytest.approx(8 * 4096 - 28) and window.between(1000, 1010) == pytest.approx(80, rel=0.02)
    # Where every token costs the same, nothing is worth an exchange that equal tokens do not need.
    assert balance((0, 6000, 6400, 12800), 2, FLAT).rows == 0
    uneven = balance((0, 6000, 6400, 12800), 2, CAUSAL)
    assert uneven.rows > 0 and uneven.imbalance < 0.02  # whole documents would leave one rank 6% more than the other


def test_all_ranks_find_the_same_layout_for_any_documents() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        size = 2 + seed % 7
        lengths = torch.randint(0, 400, (1 + seed % 13,), generator=generator).tolist()
        lengths.append(-sum(lengths) % size + size)
        cu = _cu(lengths)
        layouts = [ContextLayout(sum(lengths), rank, size, "balanced").of(cu) for rank in range(size)]
        x = torch.arange(sum(lengths))
        assert torch.equal(torch.cat([layout.take(x) for layout in layouts]).sort().values, x)
        assert {len(layout.take(x)) for layout in layouts} == {len(x) // size}
        assert len({layout.chosen for layout in layouts}) == 1
