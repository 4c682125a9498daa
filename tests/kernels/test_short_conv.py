import pytest
import torch

from ltrain.kernels.short_conv import short_conv, step

LENGTHS = [[], [0], [0, 0], [1], [2], [30], [1, 2, 0, 3, 4, 5, 40]]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths: list[int], width: int, channels: int = 6, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), channels), (channels, width), (len(lengths), width - 1, channels)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_reference_is_the_sum_over_earlier_tokens():
    x, weight, state = inputs([3, 4], 3)
    y, _ = short_conv(x, weight, cu([3, 4]), initial_state=state, activation=None, backend="reference")
    torch.testing.assert_close(y[3], weight[:, 2] * x[3] + weight[:, 1] * state[1, 1] + weight[:, 0] * state[1, 0])
    torch.testing.assert_close(y[5], weight[:, 2] * x[5] + weight[:, 1] * x[4] + weight[:, 0] * x[3])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("with_state", [True, False])
def test_against_reference_with_gradients(lengths, width, with_state):
    x, weight, state = inputs(lengths, width)
    given = state if with_state else None
    results = [short_conv(x, weight, cu(lengths), initial_state=given, backend=b) for b in ("auto", "reference")]
    torch.testing.assert_close(*results)
    if not sum(lengths):
        assert results[0][0].shape == (0, 6)
        return
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in results[0]]
    leaves = [x, weight, state] if with_state else [x, weight]
    grads = [torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves) for y, final in results]
    torch.testing.assert_close(*grads)


def test_a_stream_in_two_calls_is_one():
    x, weight, state = inputs([30], 4)
    y, final = short_conv(x, weight, cu([30]), initial_state=state)
    for cut in (1, 2, 17, 29):
        first, between = short_conv(x[:cut], weight, cu([cut]), initial_state=state)
        second, last = short_conv(x[cut:], weight, cu([30 - cut]), initial_state=between)
        torch.testing.assert_close((torch.cat([first, second]), last), (y, final))


@pytest.mark.parametrize("width", [1, 4])
def test_step_by_step_is_the_stream(width):
    x, weight, state = inputs([5, 5], width)
    y, final = short_conv(x, weight, cu([5, 5]), initial_state=state)
    for t in range(5):
        out, state = step(x[[t, 5 + t]], weight, state)
        torch.testing.assert_close(out, y[[t, 5 + t]])
    torch.testing.assert_close(state, final)


def test_bfloat16_sums_in_float32():
    x, weight, state = inputs([7, 90], 4, channels=32, dtype=torch.bfloat16)
    y, _ = short_conv(x, weight, cu([7, 90]), initial_state=state)
    exact, _ = short_conv(x.double(), weight.double(), cu([7, 90]), initial_state=state.double())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=1e-6)  # no more than the final rounding


def test_refusals():
    x, weight, state = inputs([10], 4)
    with pytest.raises(ValueError, match=r"weight \[C, W\]"):
        short_conv(x, weight.T, cu([10]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        short_conv(x, weight, cu([9]))
    with pytest.raises(ValueError, match=r"initial_state.*\[2, 3, 6\]"):
        short_conv(x, weight, cu([4, 6]), initial_state=state)
    with pytest.raises(ValueError, match="activation='gelu'"):
        short_conv(x, weight, cu([10]), activation="gelu")
