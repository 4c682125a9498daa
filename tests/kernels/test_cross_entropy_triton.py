"""Linear cross entropy through the Triton kernel against the plain formula in float64."""

import pytest
import torch

from ltrain.kernels.cross_entropy import fused, linear_cross_entropy_sum, reference, triton_rows
from tests.kernels.interpreter import DEVICE, on_gpu, runs
from tests.kernels.linear_heads import FORMS, inputs, objective


def compare(tokens, vocab, form, dtype, tolerance, *, labels=None, weight_grad=False):
    x, weight, drawn = inputs(tokens, dtype, vocab, DEVICE)
    labels = drawn if labels is None else labels.to(DEVICE)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    exact = objective(*wide, labels.cpu(), **form)
    main = torch.ones_like(weight, dtype=torch.float32) if weight_grad else None
    got = linear_cross_entropy_sum(x, weight, labels, **form, weight_grad=main, backend="triton")
    for value, expected in zip(got, exact, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
    upstream = 1.0 if weight_grad else -0.3
    expected = torch.autograd.grad(exact[0] * upstream, wide)
    if weight_grad:
        grads = torch.autograd.grad(got.objective, x)[0], main - 1
    else:
        grads = torch.autograd.grad(got.objective * upstream, (x, weight))
    for grad, exact_grad in zip(grads, expected, strict=True):
        error = (grad.cpu().double() - exact_grad).norm()
        assert error <= tolerance * exact_grad.norm(), f"relative error {error / exact_grad.norm():.2e}"


@runs
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocab", "block"),
    [
        (1, 50, 64),
        (13, 50, 16),  # the last block has two
        (13, 64, 16),
        (7, 33, 8192),
    ],
)
def test_sum_and_gradients(tokens, vocab, block, form, monkeypatch):
    monkeypatch.setattr(triton_rows, "BLOCK", block)
    monkeypatch.setattr(fused, "CHUNK_BESIDE_SUM", 5 * vocab * 4)
    labels = torch.tensor([vocab - 1]) if tokens == 1 else None
    compare(tokens, vocab, form, torch.float32, 1e-5, labels=labels)


@runs
def test_into_the_main_gradient(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 5 * 50 * 4)
    compare(13, 50, FORMS[2], torch.float32, 1e-5, weight_grad=True)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_half_precision(dtype, weight_grad):
    compare(40, 50, {"z_loss": 0.01, "softcap": 20.0}, dtype, 1e-2, weight_grad=weight_grad)


@runs
def test_no_token_has_a_label():
    compare(5, 50, {"z_loss": 0.1}, torch.float32, 0.0, labels=torch.full((5,), -100))


@runs
def test_large_logits_and_rising_ones(monkeypatch):
    """Each block's maximum is above the last one's, and their exponentials alone would overflow."""
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    products = torch.linspace(-300, 300, 50).repeat(3, 1).to(DEVICE)
    products[1] = products[1].flip(0)
    products[2, 7] = float("-inf")
    labels, found = torch.tensor([3, 0, 49], device=DEVICE), []
    for rows in (triton_rows.rows, reference.rows):
        x, lse, target = products.clone(), products.new_zeros(3), products.new_zeros(3)
        options = {"z_loss": 1e-3, "factor": 0.5, "scale": 1.5, "softcap": 0.0, "first": 0, "total": 50}
        rows(x, labels, lse, target, reads=True, learns=True, **options)
        found.append((x, lse, target))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@runs
@pytest.mark.parametrize("rows", [triton_rows.rows, reference.rows], ids=["triton", "reference"])
def test_parts_of_a_vocabulary(rows):
    """Two parts, each with the whole's logsumexp, give the whole's gradient; a label outside the whole gives no number."""
    g = torch.Generator().manual_seed(0)
    products = torch.randn(5, 50, generator=g).to(DEVICE)
    labels = torch.tensor([0, 49, -100, 25, 24], device=DEVICE)
    options = {"z_loss": 0.1, "factor": 0.5, "scale": 1.5, "softcap": 2.0, "total": 50}

    def run(x, lse, first, **what):
        target = torch.zeros_like(lse)
        rows(x, labels, lse, target, first=first, **what, **options)
        return target

    whole, lse = products.clone(), products.new_zeros(5)
    target = run(whole, lse, 0, reads=True, learns=True)
    parts, part_lse = [products[:, :25].clone(), products[:, 25:].clone()], products.new_zeros(2, 5)
    targets = [run(part, part_lse[i], 25 * i, reads=True, learns=False) for i, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(parts, -1), products)
    torch.testing.assert_close(sum(targets), target)
    torch.testing.assert_close(part_lse.logsumexp(0).where(labels >= 0, 0.0), lse)
    for i, part in enumerate(parts):
        run(part, lse.clone(), 25 * i, reads=False, learns=True)
    torch.testing.assert_close(torch.cat(parts, -1), whole)
    labels[0] = 50
    assert run(products.clone(), lse, 0, reads=True, learns=False).isnan().tolist() == [True] + [False] * 4


@runs
def test_refusals():
    x, weight, labels = inputs(3)
    with pytest.raises(ValueError, match="takes bfloat16, float16 or float32, not torch.float64: choose fused or auto"):
        linear_cross_entropy_sum(x.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE), backend="triton")


@on_gpu
def test_memory_beside_the_inputs():
    """No logits of all tokens: a chunk of them, x's gradient and the wide sum of the weight's."""
    tokens, vocab, hidden = 16384, 65536, 512
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(linear_cross_entropy_sum(x, weight, labels, factor=1 / tokens).objective, (x, weight))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= fused.CHUNK_BESIDE_SUM + x.nbytes + 2 * weight.nbytes + 2**25
    assert peak < tokens * vocab * 2
