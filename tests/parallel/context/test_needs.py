"""What every mixer says that it asks of other ranks, against the bytes that a real forward sends."""

from collections import Counter
from typing import Any

import pytest
import torch

from ltrain.config import ParallelConfig
from ltrain.kernels.attention import Mask
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.model.sequence import Sequence
from ltrain.parallel.context.halo import halo
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.needs import sent_bytes
from ltrain.parallel.context.scan import Composed, scan
from tests.model.mixers.cases import CASES, HIDDEN, build
from tests.parallel.mixers import supported

# documents over several cuts, one shorter than any selection, and one alone over all ranks
STREAMS = [[1, 37, 2, 40, 16], [96], [4, 4, 8] * 6, [15, 49, 32]]


def mixers(dtype: torch.dtype) -> dict[str, Any]:
    names = [name for name in CASES if supported(name, ParallelConfig(context=2))]
    return {name: build(name, LocalLayers(std=0.3, depth=len(CASES[name]), dtype=dtype)) for name in names}


def forwards(kind: str, dtype: torch.dtype) -> dict[tuple[str, int], dict[str, int]]:
    """On every rank of a pool: bytes sent in a forward, by mixer and stream, and kind of exchange."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    exchange = ContextExchange(ContextLayout(96, rank, size, kind), group, group)
    found = {}
    for name, mixer in mixers(dtype).items():
        for number, lengths in enumerate(STREAMS):
            whole = Sequence.of(lengths)
            exchange.bytes.clear()
            mixer(torch.ones(96 // size, HIDDEN, dtype=dtype).requires_grad_(), exchange.sequence(whole.cu_seqlens, whole.positions))
            found[name, number] = {what: n for what, n in exchange.bytes.items() if n}
    return found


@pytest.mark.parametrize(
    ("size", "kind", "dtype"),
    [(2, "zigzag", torch.float32), (2, "contiguous", torch.bfloat16), (4, "zigzag", torch.float32), (4, "balanced", torch.float64)],
)
def test_every_mixer_sends_what_it_says_it_asks_for(pool: Any, size: int, kind: str, dtype: torch.dtype) -> None:
    ranks = pool(size).run(forwards, kind, dtype, timeout=240)
    wrong, kinds = [], Counter[str]()
    for name, mixer in mixers(dtype).items():
        for number, lengths in enumerate(STREAMS):
            counted = sum((Counter(rank[name, number]) for rank in ranks), Counter[str]())
            layout = ContextLayout(96, 0, size, kind).of(Sequence.of(lengths).cu_seqlens)
            expected = Counter[str]()
            for need in mixer.exchanges(max(lengths)):
                expected[need.kind] += sent_bytes(need, layout, lengths, dtype.itemsize)
            kinds += expected
            if +expected != counted:
                wrong.append((name, lengths, dict(counted), dict(+expected)))
    assert not wrong, wrong
    assert kinds.keys() == {"ring", "halo", "gather", "scan"}


def test_rows_are_those_that_a_rank_lacks() -> None:
    def rows(need: ExchangeNeed, documents: list[int], size: int = 2, kind: str = "contiguous") -> int:
        return sent_bytes(need, ContextLayout(sum(documents), 0, size, kind), documents, 1)

    ring = ExchangeNeed("ring", 1)
    assert rows(ring, [40]) == 20 and rows(ring, [20, 20]) == 0 and rows(ring, [15, 25]) == 5 and rows(ring, [40], kind="zigzag") == 10 + 20
    assert rows(ExchangeNeed("ring", 1, Mask(window=4)), [40]) == 3 and rows(ExchangeNeed("ring", 1, Mask(window=4)), [19, 21]) == 1
    assert (
        rows(ExchangeNeed("ring", 1, Mask(window=4, anchors=2)), [40]) == 5
        and rows(ExchangeNeed("ring", 1, Mask(window=4, anchors=2)), [17, 23]) == 3
    )
    assert rows(ExchangeNeed("ring", 1, Mask(chunk=16)), [40]) == 4 and rows(ExchangeNeed("ring", 1, Mask(chunk=10)), [40]) == 0
    both = ExchangeNeed("ring", 1, Mask(window=4, causal=False))
    assert rows(ExchangeNeed("ring", 1, Mask(causal=False)), [40]) == 40 and rows(both, [40]) == 3 + 3 and rows(both, [19, 21]) == 1 + 3
    assert rows(ExchangeNeed("ring", 1, Mask(window=4, causal=False, globals=2)), [40]) == 20 + 3 + 2
    assert rows(ExchangeNeed("ring", 1, Mask(chunk=16, causal=False)), [40]) == 4 + 12
    assert rows(ExchangeNeed("gather", 3, units=lambda n: n // 8), [40]) == 3 * 2
    assert rows(ExchangeNeed("halo", 1, reach=3), [40]) == 3
    # windows of two spans of a rank reach over the same rows: each gets its own, as in the plan that does it
    wide = rows(ExchangeNeed("halo", 1, reach=20), [40], 4, "zigzag")
    plans = [halo(ContextLayout(40, rank, 4).plan(Sequence.of([40]).cu_seqlens), 20) for rank in range(4)]
    assert wide == 5 + 10 + 15 + (20 - 5) + 20 + 20 == sum(p.stop - p.start for plan in plans for pieces in plan.read.values() for p in pieces)


def test_what_a_scan_sends_between_nodes() -> None:
    """Of what the plans' rounds send, the maps that leave a node of 2; and the numbers of docs/context-parallelism.md."""
    need, whole = ExchangeNeed("scan", 3, map=5), Sequence.of([96])
    crossing = 0
    for rank in range(8):
        traffic = scan(ContextLayout(96, rank, 8, "zigzag").plan(whole.cu_seqlens)).forward
        assert isinstance(traffic, Composed)
        sent = [(to, met) for each in (*traffic.rounds, traffic.last) for to, met in each.sent.items() if to // 2 != rank // 2]
        crossing += sum(4 * (3 + 5 * (tokens > 0)) for _, met in sent for *_, tokens in met)
    assert sent_bytes(need, ContextLayout(96, 0, 8, "zigzag"), [96], 4, 2) == crossing > 0
    layer, found = ExchangeNeed("scan", 16 * 128 * 128, map=16 * 128 * 128), []
    for size in (64, 512):
        for kind in ("contiguous", "zigzag"):
            layout = ContextLayout(2**20, 0, size, kind)
            found.append([sent_bytes(layer, layout, [2**20], 2, inside) // 2**20 for inside in (1, 8)])
    assert found == [[631, 316], [1500, 841], [8177, 5566], [18378, 13127]]
    assert sent_bytes(ExchangeNeed("ring", 1), ContextLayout(40, 0, 4, "contiguous"), [40], 1, 2) == 20 + 20  # two ranks of the second node
