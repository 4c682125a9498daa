"""Spans, segments and plans, on the host."""

import pytest
import torch

from ltrain.model.sequence import Sequence
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from tests.parallel.context.streams import LAYOUTS, streams


@pytest.mark.parametrize(("size", "kind"), LAYOUTS)
def test_spans_cover_the_stream_once_and_equally(size: int, kind: str) -> None:
    layouts = [ContextLayout(24 * size, rank, size, kind) for rank in range(size)]
    x = torch.arange(24 * size)
    assert torch.equal(torch.cat([layout.take(x) for layout in layouts]).sort().values, x)
    assert {len(layout.take(x)) for layout in layouts} == {24}


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
            layout = ContextLayout(sum(lengths), rank, size, kind)
            cu, segments = layout.local_segments(seq.cu_seqlens)
            assert cu.dtype == torch.int32 and cu.tolist() == [0, *(s.rows[1] for s in segments)], name
            held = torch.arange(layout.tokens)
            assert [t for s in segments for t in range(s.start, s.stop)] == layout.take(held).tolist(), name
            for s in segments:
                assert set(document[s.start : s.stop].tolist()) == {s.document}, name
                assert s.incoming == (int(seq.positions[s.start]) > 0), name
                assert s.outgoing == (s.stop < layout.tokens and int(document[s.stop]) == s.document), name


def test_one_rank_holds_the_stream() -> None:
    for kind in ("zigzag", "contiguous"):
        layout = ContextLayout(7, 0, 1, kind)
        assert layout.spans() == [(0, 7)]
        assert layout.local_segments(torch.tensor([0, 3, 7], dtype=torch.int32))[0].tolist() == [0, 3, 7]


def test_a_plan_is_made_once_for_a_micro_batch() -> None:
    exchange = ContextExchange(ContextLayout(8))
    assert exchange.plan(torch.tensor([0, 8], dtype=torch.int32)) is exchange.plan(torch.tensor([0, 8], dtype=torch.int32))
    assert exchange.plan(torch.tensor([0, 3, 8], dtype=torch.int32)).cuts == [0, 3, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 0, 4, "contiguous"), "multiple of 4"),
        ((12, 0, 4, "zigzag"), "multiple of 8"),
        ((16, 0, 2, "striped"), "zigzag or contiguous"),
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
