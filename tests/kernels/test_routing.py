"""Routing in plain torch: what goes where, and that nothing is lost."""

import pytest
import torch

from ltrain.kernels.routing import best, combine, permutation, spread

G = torch.Generator().manual_seed(0)


def routed(tokens: int, experts: int, k: int) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=G).topk(k, dim=-1).indices


@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 4, 2), (1, 1, 1), (37, 8, 3), (50, 64, 2)])
def test_rows_are_sorted_by_expert_and_come_back(tokens, experts, k):
    indices = routed(tokens, experts, k)
    p = permutation(indices, experts)
    assert p.counts.tolist() == [int((indices == e).sum()) for e in range(experts)]
    by_expert = [(e, t) for e in range(experts) for t in range(tokens) if e in indices[t].tolist()]
    assert [(int(indices.flatten()[slot]), int(slot) // k) for slot in p.order] == by_expert
    x = torch.randn(tokens, 5, dtype=torch.float64, generator=G, requires_grad=True)
    rows = spread(x, p)
    assert rows.tolist() == [x[t].tolist() for _, t in by_expert]
    torch.testing.assert_close(combine(rows, p), x * k)
    weights = torch.rand(tokens, k, dtype=torch.float64, generator=G, requires_grad=True)
    if tokens:
        assert torch.autograd.gradcheck(lambda x, w: combine(spread(x, p).sin(), p, w), (x, weights))
        assert torch.autograd.gradcheck(lambda x: combine(spread(x, p).sin(), p), (x,))


def test_best_are_the_highest():
    scores = torch.tensor([[0.1, 0.9, -1.0, 0.5], [float("-inf"), 2.0, 3.0, float("-inf")]])
    assert best(scores, 2).tolist() == [[1, 3], [2, 1]]


def test_refusals():
    p = permutation(torch.tensor([[0, 1], [1, 0]]), 2)
    with pytest.raises(ValueError, match="x has 3 tokens and the permutation 2"):
        spread(torch.zeros(3, 4), p)
    with pytest.raises(ValueError, match="y has 4 rows and weights \\[2, 3\\]"):
        combine(torch.zeros(4, 4), p, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="k=5 is not from 1 to the 4"):
        best(torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match="backend='triton' runs on CUDA"):
        best(torch.zeros(2, 4), 2, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' does not exist"):
        spread(torch.zeros(2, 4), p, backend="cuda")
