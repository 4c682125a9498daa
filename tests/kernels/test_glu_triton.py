"""Gated activations' programs against torch in float64."""

import pytest
import torch

from ltrain.kernels.glu import FUNCTIONS, Gating, gated, gated_halves
from tests.kernels.interpreter import DEVICE, runs

KINDS = [
    *(Gating(name) for name in FUNCTIONS),
    Gating(alpha=1.702, limit=1.1, up_offset=1.0),  # gpt-oss
    Gating(limit=0.4, clamp="after"),
    Gating("gelu", gate_scale=0.6, limit=0.7),
]


@runs
@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((130, 37), torch.float32), ((2, 3, 40), torch.float32), ((65, 24), torch.bfloat16), ((9,), torch.float32)]
)
def test_forward_and_gradients(how: Gating, together: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    given = torch.randn(*shape[:-1], 2 * shape[-1], generator=g).to(dtype)
    dout = torch.randn(*shape, generator=g).to(dtype)
    found = []
    for kind, device, backend in ((None, DEVICE, "triton"), (torch.float64, "cpu", "reference")):
        x = given.to(device, kind).requires_grad_()
        y = gated_halves(x, how, backend=backend) if together else gated(*x.chunk(2, dim=-1), how, backend=backend)
        found.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, x, dout.to(device, kind)))])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@runs
@pytest.mark.parametrize("how", KINDS, ids=str)
def test_what_is_no_number_stays_none(how: Gating) -> None:
    """A run that diverges is seen to."""
    gate, up = (torch.ones(2, 3, device=DEVICE) for _ in range(2))
    gate[0, 1] = up[1, 2] = torch.nan
    assert torch.equal(gated(gate, up, how, backend="triton").isnan(), gate.isnan() | up.isnan())


def test_what_does_not_fit() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="gate and up have one shape"):
        gated(x, x[:2], Gating())
    with pytest.raises(ValueError, match="has 7 numbers"):
        gated_halves(x[:, :7], Gating())
    with pytest.raises(ValueError, match="backend='triton' (runs on CUDA|takes bfloat16)"):
        gated(x.double(), x.double(), Gating(), backend="triton")
