"""The programs of gated activations: forwards, and backwards with all in between made again."""

import triton
import triton.language as tl


@triton.jit
def activate(x, alpha, NAME: tl.constexpr):
    """f(x) and its derivative. Comparisons are such that what is no number stays none, here and below, where a minimum would take the other side."""
    if NAME == "silu":
        s = tl.sigmoid(alpha * x)
        y = x * s
        slope = s + alpha * y * (1.0 - s)
    elif NAME == "gelu":
        half = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * half
        slope = half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi): 1 + tanh(z) = 2 sigmoid(2 z)
        s = tl.sigmoid(inner)
        y = x * s
        slope = s + y * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        kept = tl.where(x <= 0.0, 0.0, x)
        y = kept * kept
        slope = 2.0 * kept
    return y, slope


@triton.jit
def both(g, u, scale, alpha, limit, offset, NAME: tl.constexpr, LIMITED: tl.constexpr, AFTER: tl.constexpr):
    """f(scale g) and u as they are multiplied, and their derivatives by g and u."""
    x = g * scale
    slope_u = tl.full(u.shape, 1.0, dtype=tl.float32)
    if LIMITED and not AFTER:
        y, slope = activate(tl.where(x > limit, limit, x), alpha, NAME)
        slope = tl.where(x <= limit, slope, 0.0)
    else:
        y, slope = activate(x, alpha, NAME)
    if LIMITED:
        if AFTER:
            slope = tl.where(y <= limit, slope, 0.0)
            y = tl.where(y > limit, limit, y)
        slope_u = tl.where((u >= -limit) & (u <= limit), 1.0, 0.0)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return y, u + offset, slope * scale, slope_u


@triton.jit(do_not_specialize=["total"])
def forward(
    gate,
    up,
    out,
    total,
    width,
    gate_stride,
    up_stride,
    scale,
    alpha,
    limit,
    offset,
    NAME: tl.constexpr,
    LIMITED: tl.constexpr,
    AFTER: tl.constexpr,
    N: tl.constexpr,
):
    """Grid (total / N) over the numbers of out [rows, width]; rows of gate and up are a stride apart."""
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = place < total
    row, column = place // width, place % width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    y, v, _, _ = both(g, u, scale, alpha, limit, offset, NAME, LIMITED, AFTER)
    tl.store(out + place, (y * v).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total"])
def backward(
    gate,
    up,
    dout,
    dgate,
    dup,
    total,
    width,
    gate_stride,
    up_stride,
    grad_stride,
    scale,
    alpha,
    limit,
    offset,
    NAME: tl.constexpr,
    LIMITED: tl.constexpr,
    AFTER: tl.constexpr,
    N: tl.constexpr,
):
    """As forward; rows of both gradients are grad_stride apart."""
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = place < total
    row, column = place // width, place % width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
    y, v, slope, slope_u = both(g, u, scale, alpha, limit, offset, NAME, LIMITED, AFTER)
    to = row * grad_stride + column
    tl.store(dgate + to, (d * v * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + to, (d * y * slope_u).to(dup.dtype.element_ty), mask=inside)
