"""Linear cross entropy of every backend against the plain formula in float64."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ltrain.kernels.cross_entropy import chunked, fused, linear_cross_entropy, linear_cross_entropy_sum
from tests.kernels.linear_heads import FORMS, VOCAB, inputs, objective

BACKENDS = ["reference", "chunked", "fused", "auto"]


def plain(x, weight, labels):
    logits = x @ weight.T
    return F.cross_entropy(logits, labels, reduction="none"), torch.where(labels >= 0, logits.logsumexp(-1), 0.0)


def set_rows(monkeypatch: pytest.MonkeyPatch, rows: int, itemsize: int = 8) -> None:
    monkeypatch.setattr(chunked, "LOGITS", rows * VOCAB)
    monkeypatch.setattr(fused, "CHUNK_REFERENCE", rows * VOCAB * itemsize)


@pytest.mark.parametrize("tokens", [0, 1, 2, 29, 30])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_both_outputs_of_each_token_and_their_gradients(tokens, rows, monkeypatch):
    set_rows(monkeypatch, rows)
    x, weight, labels = inputs(tokens)
    got, expected = linear_cross_entropy(x, weight, labels), plain(x, weight, labels)
    torch.testing.assert_close(got, expected)
    w1, w2 = torch.randn(2, tokens, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * w1 + lse.square() * w2).sum(), (x, weight)) for loss, lse in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("tokens", "rows"), [(0, 3), (1, 3), (30, 7), (30, 1), (300, 140)])
def test_sum_and_gradients(tokens, rows, form, backend, monkeypatch):
    set_rows(monkeypatch, rows)
    x, weight, labels = inputs(tokens)
    got = linear_cross_entropy_sum(x, weight, labels, **form, backend=backend)
    expected = objective(x, weight, labels, **form)
    torch.testing.assert_close(tuple(got), expected)
    assert not got.loss.requires_grad and not got.squares.requires_grad
    grads = [torch.autograd.grad(value * -1.7, (x, weight)) for value in (got.objective, expected[0])]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_has_a_label(backend):
    x, weight, labels = inputs(9)
    got = linear_cross_entropy_sum(x, weight, labels.fill_(-100), z_loss=0.1, backend=backend)
    assert [value.item() for value in got] == [0, 0, 0]
    assert not any(grad.any() for grad in torch.autograd.grad(got.objective, (x, weight)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(backend, frozen):
    x, weight, labels = inputs(9)
    given = [x, weight]
    given[frozen].requires_grad_(False)
    other = given[1 - frozen]
    grads = [torch.autograd.grad(f(x, weight, labels, z_loss=0.1)[0], other) for f in (linear_cross_entropy_sum, objective)]
    torch.testing.assert_close(*grads)


def test_two_micro_batches_into_the_main_gradient(monkeypatch):
    set_rows(monkeypatch, 4)
    form = {"z_loss": 0.1, "softcap": 2.0, "factor": 1 / 17}
    x, weight, labels = inputs(19)
    main = torch.ones_like(weight)
    expected = 1 + torch.autograd.grad(objective(x, weight, labels, **form)[0], weight)[0]
    for now in (slice(0, 11), slice(11, 19)):
        part = x.detach()[now].requires_grad_()
        got = linear_cross_entropy_sum(part, weight, labels[now], **form, weight_grad=main)
        (got.objective + 0 * weight.sum()).backward()
        torch.testing.assert_close(part.grad, torch.autograd.grad(objective(part, weight, labels[now], **form)[0], part)[0])
    torch.testing.assert_close(main, expected)
    assert weight.grad is not None and not weight.grad.any()  # what another use of the weight gives it
    # a forward without gradients, and one whose weight has none, leave it alone
    with torch.no_grad():
        linear_cross_entropy_sum(x, weight, labels, weight_grad=main)
    linear_cross_entropy_sum(x, weight.detach(), labels, weight_grad=main)
    torch.testing.assert_close(main, expected)


def test_the_main_gradient_has_no_multiple_of_the_objective():
    x, weight, labels = inputs(9)
    got = linear_cross_entropy_sum(x, weight, labels, weight_grad=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match="differentiate no multiple"):
        (got.objective / 9).backward()


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_second_backward_is_refused(accumulate):
    x, weight, labels = inputs(9)
    got = linear_cross_entropy_sum(x, weight, labels, weight_grad=torch.zeros_like(weight) if accumulate else None)
    got.objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="made once, in its forward"):
        got.objective.backward()


def test_a_hook_after_the_weight_runs_where_the_main_gradient_has_it_all():
    """megatron counts parameters by such hooks."""
    x, weight, labels = inputs(9)
    node, seen = weight.view_as(weight).grad_fn.next_functions[0][0], []
    node.register_hook(lambda *_: seen.append(weight.grad))
    linear_cross_entropy_sum(x, weight, labels, weight_grad=torch.zeros_like(weight)).objective.backward()
    assert seen == [None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend, monkeypatch):
    monkeypatch.setattr(fused, "NARROWED", 77)
    x, weight, labels = inputs(90, torch.bfloat16)
    got = linear_cross_entropy_sum(x, weight, labels, z_loss=0.1, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = objective(*wide, labels, z_loss=0.1)
    for value, expected in zip(got, exact, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-2)
    for grad, expected in zip(torch.autograd.grad(got.objective * 2.5, (x, weight)), torch.autograd.grad(exact[0] * 2.5, wide), strict=True):
        assert grad.dtype == torch.bfloat16 and grad.is_contiguous()
        assert (grad.double() - expected).norm() < 1e-2 * expected.norm()


def test_the_wide_gradient_is_rounded_in_its_own_memory(monkeypatch):
    monkeypatch.setattr(fused, "NARROWED", 10)
    wide = torch.randn(7, 9)
    expected, address = (wide * 3.1).bfloat16(), wide.data_ptr()
    got = fused._narrowed(wide, torch.bfloat16, torch.tensor(3.1))
    assert torch.equal(got, expected) and got.data_ptr() == address


@pytest.mark.parametrize(
    ("tokens", "row", "most", "rows"),
    [
        (32768, 2**18, 2**30, 4096),
        (32768, 2**18, 5 * 2**27, 2048),
        (5000, 2**18, 2**30, 3072),
        (300, 2**18, 2**27, 384),
        (100, 2**18, 2**30, 1024),
        (0, 8, 80, 1),
        (30, 8, 56, 6),
    ],
)
def test_chunks_are_even_and_whole_tiles(tokens, row, most, rows):
    assert fused.chunk_rows(tokens, row, most) == rows
    assert rows * row <= max(most, row)


class _Alive(TorchDispatchMode):
    """The largest tensor that any operator gives, and the most bytes that all of them hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.held: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                self.held[storage.data_ptr()] = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


