"""What is kept, for how long, and for whom it counts as the same."""

from typing import NamedTuple

import pytest
import torch

from ltrain.kernels.sparse_attention.native import Shape
from ltrain.model.sequence import Sequence
from ltrain.parallel.context.cache import Cache, sound
from ltrain.parallel.context.exchange import PLANS_KEPT, ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.trace import Recorder


class Counted:
    """Makes a value, and says how often it did."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def test_the_one_that_was_not_asked_for_longest_goes() -> None:
    cache: Cache[int] = Cache(2)
    make = Counted()
    assert [cache.get(key, make) for key in ("a", "b", "a", "c", "a", "b")] == [1, 2, 1, 3, 1, 4]  # c drops b, for a was asked for since
    assert len(cache) == 2


def test_nothing_is_kept_of_what_fails() -> None:
    cache: Cache[int] = Cache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0)
    assert len(cache) == 0 and cache.get("a", lambda: 7) == 7


class Pair(NamedTuple):
    a: int
    b: int

    def first(self, n: int) -> int:
        return self.a * n

    def second(self, n: int) -> int:
        return self.b * n


def test_equal_things_have_equal_keys_and_others_have_not() -> None:
    assert sound(Pair(1, 2).first) == sound(Pair(1, 2).first) != sound(Pair(1, 3).first)
    assert sound(Pair(1, 2).first) != sound(Pair(1, 2).second)
    numbers = torch.tensor([0, 3], dtype=torch.int32)
    assert sound(("x", numbers)) == sound(("x", numbers.clone())) != sound(("x", numbers + 1))
    # the same bytes
    assert sound(torch.tensor([0, 3])) != sound(torch.tensor([0, 0, 3, 0], dtype=torch.int32))
    assert sound(torch.zeros(2, dtype=torch.int32)) != sound(torch.zeros(2, dtype=torch.float32))
    assert sound(torch.tensor([[1, 2]])) != sound(torch.tensor([[1], [2]]))
    assert sound(numbers[::2]) == sound(numbers[:1].clone())
    with pytest.raises(ValueError, match="a tensor on meta is no key"):
        sound(torch.zeros(2, device="meta"))
    with pytest.raises(TypeError):
        sound([1])


def stream(*lengths: int) -> Sequence:
    return Sequence.of(list(lengths))


def test_plans_stay_while_they_are_asked_for() -> None:
    exchange = ContextExchange(ContextLayout(1000))
    first = exchange.plan(stream(1000).cu_seqlens)
    for n in range(1, PLANS_KEPT + 20):
        exchange.plan(stream(n, 1000 - n).cu_seqlens)
        assert exchange.plan(stream(1000).cu_seqlens) is first
    dropped = exchange.plan(stream(1, 999).cu_seqlens)
    assert exchange.plan(stream(1, 999).cu_seqlens) is dropped and dropped.cuts == [0, 1, 1000]
    with pytest.raises(ValueError, match="cu_seqlens is on meta: keep it on the CPU"):
        exchange.plan(stream(1000).cu_seqlens.to("meta"))


def test_layers_with_equal_options_share_what_they_gather() -> None:
    recorder = Recorder(1, lambda: 0.0)
    exchange = ContextExchange.recorded(ContextLayout(64, 1, 2), recorder)
    seq = exchange.sequence(stream(64).cu_seqlens, stream(64).positions)
    layers = [Shape(8, 4, 8, 2), Shape(8, 4, 8, 2), Shape(16, 4, 8, 2)]
    one, same, other = (exchange._gather(seq, shape.compressed) for shape in layers)
    assert one is same and other is not one
    assert exchange._gather(seq, int) is exchange._gather(seq, int) is not one
