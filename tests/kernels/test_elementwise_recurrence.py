"""The scans against their token-by-token forms in float64."""

from typing import Any

import pytest
import torch

from ltrain.kernels import elementwise_recurrence as kernels

LENGTHS = [[0], [1], [5, 1, 0, 2], [63, 64, 65], [200]]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def close(got: Any, expected: Any, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    if got[0].numel():
        weights = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3)) for y in got]
        grads = [torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), leaves) for ys in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_scan(lengths: list[int], initial: bool) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.rand(sum(lengths), 3, 2, dtype=torch.float64, generator=g).pow(0.2)
    a[::7] = 0.0  # a decay that forgets everything
    a.requires_grad_()
    b = torch.randn(sum(lengths), 3, 2, dtype=torch.float64, generator=g).requires_grad_()
    state = torch.randn(len(lengths), 3, 2, dtype=torch.float64, generator=g).requires_grad_() if initial else None
    leaves = [a, b, *([state] if state is not None else [])]
    close(*(kernels.scan(a, b, cu(lengths), initial_state=state, backend=backend) for backend in ("auto", "reference")), leaves)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_selective_scan(lengths: list[int], initial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 16)
    g = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    x, B, C = (torch.randn(tokens, n, dtype=torch.float64, generator=g).requires_grad_() for n in (4, 3, 3))
    step = torch.rand(tokens, 4, dtype=torch.float64, generator=g).requires_grad_()
    rate = (0.1 + 3 * torch.rand(4, 3, dtype=torch.float64, generator=g)).requires_grad_()
    state = torch.randn(len(lengths), 4, 3, dtype=torch.float64, generator=g).requires_grad_() if initial else None

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return kernels.selective_scan(x, step, rate, B, C, cu(lengths), initial_state=state, return_final_state=True, backend=backend)

    close(run("auto"), run("reference"), [x, step, rate, B, C, *([state] if state is not None else [])])


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
@pytest.mark.parametrize("initial", [False, True])
def test_documents_across_the_chunks_of_the_selective_scan(chunk: int, initial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that begin and end on chunks' bounds and beside them, several in one chunk, one over several chunks, and empty ones on a bound,
    first and last: each chunk finds its own, and no other's, by `inside`."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    lengths = [0, 3, 1, 0, 4, 0, 0, 9, 1, 1, 1, 1, 1, 0, 2, 0]
    tokens, g = sum(lengths), torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(tokens, n, dtype=torch.float64, generator=g).requires_grad_() for n in (2, 3, 3))
    step = torch.rand(tokens, 2, dtype=torch.float64, generator=g).requires_grad_()
    rate = (0.1 + torch.rand(2, 3, dtype=torch.float64, generator=g)).requires_grad_()
    state = torch.randn(len(lengths), 2, 3, dtype=torch.float64, generator=g).requires_grad_() if initial else None

    def run(backend: str, final: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        return kernels.selective_scan(x, step, rate, B, C, cu(lengths), initial_state=state, return_final_state=final, backend=backend)

    close(run("doubling"), run("reference"), [x, step, rate, B, C, *([state] if state is not None else [])])
    torch.testing.assert_close(run("doubling", final=False)[0], run("reference")[0], rtol=1e-11, atol=1e-12)


def test_decays_that_vanish_stay_finite_in_float32() -> None:
    step = torch.full((300, 2), 1e4)
    y, _ = kernels.selective_scan(torch.ones(300, 2), step, torch.ones(2, 3), torch.ones(300, 3), torch.ones(300, 3), cu([300]))
    assert y.isfinite().all() and torch.allclose(y, 3 * step)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape and type"):
        kernels.scan(torch.zeros(3, 2), torch.zeros(3, 1), cu([3]))
    with pytest.raises(ValueError, match=r"initial_state must be \[1, 2, 4\]"):
        x = torch.zeros(3, 2)
        kernels.selective_scan(x, x, torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4), cu([3]), initial_state=torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"initial_state must be \[1, 2\]"):
        kernels.scan(torch.zeros(3, 2), torch.zeros(3, 2), cu([3]), initial_state=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="have shapes"):
        kernels.selective_scan(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(3, 4), cu([3]))
