"""The Triton kernels of the short convolution against the float64 reference."""

import pytest
import torch

from ltrain.kernels.short_conv import short_conv
from tests.kernels.interpreter import DEVICE, on_gpu, runs
from tests.kernels.test_short_conv import cu, inputs


def compare(lengths, width, channels, tolerance, dtype=torch.float32, activation="silu", state=True):
    given = [t.detach().to(DEVICE, dtype).requires_grad_() for t in inputs(lengths, width, channels)[: 3 if state else 2]]
    wide = [t.detach().cpu().double().requires_grad_() for t in given]
    g = torch.Generator().manual_seed(1)
    found = []
    for (x, weight, *before), backend in ((given, "triton"), (wide, "reference")):
        y, final = short_conv(x, weight, cu(lengths), initial_state=before[0] if state else None, activation=activation, backend=backend)
        assert final is not None
        weights = [torch.randn(t.shape, generator=g.manual_seed(i), dtype=torch.float64).to(t) for i, t in enumerate((y, final))]
        found.append([y, final, *torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), (x, weight, *before))])
    for name, got, expected in zip(("y", "final", "dx", "dweight", "dstate"), *found, strict=False):
        if expected.numel():
            error = (got.cpu().double() - expected).norm() / expected.norm()
            assert error < tolerance, f"{name}: relative error {error:.2e}"


@runs
@pytest.mark.parametrize("lengths", [[130], [1, 2, 0, 3, 4, 5, 70]], ids=str)
@pytest.mark.parametrize(("width", "channels", "activation"), [(4, 70, "silu"), (2, 6, None), (1, 6, "silu"), (3, 6, None), (8, 20, "silu")])
@pytest.mark.parametrize("state", [True, False])
def test_against_the_reference(lengths, width, channels, activation, state):
    compare(lengths, width, channels, 1e-6, activation=activation, state=state)


@runs
def test_columns_of_a_wider_tensor():
    x, weight = (t.detach().float().to(DEVICE) for t in inputs([5, 60], 4, 10)[:2])
    wide = torch.cat((x, x + 1), dim=1).requires_grad_()
    found = [short_conv(given, weight, cu([5, 60]), backend="triton")[0] for given in (wide[:, 4:14], wide[:, 4:14].contiguous())]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), wide)[0] for y in found))


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_on_the_gpu(width, dtype, tolerance):
    for lengths in ([5000], [1] * 300, [64, 63, 65, 1, 0, 4000]):
        for state in (True, False):
            compare(lengths, width, 200, tolerance, dtype, state=state)
