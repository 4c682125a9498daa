"""The Triton kernels from logits to weights against plain torch in float64."""

import pytest
import torch

from ltrain.kernels.routing.gate import Gate, route
from tests.kernels.interpreter import DEVICE, INTERPRETED, on_gpu, runs

if INTERPRETED:
    from ltrain.kernels.routing import triton_gate


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several of them for few tokens."""
    if INTERPRETED:
        monkeypatch.setattr(triton_gate, "SCORES", 64)


def compare(tokens: int, experts: int, gate: Gate, tolerance: float, again: bool = False, of: str = "both") -> None:
    g = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(tokens, experts, generator=g), torch.randn(experts, generator=g) * 0.1
    on = torch.randn(tokens, gate.k, generator=g), torch.randn(experts, generator=g)
    indices = torch.rand(tokens, experts, generator=g).topk(gate.k, dim=-1).indices if again else None
    found = []
    for backend, device, dtype in (("triton", DEVICE, torch.float32), ("reference", "cpu", torch.float64)):
        x = logits.to(device, dtype).requires_grad_()
        routed = route(x, bias.to(device, dtype), gate, None if indices is None else indices.to(device), backend=backend)
        parts = {"weights": (routed.weights * on[0].to(x)).sum(), "shares": (routed.shares * on[1].to(x)).sum()}
        (grad,) = torch.autograd.grad(sum(parts.values()) if of == "both" else parts[of], x)
        found.append([*routed, grad])
    for name, got, expected in zip(("weights", "indices", "loads", "shares", "dlogits"), *found, strict=True):
        error = (got.detach().cpu().double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
        assert error <= (0 if name in ("indices", "loads") else tolerance), f"{name}: relative error {error:.2e}"


@runs
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_against_torch(score, renormalise):
    compare(33, 5, Gate(3, score, renormalise, 2.5), 2e-6)
    compare(50, 40, Gate(2, score, renormalise), 2e-6, again=True)


@runs
@pytest.mark.parametrize("of", ["weights", "shares"])
def test_one_of_the_gradients(of):
    compare(20, 6, Gate(2), 2e-6, of=of)


@on_gpu
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_larger_ones_on_the_gpu(score):
    for tokens, experts, k in ((5000, 256, 8), (3001, 512, 10), (70000, 8, 2)):
        compare(tokens, experts, Gate(k, score), 1e-5)
