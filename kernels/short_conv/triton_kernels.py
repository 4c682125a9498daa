"""The short convolution on a GPU, from zeros before each segment: what one program computes, a block of tokens x a block of channels."""

import triton
import triton.language as tl


@triton.jit
def _sum(x, weight, t, c, start, C, stride, W: tl.constexpr, exists):
    """sum_j weight[:, W - 1 - j] x_{t - j} over the tokens of t's segment, float32 [tokens, channels]"""
    total = tl.zeros(exists.shape, dtype=tl.float32)
    for j in tl.static_range(W):
        here = exists & (t - j >= start)[:, None]
        row = tl.load(x + (t - j)[:, None] * stride + c[None, :], mask=here, other=0.0).to(tl.float32)
        total += row * tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["T"])
def forward(x, weight, starts, y, T, C, stride, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """x [T, C], of which rows are `stride` apart, y [T, C], weight [C, W], starts [T]: the first token of each token's segment."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (t < T)[:, None] & (c < C)[None, :]
    start = tl.load(starts + t, mask=t < T, other=0)
    total = _sum(x, weight, t, c, start, C, stride, W, exists)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + t[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T"])
def backward(x, weight, starts, dy, dz, dweight, T, C, stride, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """dz [T, C]: the gradient before the activation; dweight [token blocks, C, W]: each block's part."""
    block = tl.program_id(0)
    t = block.to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (t < T)[:, None] & (c < C)[None, :]
    start = tl.load(starts + t, mask=t < T, other=0)
    at = t[:, None] * C + c[None, :]
    grad = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        total = _sum(x, weight, t, c, start, C, stride, W, exists)
        gate = tl.sigmoid(total)
        grad *= gate * (1 + total * (1 - gate))
    tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=exists)
    for j in tl.static_range(W):
        here = exists & (t - j >= start)[:, None]
        row = tl.load(x + (t - j)[:, None] * stride + c[None, :], mask=here, other=0.0).to(tl.float32)
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
