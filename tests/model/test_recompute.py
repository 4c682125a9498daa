"""Recomputation changes no number, keeps less, and runs no expensive kernel twice."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ltrain.kernels import attention, linear_recurrence, recurrence
from ltrain.model.options import MoEOptions
from ltrain.model.recompute import cheap, selective
from ltrain.model.sequence import Sequence, Tape
from ltrain.model.stack import Stack
from tests.model.test_stack import LENGTHS, CountingExchange, stream

Build = Callable[..., Stack]
LARGE = MoEOptions(experts=4, top_k=2, inner=64, shared_inner=64, aux_loss=0.01)


def losses_and_gradients(model: Stack) -> list[Any]:
    """Of two micro-batches whose backwards come in the order of their forwards, as under a pipeline schedule."""
    tokens, labels, _ = stream()
    first, second = Sequence.of(LENGTHS, exchange=CountingExchange()), Sequence.of([len(tokens)], exchange=CountingExchange())
    losses = [model.loss(model(tokens, seq), labels).objective for seq in (first, second)]
    for loss in losses:
        loss.backward()
    for seq in (first, second):
        assert isinstance(seq.exchange, CountingExchange)
        assert (seq.exchange.sums, seq.exchange.sent) == (3, 2)  # each exchange happened once
    loads = torch.stack([router.load for router in model.routers().values()])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [losses, gradients, loads, [seq.metrics["aux_loss"] for seq in (first, second)]]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(build: Build, recompute: str) -> None:
    plain, again = losses_and_gradients(build()), losses_and_gradients(build(recompute=recompute))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


class Storages(TorchDispatchMode):
    """Memory of every tensor that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}  # by address of the storage's own record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                self._made[reference.cdata] = reference, x.untyped_storage().nbytes()
        return result

    def alive(self) -> int:
        """Bytes of it that are still held."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def kept(model: Stack) -> int:
    """Bytes that wait for the backward."""
    tokens, _, _ = stream()
    with Storages() as storages:
        hidden = model(tokens, Sequence.of(LENGTHS))
    assert hidden.requires_grad
    weights = sum(p.untyped_storage().nbytes() for name, p in model.named_parameters() if p.dim() > 1 and name != "embed.weight")
    return storages.alive() - weights  # which appear as views of themselves


def test_how_much_is_kept(build: Build) -> None:
    """Blocks of attention and dense or routed feed-forward: the torch form of the recurrence keeps much inside, whatever is around it."""
    for ffn in (LARGE, MoEOptions(experts=0, inner=64)):
        sizes = {recompute: kept(build(recompute=recompute, pattern=["attention"], ffn=ffn)) for recompute in ("none", "selective", "full")}
        assert sizes["full"] < 0.5 * sizes["selective"], sizes
        assert sizes["selective"] < 0.65 * sizes["none"], sizes
    assert kept(build(recompute="selective")) < 0.9 * kept(build())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_expensive_runs_twice(build: Build, monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[f"{module.__name__}.{name}"] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(attention.flash, "forward_pairs")
    count(attention.blockwise, "forward_pairs")
    count(linear_recurrence.chunked, "linear_recurrence")
    count(F, "linear")  # the experts' products too
    model = build(recompute=recompute)
    tokens, labels, _ = stream()
    seq = Sequence.of(LENGTHS)
    loss = model.loss(model(tokens, seq), labels).objective
    assert len(calls) == 3 and all(calls.values()), calls
    calls.clear()
    loss.backward()
    assert bool(calls) == (recompute == "full"), calls


@pytest.mark.parametrize("pattern", ["linear_recurrence", "mlstm"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_of_a_selective_block_make_theirs_again(build: Build, monkeypatch: pytest.MonkeyPatch, recompute: str, pattern: str) -> None:
    asked: set[bool] = set()

    def spy(*args: Any, **options: Any) -> Any:
        asked.add(options["recompute"])
        return linear_recurrence.linear_recurrence(*args, **options)

    monkeypatch.setattr(recurrence, "linear_recurrence", spy)
    tokens, _, _ = stream()
    build(recompute=recompute, pattern=[pattern])(tokens, Sequence.of(LENGTHS))
    assert asked == {recompute == "selective"}


def test_what_is_made_again_can_be_asked_for_again() -> None:
    """Outputs that others save, through views; one call on another's output; two backwards through one graph."""
    x, w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    runs = 0

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal runs
        runs += 1
        a, b = x.sin().chunk(2, dim=-1)
        return a, b.exp()

    def forward() -> torch.Tensor:
        a, b = cheap(halves, x)
        (c,) = cheap(lambda b: (b.square(),), b)
        return ((a.unflatten(0, (2, 3)) @ w.T).square().sum(0) * c[:3, :1]).sum()

    expected = torch.autograd.grad(forward(), (x, w))
    runs = 0
    with selective():
        loss = forward()
    assert runs == 1
    for i in range(2):
        found = torch.autograd.grad(loss, (x, w), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert runs == 2 + i
    (alone,) = torch.autograd.grad(loss, w)  # a part of the graph
    assert torch.equal(alone, expected[1])


def test_a_recomputed_block_is_replayed_as_often_as_its_graph_is_asked() -> None:
    tape, x, kept = Tape(), torch.randn(3, requires_grad=True), iter((2.0, 3.0))

    def block(x: torch.Tensor) -> torch.Tensor:
        y = x.sin() * tape.keep(lambda: next(kept))
        return y.exp() * tape.keep(lambda: next(kept))

    y = checkpoint(block, x, use_reentrant=False, context_fn=tape.contexts).sum()
    found = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(3)]
    torch.testing.assert_close(found, [6 * (2 * x.sin()).exp() * x.cos()] * 3)


def test_a_function_that_does_not_do_the_same_again_is_noticed() -> None:
    x = torch.randn(3, requires_grad=True)
    times = iter(range(1, 9))

    def more_each_time(x: torch.Tensor) -> torch.Tensor:
        for _ in range(next(times)):
            x = x.sin()
        return x

    with selective():
        y = cheap(more_each_time, x).sum()
    with pytest.raises(AssertionError, match="did not do the same again"):
        y.backward()
