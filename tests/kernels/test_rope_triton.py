"""The rotary embedding's program against torch in float64."""

import pytest
import torch

from ltrain.kernels.rope import rotate
from tests.kernels.interpreter import DEVICE, runs


@runs
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width", "half"), [(1, 1, 2, 1), (7, 3, 24, 12), (130, 5, 40, 7), (33, 2, 192, 32), (3, 40, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient(tokens: int, heads: int, width: int, half: int, pairs: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    # a part of a wider projection, as queries are
    whole = torch.randn(tokens, heads * width + 5, generator=g).to(dtype)
    angles = torch.randn(tokens, 1, half, generator=g) * 3
    dout = torch.randn(tokens, heads, width, generator=g).to(dtype)
    found = []
    for kind, device, backend in ((None, DEVICE, "triton"), (torch.float64, "cpu", "reference")):
        leaf = whole.to(device, kind).requires_grad_()
        x = leaf[:, : heads * width].unflatten(-1, (heads, width))
        tables = [table.to(device, kind) for table in (angles.cos(), angles.sin())]
        y = rotate(x, *tables, pairs, backend=backend)
        found.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaf, dout.to(device, kind)))])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@runs
def test_gradients_that_are_not_contiguous() -> None:
    x = torch.randn(6, 2, 8, device=DEVICE, requires_grad=True)
    angles = torch.randn(6, 1, 3, device=DEVICE)
    y = rotate(x, angles.cos(), angles.sin(), backend="triton")
    dout = torch.randn(2, 6, 8, device=DEVICE).transpose(0, 1)
    torch.testing.assert_close(torch.autograd.grad(y, x, dout)[0], rotate(dout, angles.cos(), -angles.sin(), backend="reference"))


def test_shapes_that_do_not_fit() -> None:
    x, cos = torch.zeros(3, 2, 8), torch.zeros(3, 1, 4)
    for wrong in ((x, cos[:2], cos[:2]), (x, torch.zeros(3, 1, 5), torch.zeros(3, 1, 5)), (x, cos, cos[..., :2]), (x[0], cos, cos)):
        with pytest.raises(ValueError, match=r"x is \[T, H, D\] and cos and sin \[T, 1, R\]"):
            rotate(*wrong)
    with pytest.raises(ValueError, match="backend='fast' does not exist"):
        rotate(x, cos, cos, backend="fast")
