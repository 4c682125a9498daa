"""What a rank has of others at one time: of keys and values those of two steps, however many ranks there are, and of maps those that it folds."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ltrain.kernels.attention import Mask
from ltrain.model.layers import LocalLayers
from ltrain.model.sequence import Sequence
from ltrain.parallel.context import ring, wire
from ltrain.parallel.context.messages import Messages, Transit
from tests.model.mixers.cases import HIDDEN, build
from tests.parallel.context.streams import Case, on_rank
from tests.parallel.context.test_context_exchange import MIXERS

N = 12  # tokens of a rank
KEY, LATENT = 2 * (8 + 6) * 8, (5 + 2) * 8  # bytes of a token's keys and values, and of its latent, in float64
EXPANDED = (4 * 8 + 48) * 8  # and of what a latent becomes: keys of all heads, and the product that values are a part of


@contextmanager
def peaks() -> Iterator[Counter[str]]:
    """The most bytes at one time that have arrived or have room to, forward of a ring and in all, and of what was made of them forward."""
    alive: dict[str, list[tuple[StorageWeakRef, int]]] = {"arrived": [], "made": []}
    found = Counter[str]()
    post, call, backward = Messages.post, ring.Expansion.__call__, ring._backward

    def note(which: str, tensors: list[torch.Tensor]) -> None:
        new = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.numel()}
        alive[which] = [(ref, size) for ref, size in alive[which] if not ref.expired()]
        alive[which] += [(StorageWeakRef(storage), storage.nbytes()) for storage in new.values()]
        found[which] = max(found[which], sum(size for _, size in alive[which]))

    def posted(self: Messages, *args: Any, **kwargs: Any) -> Transit:
        transit = post(self, *args, **kwargs)
        note("arrived", list(transit._arriving.values()))
        return transit

    def expanded(self: ring.Expansion, arrived: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = call(self, arrived)
        note("made", [k, v] if self.expand is not None or self.of is not None else [])
        return k, v

    def reversed_(*args: Any) -> Any:
        found["forward"] = found["arrived"]
        return backward(*args)

    with patch.object(Messages, "post", posted), patch.object(ring.Expansion, "__call__", expanded), patch.object(ring, "_backward", reversed_):
        yield found


def most(kind: str, case: Case, inner_ring: int, members: int, fp8: bool) -> dict[str, int]:
    """On a rank of a pool."""
    with peaks() as found:
        on_rank(kind, [case], members, inner_ring, fp8)
    return dict(found)


def measured(pool: Any, size: int, kind: str, inner_ring: int = 1, members: int = 1, fp8: bool = False, **options: Any) -> dict[str, int]:
    """Of the rank that has most."""
    ranks = pool(size).run(most, kind, Case(lengths=(N * size,), **options), inner_ring, members, fp8)
    return {name: max(rank.get(name, 0) for rank in ranks) for name in ("forward", "arrived", "made")}


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_ring_has_the_keys_of_two_steps(pool: Any, size: int) -> None:
    for kind in ("contiguous", "zigzag"):
        found = measured(pool, size, kind, op="attention")
        assert found["forward"] == min(size - 1, 2) * N * KEY, kind
        assert found["arrived"] <= (1 + 2) * N * KEY, kind  # backward: the next step's keys, and gradients of two steps on their way home
    assert measured(pool, size, "contiguous", op="attention", mask=Mask(window=5))["forward"] == 4 * KEY


@pytest.mark.parametrize("size", [2, 4, 8])
def test_latents_become_the_keys_of_one_step_at_a_time(pool: Any, size: int) -> None:
    found = measured(pool, size, "contiguous", op="latent")
    assert found["forward"] == min(size - 1, 2) * N * LATENT and found["arrived"] <= (1 + 2) * N * LATENT
    assert found["made"] == N * EXPANDED


@pytest.mark.parametrize(("size", "inside"), [(4, 2), (8, 2), (8, 4)])
def test_a_double_ring_has_besides_what_its_node_reads_of_two_others(pool: Any, size: int, inside: int) -> None:
    found = measured(pool, size, "contiguous", inside, op="attention")
    assert found["forward"] <= (2 + min(size // inside - 1, 2)) * N * KEY


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_halo_and_a_scan_have_what_they_fold(pool: Any, size: int) -> None:
    assert measured(pool, size, "contiguous", op="short_conv")["arrived"] == 3 * 5 * 8  # one row less than the width, of 5 channels
    for mixer, state, matrix in (("delta and decay near 1", 4 * 8 * 6, 4 * 8 * 8), ("add and decay by channel", 4 * 8 * 6, 4 * 8)):
        # the maps of all ranks before it: the first one's document starts there
        assert measured(pool, size, "contiguous", **MIXERS[mixer])["arrived"] == ((size - 1) * state + (size - 2) * matrix) * 8


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_gather_has_what_may_be_chosen_once(pool: Any, size: int) -> None:
    for op, rows in (("gather", N), ("gather thirds", N // 3)):
        # on the last rank the rows of all before it; on the first, backward, their gradients from as many ranks
        assert measured(pool, size, "contiguous", op=op)["arrived"] == (size - 1) * rows * 5 * 8


@pytest.mark.parametrize(("size", "members"), [(2, 2), (8, 2), (8, 4)])
def test_divided_heads_have_those_of_a_group(pool: Any, size: int, members: int) -> None:
    """What arrives is of this rank's heads alone, and the ring between groups has the keys of two steps, of these heads."""
    found = measured(pool, size, "contiguous", members=members, op="attention")
    groups, kv_heads = size // members, max(2 // members, 1)
    key = kv_heads * (8 + 6) * 8
    swapped = (members - 1) * N * (4 // members * 8 * 8 + key)  # q, k and v of the other members' tokens, more than their outputs
    # nothing of a swap is there in the ring, whose steps of gradients are of the same size, nor of one swap in the next
    assert found["arrived"] == max(swapped, min(groups - 1, 2) * members * N * key)
    assert found["forward"] == (found["arrived"] if groups > 1 else 0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_in_fp8_rows_are_there_as_they_came_and_of_one_step_as_they_were(pool: Any, size: int) -> None:
    for op, numbers, row, made in (("attention", KEY // 8, KEY, KEY), ("latent", LATENT // 8, LATENT, EXPANDED)):
        found, packed = measured(pool, size, "contiguous", fp8=True, op=op), N * wire.width(numbers)
        assert found["forward"] == min(size - 1, 2) * packed and found["made"] == N * made, op
        assert found["arrived"] <= packed + 2 * N * row, op  # backward as above; gradients are not in FP8
    ranks = pool(size).run(most, "contiguous", Case(lengths=(N * size,), op="gather"), 1, 1, True)
    assert ranks[-1]["arrived"] == (size - 1) * N * wire.width(5)  # no gradients come to the last rank


def sparse(kind: str) -> tuple[dict[str, int], int]:
    """On a rank of a pool: what a forward and a backward of NSA has at one time, and bytes of a token's keys and values in one branch."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout

    mixer = build("nsa", LocalLayers(std=0.3, dtype=torch.float64))
    size, group = dist.get_world_size(), dist.group.WORLD
    exchange, whole = ContextExchange(ContextLayout(N * size, dist.get_rank(), size, kind), group, group), Sequence.of([N * size])
    with peaks() as found:
        y = mixer(torch.ones(N, HIDDEN, dtype=torch.float64).requires_grad_(), exchange.sequence(whole.cu_seqlens, whole.positions))
        y.sum().backward()
    return dict(found), mixer.exchanges(N * size)[0].width * 8


@pytest.mark.parametrize("size", [2, 4, 8])
def test_nsa_has_what_arrived_for_one_branch_at_a_time(pool: Any, size: int) -> None:
    ranks = pool(size).run(sparse, "contiguous")
    # what may be selected, or its gradients: the rows of halos, the compressed blocks and the window's keys are gone by then, or not there yet
    assert [found["arrived"] for found, _ in ranks] == [max(rank, size - 1 - rank) * N * ranks[0][1] for rank in range(size)]


def test_composed_maps_are_those_of_one_round(pool: Any) -> None:
    """Where a document crosses 15 spans: a span has the map of one other at a time, and not of all before it."""
    found = measured(pool, 8, "zigzag", **MIXERS["delta and decay near 1"])
    assert found["arrived"] <= 2 * 2 * (4 * 8 * 6 + 4 * 8 * 8) * 8
