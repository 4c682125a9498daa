"""What context ranks exchange of an additive recurrence, against float64: the state after a segment, and the gradient of the one before it."""

import pytest
import torch

from ltrain.kernels import linear_recurrence as family
from tests.kernels.interpreter import DEVICE, INTERPRETED, runs
from tests.kernels.test_linear_recurrence import cu, inputs

if DEVICE == "cuda" or INTERPRETED:
    from ltrain.kernels.linear_recurrence import triton_chunked

DECAYS = ("none", "head", "channel")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of the parts of a pass, how often each ran."""
    found = dict.fromkeys(("prepared", "passed", "read", "passed_back", "_gradients"), 0)
    for name in found:

        def counted(*args, name=name, run=getattr(triton_chunked, name), **kwargs):  # noqa: B008
            found[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(triton_chunked, name, counted)
    return found


def drawn(tokens: int, decay: str) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """q, k, v and decay of float64, and the same rounded to float32 on the device."""
    wide = [None if x is None else x.detach() for x in inputs([tokens], heads=1, group=2, width=20, value_width=24, decay=decay, delta=False)[:4]]
    return wide, [None if x is None else x.float().to(DEVICE) for x in wide]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got.cpu().double() - expected).norm() <= 1e-5 * expected.norm() + 1e-37  # below which float32 has no numbers


def used(calls: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in calls.items() if count}


@runs
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_state_after_a_segment_is_one_pass(tokens, decay, calls):
    (_, *wide), (_, *near) = drawn(tokens, decay)
    close(triton_chunked.segment_map(*near), family.reference.segment_map(*wide, None, [0, tokens])[1][0])
    assert used(calls) == {"prepared": 1, "passed": 1}


@runs
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_state_gradient_is_one_pass(tokens, decay, calls):
    wide, near = drawn(tokens, decay)
    dout = torch.randn(tokens, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = triton_chunked.state_gradient(*near, dout.float().to(DEVICE), 0.4)
    assert used(calls) == {"prepared": 1, "passed_back": 1}
    state = torch.zeros(1, 2, 20, 24, dtype=torch.float64, requires_grad=True)
    out = family.linear_recurrence(*wide, None, cu([tokens]), scale=0.4, initial_state=state, backend="reference").output
    close(got, torch.autograd.grad(out, state, dout)[0][0])
