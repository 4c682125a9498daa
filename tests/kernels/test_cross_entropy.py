import pytest
import torch
import torch.nn.functional as F

from ltrain.kernels import cross_entropy
from ltrain.kernels.cross_entropy import linear_cross_entropy


def inputs(tokens: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(50, (tokens,), generator=g)
    labels[::3] = -100
    return x, weight, labels


def plain(x, weight, labels):
    logits = x @ weight.T
    return F.cross_entropy(logits, labels, reduction="none"), torch.where(labels >= 0, logits.logsumexp(-1), 0.0)


@pytest.mark.parametrize("tokens", [0, 1, 2, 29, 30])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_both_outputs_and_their_gradients(tokens, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", rows * 50)
    x, weight, labels = inputs(tokens)
    got, expected = linear_cross_entropy(x, weight, labels), plain(x, weight, labels)
    torch.testing.assert_close(got, expected)
    w1, w2 = torch.randn(2, tokens, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * w1 + lse.square() * w2).sum(), (x, weight)) for loss, lse in (got, expected)]
    torch.testing.assert_close(*grads)


def test_bfloat16():
    x, weight, labels = inputs(90, torch.bfloat16)
    loss, lse = linear_cross_entropy(x, weight, labels)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact_loss, exact_lse = plain(*wide, labels)
    assert loss.dtype == lse.dtype == torch.float32
    torch.testing.assert_close((loss.double(), lse.double()), (exact_loss, exact_lse), rtol=1e-2, atol=5e-2)
    for got, expected in zip(torch.autograd.grad(loss.sum(), (x, weight)), torch.autograd.grad(exact_loss.sum(), wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() < 1e-2 * expected.norm()


def test_refusals():
    x, weight, labels = inputs(10)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 50\)"):
        linear_cross_entropy(x, weight, labels.masked_fill(labels == -100, 50))
    with pytest.raises(ValueError, match="labels must be 10 int64"):
        linear_cross_entropy(x, weight, labels[1:])
    with pytest.raises(ValueError, match="of one type"):
        linear_cross_entropy(x, weight.float(), labels)
