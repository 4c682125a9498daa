"""The short convolution on a GPU: what one program computes, a block of tokens x a block of channels.

`starts` and `segments` are [T]: the first token of each token's segment, and its number. `state` is [N, W - 1, C], the inputs before each
segment; without STATE they are zeros, and neither it nor `segments` is read.
"""

import triton
import triton.language as tl


@triton.jit
def _earlier(x, state, t, c, start, segment, C, stride, j, W: tl.constexpr, STATE: tl.constexpr, exists):
    """x_{t - j} in t's segment and the inputs before it, float32 [tokens, channels]"""
    inside = (t - j >= start)[:, None]
    row = tl.load(x + (t - j)[:, None] * stride + c[None, :], mask=exists & inside, other=0.0).to(tl.float32)
    if STATE:
        at = segment * (W - 1) + W - 1 + t - j - start
        row += tl.load(state + at[:, None] * C + c[None, :], mask=exists & (t - j < start)[:, None], other=0.0).to(tl.float32)
    return row


@triton.jit
def _sum(x, state, weight, t, c, start, segment, C, stride, W: tl.constexpr, STATE: tl.constexpr, exists):
    """sum_j weight[:, W - 1 - j] x_{t - j}, float32 [tokens, channels]"""
    total = tl.zeros(exists.shape, dtype=tl.float32)
    for j in tl.static_range(W):
        row = _earlier(x, state, t, c, start, segment, C, stride, j, W, STATE, exists)
        total += row * tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _segment(segments, t, T, STATE: tl.constexpr):
    if STATE:
        return tl.load(segments + t, mask=t < T, other=0).to(tl.int64)
    return t


@triton.jit(do_not_specialize=["T"])
def forward(
    x,
    state,
    weight,
    starts,
    segments,
    y,
    T,
    C,
    stride,
    W: tl.constexpr,
    STATE: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """x [T, C], of which rows are `stride` apart, y [T, C], weight [C, W]."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (t < T)[:, None] & (c < C)[None, :]
    start = tl.load(starts + t, mask=t < T, other=0)
    total = _sum(x, state, weight, t, c, start, _segment(segments, t, T, STATE), C, stride, W, STATE, exists)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + t[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T"])
def backward(
    x,
    state,
    weight,
    starts,
    segments,
    dy,
    dz,
    dweight,
    T,
    C,
    stride,
    W: tl.constexpr,
    STATE: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dz [T, C]: the gradient before the activation; dweight [token blocks, C, W]: each block's part."""
    block = tl.program_id(0)
    t = block.to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (t < T)[:, None] & (c < C)[None, :]
    start = tl.load(starts + t, mask=t < T, other=0)
    segment = _segment(segments, t, T, STATE)
    at = t[:, None] * C + c[None, :]
    grad = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        total = _sum(x, state, weight, t, c, start, segment, C, stride, W, STATE, exists)
        gate = tl.sigmoid(total)
        grad *= gate * (1 + total * (1 - gate))
    tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=exists)
    for j in tl.static_range(W):
        row = _earlier(x, state, t, c, start, segment, C, stride, j, W, STATE, exists)
        tl.store(dweight + (block.to(tl.int64) * C + c) * W + (W - 1 - j), tl.sum(row * grad, 0), mask=c < C)


@triton.jit(do_not_specialize=["T"])
def input_gradient(dz, weight, starts, dx, T, C, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """dx_t = sum_j weight[:, W - 1 - j] dz_{t + j} over the tokens of t's segment."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (t < T)[:, None] & (c < C)[None, :]
    total = tl.zeros((BT, BC), dtype=tl.float32)
    for j in tl.static_range(W):
        later = t + j
        # no token after t has t in its past unless their segment began by then
        here = (later < T) & (tl.load(starts + later, mask=later < T, other=0) <= t)
        row = tl.load(dz + later[:, None] * C + c[None, :], mask=exists & here[:, None], other=0.0).to(tl.float32)
        total += row * tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(dx + t[:, None] * C + c[None, :], total.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def state_gradient(dz, weight, bounds, dstate, C, W: tl.constexpr, BC: tl.constexpr):
    """dstate [N, W - 1, C], bounds [N + 1]: what each input before a segment gives its first tokens."""
    segment = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = tl.load(bounds + segment).to(tl.int64), tl.load(bounds + segment + 1)
    for i in tl.static_range(W - 1):
        total = tl.zeros((BC,), dtype=tl.float32)
        for j in tl.static_range(W - 1 - i, W):  # tokens from the segment's first on: `j` inputs behind them is this one
            t = start + j + i - (W - 1)
            row = tl.load(dz + t * C + c, mask=(c < C) & (t < end), other=0.0).to(tl.float32)
            total += row * tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)
        tl.store(dstate + (segment * (W - 1) + i) * C + c, total.to(dstate.dtype.element_ty), mask=c < C)
