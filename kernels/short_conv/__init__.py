"""Causal depthwise convolution over a few tokens, inside segments: what recurrent mixers put before q, k and v.

Backends: `reference` (token by token), `shifted` (a weighted sum of shifted streams) and `triton` (one pass on a GPU); `auto`
takes triton wherever it runs, shifted elsewhere.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.segments import accumulator, boundaries, choose, gather_rows, permitted, plain_refusal, scatter_rows, wants_triton
from ltrain.kernels.short_conv import reference

__all__ = ["short_conv", "step"]


def _check(x: Tensor, weight: Tensor, activation: str | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or len(weight) != x.shape[1] or not weight.shape[1]:
        raise ValueError(f"x is [tokens, C] and weight [C, W], but the shapes are {list(x.shape)} and {list(weight.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} does not exist: choose 'silu' or None")


def _check_state(name: str, state: Tensor, segments: int, weight: Tensor) -> None:
    expected = (segments, weight.shape[1] - 1, len(weight))
    if state.shape != expected:
        raise ValueError(f"{name} must hold the {expected[1]} inputs before each segment, {list(expected)}, but is {list(state.shape)}")


def _shifted_sum(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [W - 1 + n, ..., C], weight [C, W] -> [n, ..., C] in the accumulator's type"""
    wide, width = accumulator(inputs.dtype), weight.shape[1]
    count = len(inputs) - width + 1
    columns = weight.to(wide).unbind(1)
    total = inputs[:count].to(wide) * columns[0]
    for j in range(1, width):
        total = torch.addcmul(total, inputs[j : j + count].to(wide), columns[j])
    return total


def short_conv(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(sum_j weight[:, W - 1 - j] * x_{t - j}) inside every segment. Differentiable in every tensor.

    Args:
        x: [T, C].
        weight: [C, W]; weight[:, -1] multiplies the current token.
        cu_seqlens: [N + 1] int32 boundaries, on the CPU.
        initial_state: [N, W - 1, C], the inputs before each segment, oldest first; None: zeros.
        return_final_state: whether to return the state after each segment.
        activation: "silu" or None.
        backend: auto | reference | shifted | triton.

    Returns:
        y [T, C] in x's type, and the final state [N, W - 1, C]: the last W - 1 inputs of each segment, those before it included; None if
        not asked for.

    Raises:
        ValueError: shapes, boundaries, activation or backend do not fit.
    """
    _check(x, weight, activation)
    bounds = boundaries(cu_seqlens, len(x))
    choose(backend, ("reference", "shifted", "triton"))
    segments, before = len(bounds) - 1, weight.shape[1] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, segments, weight)
        initial_state = initial_state.to(x.dtype)
    if len(x) and wants_triton(backend, x):
        from ltrain.kernels.short_conv import triton_conv

        if permitted(plain_refusal(x), backend, "shifted or auto"):
            y = triton_conv.short_conv(x, weight, bounds, activation == "silu", initial_state)
            return y, _last_inputs(x, bounds, before, initial_state) if return_final_state else None
    if initial_state is None:
        initial_state = x.new_zeros(segments, before, x.shape[1])
    if backend == "reference":
        total, final = reference.short_conv(x, weight, bounds, initial_state)
    elif segments == 1:
        inputs = torch.cat([initial_state[0], x])
        total, final = _shifted_sum(inputs, weight), inputs[len(x) :].unsqueeze(0)
    else:
        total, final = _packed(x, weight, bounds, initial_state)
    return (F.silu(total) if activation == "silu" else total).to(x.dtype), final if return_final_state else None


def _last_inputs(x: Tensor, bounds: list[int], before: int, initial_state: Tensor | None) -> Tensor:
    """The last `before` inputs of each segment, those before it included, which are zeros without a state -> [N, before, C]"""
    starts, ends = (torch.tensor(cuts, dtype=torch.int64).unsqueeze(1) for cuts in (bounds[:-1], bounds[1:]))
    rows = ends - torch.arange(before, 0, -1)  # [N, before]
    last = x[rows.clamp(min=0).to(x.device, non_blocking=True)]
    inside = (rows >= starts).unsqueeze(-1).to(x.device, non_blocking=True)
    if initial_state is None:
        return last * inside
    earlier = (rows - starts + before).clamp(max=before - 1)  # among the inputs before a segment
    return torch.where(inside, last, initial_state.gather(1, earlier.unsqueeze(-1).to(x.device, non_blocking=True).expand_as(initial_state)))


def _packed(x: Tensor, weight: Tensor, bounds: list[int], initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Every segment is laid behind its initial state in one stream, which is convolved as a whole; mixed outputs are left out."""
    segments, before, channels = initial_state.shape
    lengths = torch.tensor([end - begin for begin, end in pairwise(bounds)], dtype=torch.int64)
    token = torch.arange(bounds[-1]) + torch.repeat_interleave(torch.arange(segments), lengths) * before  # [T]: where its window begins
    window_ends = torch.tensor(bounds, dtype=torch.int64)[1:] + torch.arange(segments) * before  # [N]: where the final state begins
    inside = torch.arange(before)
    starts = torch.tensor(bounds, dtype=torch.int64)[:-1] + torch.arange(segments) * before  # [N]: where the initial state begins
    initial_rows = (starts.unsqueeze(1) + inside).flatten()
    final_rows = (window_ends.unsqueeze(1) + inside).flatten()
    token, initial_rows, final_rows = (rows.to(x.device, non_blocking=True) for rows in (token, initial_rows, final_rows))
    source = torch.cat([x, initial_state.flatten(0, 1)])
    inputs = scatter_rows(source, torch.cat([token + before, initial_rows]), len(source))
    final = gather_rows(inputs, final_rows).unflatten(0, (segments, before))
    if not len(x):
        return x.to(accumulator(x.dtype)) * weight.sum(), final
    return gather_rows(_shifted_sum(inputs, weight), token), final


def step(x: Tensor, weight: Tensor, state: Tensor, *, activation: str | None = "silu") -> tuple[Tensor, Tensor]:
    """One token for each of N sequences, for decoding.

    Args:
        x: [N, C].
        weight: [C, W].
        state: [N, W - 1, C], the inputs before it, oldest first.
        activation: "silu" or None.

    Returns:
        y [N, C] in x's type and the new state [N, W - 1, C].

    Raises:
        ValueError: shapes or activation do not fit.
    """
    _check(x, weight, activation)
    _check_state("state", state, len(x), weight)
    inputs = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1).transpose(0, 1)  # [W, N, C]
    total = _shifted_sum(inputs, weight)[0]
    return (F.silu(total) if activation == "silu" else total).to(x.dtype), inputs[1:].transpose(0, 1)
