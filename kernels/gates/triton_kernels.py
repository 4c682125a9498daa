"""The programs of decays per channel, and of values times a step.

Of decays: a [T, W], W = H K, of which rows are `stride` apart; rate [H] = e^A_log, bias [W].
"""

import triton
import triton.language as tl

SOFTPLUS = tl.constexpr(0)  # values of KIND
BOUNDED = tl.constexpr(1)
SIGMOID = tl.constexpr(2)


@triton.jit
def softplus(x):
    """ln(1 + e^x), where e^x is not added to 1 that swallows it, nor overflows"""
    low = tl.exp(-tl.abs(x))
    # ln(1 + low) = 2 artanh(low / (2 + low)), a series in powers of at most 1/9 where low is small
    s = low / (2 + low)
    small = 2 * s * (1 + s * s * (1 / 3 + s * s * (1 / 5 + s * s / 7)))
    return tl.maximum(x, 0.0) + tl.where(low < 0.1, small, tl.log(1 + low))


@triton.jit(do_not_specialize=["tokens"])
def decays(a, rate, bias, y, tokens, stride, W, K, bound, share, KIND: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
    """Grid (T / ROWS, W / BC) -> y [T, W] float32"""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = (t < tokens)[:, None] & (c < W)[None, :]
    x = tl.load(a + t[:, None] * stride + c[None, :], mask=there, other=0.0).to(tl.float32)
    x += tl.load(bias + c, mask=c < W, other=0.0)[None, :]
    if KIND == SIGMOID:
        found = -softplus(-x) * share
    else:
        r = tl.load(rate + c // K, mask=c < W, other=0.0)[None, :]
        if KIND == SOFTPLUS:
            found = -r * softplus(x)
        else:
            found = -bound * tl.sigmoid(r * x)
    tl.store(y + t[:, None] * W + c[None, :], found, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def decay_gradients(a, rate, bias, grad, da, parts, tokens, stride, W, K, bound, share, KIND: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
    """Grid (programs, W / BC), each of every so many-th ROWS tokens -> da [T, W]; parts [2, programs, W]: what it adds to the gradients of bias
    and, channel by channel, of A_log"""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    shift = tl.load(bias + c, mask=c < W, other=0.0)[None, :]
    of_bias = tl.zeros((BC,), dtype=tl.float32)
    of_rate = tl.zeros((BC,), dtype=tl.float32)
    if KIND != SIGMOID:
        r = tl.load(rate + c // K, mask=c < W, other=0.0)[None, :]
    for block in range(program, tl.cdiv(tokens, ROWS), programs):
        t = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there = (t < tokens)[:, None] & (c < W)[None, :]
        x = tl.load(a + t[:, None] * stride + c[None, :], mask=there, other=0.0).to(tl.float32) + shift
        g = tl.load(grad + t[:, None] * W + c[None, :], mask=there, other=0.0)
        if KIND == SIGMOID:
            dx = g * share * tl.sigmoid(-x)
        elif KIND == SOFTPLUS:
            dx = -g * r * tl.sigmoid(x)
            of_rate += tl.sum(-g * r * softplus(x), 0)
        else:
            s = tl.sigmoid(r * x)
            dx = -g * bound * s * (1 - s) * r
            of_rate += tl.sum(dx * x, 0)
        of_bias += tl.sum(dx, 0)
        tl.store(da + t[:, None] * W + c[None, :], dx.to(da.dtype.element_ty), mask=there)
    tl.store(parts + program.to(tl.int64) * W + c, of_bias, mask=c < W)
    tl.store(parts + (programs + program).to(tl.int64) * W + c, of_rate, mask=c < W)


@triton.jit(do_not_specialize=["rows"])
def scale(
    x,
    factors,
    other,
    y,
    dots,
    rows,
    H,
    x_token,
    x_head,
    other_token,
    other_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    DOTTED: tl.constexpr,
):
    """Grid (T H / ROWS) -> y [T, H, D] = x [T, H, D] x factors [T, H]; DOTTED: dots [T, H], the sums of x times other [T, H, D]. rows: T H."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head, c = row // H, row % H, tl.arange(0, BD)
    there = (row < rows)[:, None] & (c < D)[None, :]
    number = tl.load(x + (token * x_token + head * x_head)[:, None] + c[None, :], mask=there, other=0.0).to(tl.float32)
    factor = tl.load(factors + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * D + c[None, :], number * factor[:, None], mask=there)
    if DOTTED:
        by = tl.load(other + (token * other_token + head * other_head)[:, None] + c[None, :], mask=there, other=0.0).to(tl.float32)
        tl.store(dots + row, tl.sum(number * by, 1), mask=row < rows)
