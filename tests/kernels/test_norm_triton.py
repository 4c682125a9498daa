"""The Triton kernels of norms and decays against plain torch in float64."""

import pytest
import torch

from ltrain.kernels.gates import channel_decay, scaled
from ltrain.kernels.norm import gated_rms_norm, l2_norm, l2_normed_parts
from tests.kernels.interpreter import DEVICE, INTERPRETED, on_gpu, runs

if INTERPRETED:
    from ltrain.kernels.gates import triton_gates
    from ltrain.kernels.norm import triton_norm


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(triton_norm, "NUMBERS", 64)
        monkeypatch.setattr(triton_norm, "PROGRAMS", 3)  # each goes over several blocks
        monkeypatch.setattr(triton_gates, "COLUMNS", 32)
        monkeypatch.setattr(triton_gates, "PROGRAMS", 6)
        monkeypatch.setattr(triton_gates, "NUMBERS", 64)


def compare(run, inputs: list[torch.Tensor], tolerance: float, strided: int = 0) -> None:
    """run(*inputs, backend) and its gradients; the first `strided` inputs are parts of wider rows."""
    found, weight = [], None
    for backend, change in (("triton", lambda x: x.to(DEVICE)), ("reference", lambda x: x.double())):
        leaves = [change(x).requires_grad_() for x in inputs]
        given = [torch.cat((x, x), -1)[..., : x.shape[-1]] if n < strided and backend == "triton" else x for n, x in enumerate(leaves)]
        out = run(*given, backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weight is None else weight
        found.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), leaves)])
    for number, (got, expected) in enumerate(zip(*found, strict=True)):
        error = (got.detach().cpu().double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < tolerance, f"result {number}: relative error {error:.2e}"


def drawn(*shapes: tuple[int, ...], dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


CASES = [(1, 1, 3), (7, 3, 20), (5, 2, 16)]


@runs
@pytest.mark.parametrize(("tokens", "heads", "width"), CASES)
def test_l2_norm(tokens, heads, width):
    (x,) = drawn((tokens, heads, width))
    x[0] = 0  # of no length, and no gradient that is no number
    compare(lambda x, backend: l2_norm(x, 1e-2, backend=backend), [x], 2e-6, strided=1)


@runs
@pytest.mark.parametrize(("tokens", "heads", "width", "rest"), [(1, 1, 3, 1), (7, 3, 20, 70), (5, 2, 16, 64)])
def test_l2_normed_parts(tokens, heads, width, rest):
    (x,) = drawn((tokens, 2 * heads * width + rest))

    def run(x, backend):
        return torch.cat([part.flatten(1) for part in l2_normed_parts(x, heads, width, 1e-2, backend=backend)], dim=1)

    compare(run, [x], 2e-6, strided=1)
    with pytest.raises(ValueError, match="C above the 4 columns of queries and keys"):
        l2_normed_parts(torch.zeros(2, 4), 1, 2)


@runs
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize(("tokens", "heads", "width"), CASES)
def test_gated_rms_norm(tokens, heads, width, gate):
    x, weight, z = drawn((tokens, heads, width), (width,), (tokens, heads, width))
    compare(lambda x, w, z, backend: gated_rms_norm(x, w, z, 1e-2, gate, backend=backend), [x, weight, z * 3], 1e-5, strided=1)
    with pytest.raises(ValueError, match="gate='tanh' is not known"):
        gated_rms_norm(x, weight, z, 1e-2, "tanh")


@runs
@pytest.mark.parametrize("kind", ["softplus", "bounded", "sigmoid"])
@pytest.mark.parametrize(("tokens", "heads", "width"), [*CASES, (6, 5, 1)])
def test_channel_decay(tokens, heads, width, kind):
    a, A_log, bias = drawn((tokens, heads * width), (heads,), (heads * width,))
    a[0] *= 40  # softplus is its number, or next to nothing

    def run(a, *rest):
        A_log, bias, backend = rest if kind != "sigmoid" else (None, *rest)
        return channel_decay(a, A_log, bias, heads, kind, bound=5.0, backend=backend)

    compare(run, [a, *([] if kind == "sigmoid" else [A_log]), bias], 4e-6, strided=1)


@runs
@pytest.mark.parametrize(("tokens", "heads", "width"), [*CASES, (6, 5, 1)])
def test_scaled(tokens, heads, width):
    x, factors = drawn((tokens, heads, width), (tokens, heads))
    compare(lambda x, factors, backend: scaled(x, factors, backend=backend), [x, factors], 2e-6, strided=1)


@runs
def test_half_precision_and_refusals():
    x, weight, z = drawn((9, 2, 24), (24,), (9, 2, 24), dtype=torch.bfloat16)
    compare(lambda x, backend: l2_norm(x, backend=backend), [x], 1e-2)
    compare(lambda x, factors, backend: scaled(x, factors, backend=backend), [x, *drawn((9, 2))], 1e-2)
    compare(lambda x, w, z, backend: gated_rms_norm(x, w, z, 1e-5, "silu", backend=backend), [x, weight, z], 1e-2)
    with pytest.raises(ValueError, match="backend='triton' .* one type, not torch.bfloat16, torch.float32"):
        gated_rms_norm(x.to(DEVICE), weight.to(DEVICE), z.to(DEVICE).float(), 1e-5, "silu", backend="triton")
    with pytest.raises(ValueError, match="backend='triton' .* bias in float32, not torch.float32 and torch.float64"):
        channel_decay(*(torch.zeros(n, device=DEVICE) for n in ((2, 4), 2)), torch.zeros(4, device=DEVICE).double(), 2, "softplus", backend="triton")
    with pytest.raises(ValueError, match="all but sigmoid take A_log"):
        channel_decay(torch.zeros(2, 4), None, torch.zeros(4), 2, "softplus")


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_larger_ones_on_the_gpu(dtype, tolerance):
    for tokens, heads, width in ((3000, 16, 128), (1000, 5, 96), (40, 3, 1000), (20000, 2, 64)):
        x, weight, z = drawn((tokens, heads, width), (width,), (tokens, heads, width), dtype=dtype)
        compare(lambda x, backend: l2_norm(x, backend=backend), [x], tolerance, strided=1)
        compare(lambda x, factors, backend: scaled(x, factors, backend=backend), [x, *drawn((tokens, heads))], tolerance, strided=1)
        compare(lambda x, w, z, backend: gated_rms_norm(x, w, z, 1e-5, "silu", backend=backend), [x, weight, z], tolerance, strided=1)

        def parts(x, backend, heads=heads, width=width):
            return torch.cat([part.flatten(1) for part in l2_normed_parts(x, (heads - 1) // 2, width, backend=backend)], dim=1)

        if heads > 2:
            compare(parts, [x.flatten(1)], tolerance, strided=1)
        A_log, bias = drawn((heads,), (heads * width,))

        def decays(a, A_log, bias, backend, heads=heads):
            return channel_decay(a, A_log, bias, heads, "softplus", backend=backend)

        compare(decays, [x.flatten(1), A_log, bias], tolerance, strided=1)
