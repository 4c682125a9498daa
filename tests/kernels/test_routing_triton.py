"""The Triton kernels of routing against plain torch in float64."""

import pytest
import torch

from ltrain.kernels.routing import best, combine, permutation, spread
from tests.kernels.interpreter import DEVICE, INTERPRETED, on_gpu, runs

if INTERPRETED:
    from ltrain.kernels.routing import triton_routing


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several of them for few slots."""
    if INTERPRETED:
        monkeypatch.setattr(triton_routing, "SLOTS", 32)
        monkeypatch.setattr(triton_routing, "NUMBERS", 16)
        monkeypatch.setattr(triton_routing, "SCORES", 256)


def compare(tokens: int, experts: int, k: int, width: int, dtype: torch.dtype, tolerance: float, few: bool = False) -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, experts, generator=g)
    if few:  # all to the same ones
        scores[:, :k] += 100
    indices = best(scores.to(DEVICE), k, backend="triton")
    assert torch.equal(indices.cpu(), scores.topk(k, dim=-1).indices)  # no two are equal
    x, weights, weight = (
        torch.randn(tokens, width, generator=g).to(dtype),
        torch.rand(tokens, k, generator=g),
        torch.randn(tokens, width, generator=g).to(dtype),
    )
    found = []
    for backend, device, of in (("triton", DEVICE, dtype), ("reference", "cpu", torch.float64)):
        p = permutation(indices.to(device), experts, backend=backend)
        leaves = [x.to(device, of).requires_grad_(), (weights if backend == "triton" else weights.double()).to(device).requires_grad_()]
        rows = spread(leaves[0], p, backend=backend)
        out, plain = combine(rows * 1.5, p, leaves[1], backend=backend), combine(rows, p, backend=backend)
        grads = torch.autograd.grad((out * weight.to(out)).sum() + (plain * weight.to(out)).sum() * 0.5, leaves)
        found.append([p.order, p.places, p.counts, rows, out, plain, *grads])
    for name, got, expected in zip(("order", "places", "counts", "rows", "out", "plain", "dx", "dweights"), *found, strict=True):
        error = (got.detach().cpu().double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
        assert error <= (0 if name in ("order", "places", "counts", "rows") else tolerance), f"{name}: relative error {error:.2e}"


@runs
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "width", "few"), [(1, 1, 1, 1, False), (33, 5, 3, 40, False), (50, 40, 2, 16, False), (40, 7, 4, 3, True)]
)
def test_against_torch(tokens, experts, k, width, few):
    compare(tokens, experts, k, width, torch.float32, 1e-6, few)


@runs
def test_half_precision():
    compare(20, 6, 2, 24, torch.bfloat16, 1e-2)


@runs
def test_equal_and_infinite_scores():
    """The first of equal ones, and no expert twice even where all that is left is -inf."""
    inf = float("inf")
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0], [-inf, -inf, 2.0, -inf], [-1.0, -2.0, -0.5, -inf], [inf, -inf, 0.0, inf]]).to(DEVICE)
    assert best(scores, 3, backend="triton").tolist() == [[0, 1, 2], [2, 0, 1], [2, 0, 1], [0, 3, 2]]


@runs
def test_both_zeros_are_equal_and_a_nan_is_taken_once():
    scores = torch.tensor([[-0.0, 0.0, 0.0, -1.0], [1.0, 2.0, 0.0, 3.0]])
    scores.view(torch.int32)[1, 2] = -1  # the NaN whose bits, put in order, are those of a column that is taken
    scores = scores.to(DEVICE)
    assert best(scores, 4, backend="triton").tolist() == [[0, 1, 2, 3], [2, 3, 1, 0]]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_larger_ones_on_the_gpu(dtype):
    for tokens, experts, k, width, few in (
        (5000, 256, 8, 2048, False),
        (3001, 512, 10, 1000, False),
        (4096, 60, 4, 4096, True),
        (70000, 8, 2, 64, False),
    ):
        compare(tokens, experts, k, width, dtype, 1e-2 if dtype == torch.bfloat16 else 1e-5, few)
