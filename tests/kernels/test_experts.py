import pytest
import torch

from ltrain.kernels.experts import grouped_linear

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [0, 0, 0, 0], [2, 3, 2, 2]]


def inputs(counts: list[int], width: int = 8, out: int = 16, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in ((sum(counts), width), (len(counts), out, width))]


def plain(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Every row by every expert, and the right one picked."""
    group = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)], dtype=torch.int64, device=x.device)
    return torch.einsum("ni,eoi->neo", x, weight)[torch.arange(len(x), device=x.device), group]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_meet_their_own_expert(counts):
    x, weight = inputs(counts)
    y, expected = grouped_linear(x, weight, torch.tensor(counts)), plain(x, weight, counts)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_empty_groups_have_zero_gradients(counts):
    x, weight = inputs(counts)
    grouped_linear(x, weight, torch.tensor(counts)).sum().backward()
    assert x.grad is not None and weight.grad is not None
    for e, n in enumerate(counts):
        assert weight.grad[e].any() == (n > 0)


def test_refusals():
    x, weight = inputs([3, 4])
    with pytest.raises(ValueError, match="sum to x's 7 rows"):
        grouped_linear(x, weight, torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="counts must be 2"):
        grouped_linear(x, weight, torch.tensor([3, 4, 0]))
    with pytest.raises(ValueError, match="in"):
        grouped_linear(x[:, 1:], weight, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="backend='grouped' takes bfloat16 on CUDA"):
        grouped_linear(x, weight, torch.tensor([3, 4]), backend="grouped")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", [*COUNTS[:3], COUNTS[4], [1000, 0, 24, 1]], ids=str)
@pytest.mark.parametrize(("width", "out"), [(64, 128), (24, 8)])
def test_cuda_grouped(counts, width, out):
    x, weight = (t.detach().cuda().requires_grad_() for t in inputs(counts, width, out, torch.bfloat16))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, expected = grouped_linear(x, weight, torch.tensor(counts).cuda(), backend="grouped"), plain(*wide, counts)
    upstream = torch.randn_like(expected).bfloat16()
    got = [y, *torch.autograd.grad(y, (x, weight), upstream)]
    for a, b in zip(got, [expected, *torch.autograd.grad(expected, wide, upstream.double())], strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()
    assert not got[2][torch.tensor(counts).cuda() == 0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_grouped_takes_a_weight_at_any_address():
    x, weight = (t.detach().cuda() for t in inputs([3, 4], 64, 128, torch.bfloat16))
    apart = torch.empty(weight.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view_as(weight).copy_(weight)
    counts = torch.tensor([3, 4]).cuda()
    assert torch.equal(grouped_linear(x, apart, counts, backend="grouped"), grouped_linear(x, weight, counts, backend="grouped"))