@pytest.mark.parametrize(("backend", "small"), [("reference", False), ("chunked", True), ("fused", True)])
def test_no_logits_of_all_tokens_are_alive(backend, small, monkeypatch):
    tokens, rows = 600, 128
    set_rows(monkeypatch, rows)
    x, weight, labels = inputs(tokens)
    gc.collect()
    with _Alive() as seen:
        linear_cross_entropy_sum(x, weight, labels, z_loss=0.1, backend=backend).objective.backward()
    gradients = x.nbytes + weight.nbytes
    assert (seen.largest <= max(rows * VOCAB, x.numel())) == small
    # of a chunk what plain torch makes of it: the products and a few copies; and some numbers of each token
    assert (seen.most <= gradients + 6 * rows * VOCAB * 8 + 12 * tokens * 8) == small


def test_evaluation_makes_no_gradient():
    x, weight, labels = inputs(600)
    with torch.no_grad(), _Alive() as seen:
        got = linear_cross_entropy_sum(x, weight, labels, z_loss=0.1)
    torch.testing.assert_close(tuple(got), objective(x, weight, labels, z_loss=0.1))
    assert not got.objective.requires_grad
    with _Alive() as learning:
        linear_cross_entropy_sum(x, weight, labels, z_loss=0.1)
    assert seen.most < learning.most - weight.nbytes


def test_refusals():
    x, weight, labels = inputs(10)
    for function in (linear_cross_entropy, linear_cross_entropy_sum):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 50\)"):
            function(x, weight, labels.masked_fill(labels == -100, 50))
        with pytest.raises(ValueError, match="labels must be 10 int64"):
            function(x, weight, labels[1:])
        with pytest.raises(ValueError, match="of one type"):
            function(x, weight.float(), labels)
    with pytest.raises(ValueError, match="weight_grad must be contiguous"):
        linear_cross_entropy_sum(x, weight, labels, weight_grad=weight.detach().float())
    with pytest.raises(ValueError, match="choose auto, reference"):
        linear_cross_entropy_sum(x, weight, labels, backend="liger")
    with pytest.raises(ValueError, match=r"backend='triton' runs on CUDA|backend='triton' takes bfloat16"):
        linear_cross_entropy_sum(x, weight, labels, backend="triton")
