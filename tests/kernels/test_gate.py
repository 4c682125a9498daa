"""From logits to weights in plain torch, against the formulas."""

import pytest
import torch

from ltrain.kernels.routing.gate import Gate, route


def logits(tokens: int = 30, experts: int = 7) -> torch.Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_gradients(score, renormalise):
    x, bias = logits(), torch.linspace(-0.1, 0.1, 7, dtype=torch.float64)
    gate = Gate(3, score, renormalise, 2.5)
    indices = route(x, bias, gate).indices

    def given(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routed = route(x, bias, gate, indices)
        return routed.weights, routed.shares

    assert torch.autograd.gradcheck(given, (x,))


def test_loads_and_shares():
    x = logits()
    routed = route(x, torch.zeros(7, dtype=torch.float64), Gate(2))
    assert torch.equal(routed.loads, routed.indices.flatten().bincount(minlength=7))
    torch.testing.assert_close(routed.shares.sum(), torch.tensor(30.0, dtype=torch.float64))
    torch.testing.assert_close(routed.weights.sum(-1), torch.ones(30, dtype=torch.float64))
    again = route(x, torch.full((7,), 9.0, dtype=torch.float64), Gate(2), routed.indices.flip(0))
    assert torch.equal(again.indices, routed.indices.flip(0)) and torch.equal(again.loads, routed.loads)


def test_refusals():
    with pytest.raises(ValueError, match="k from 1 to E"):
        route(torch.zeros(2, 4), torch.zeros(4), Gate(5))
    with pytest.raises(ValueError, match="score softmax or sigmoid"):
        route(torch.zeros(2, 4), torch.zeros(4), Gate(2, "tanh"))
    with pytest.raises(ValueError, match="indices are of 2 tokens with 2 experts each"):
        route(torch.zeros(2, 4), torch.zeros(4), Gate(2), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend='triton' runs on CUDA"):
        route(torch.zeros(2, 4), torch.zeros(4), Gate(2), backend="triton")
