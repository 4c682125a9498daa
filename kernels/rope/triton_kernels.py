"""The program that turns heads."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def turn(x, cos, sin, y, rows, token, head, H, R, D, sign, ROWS: tl.constexpr, BR: tl.constexpr, BREST: tl.constexpr, PAIRS: tl.constexpr):
    """Grid (rows / ROWS): x [T, H, D] with strides token and head -> y [T, H, D], rows T x H; sign 1 or -1: the way to turn."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    t = row // H
    source = x + (t * token + (row % H) * head)[:, None]
    target = y + (row * D)[:, None]
    i = tl.arange(0, BR)
    exists = inside & (i < R)[None, :]
    angle = (t * R)[:, None] + i[None, :]
    c = tl.load(cos + angle, mask=exists, other=0.0)
    s = tl.load(sin + angle, mask=exists, other=0.0) * sign
    if PAIRS:
        a, b = 2 * i, 2 * i + 1
    else:
        a, b = i, R + i
    first = tl.load(source + a[None, :], mask=exists, other=0.0).to(tl.float32)
    second = tl.load(source + b[None, :], mask=exists, other=0.0).to(tl.float32)
    tl.store(target + a[None, :], (first * c - second * s).to(y.dtype.element_ty), mask=exists)
    tl.store(target + b[None, :], (second * c + first * s).to(y.dtype.element_ty), mask=exists)
    if BREST > 0:
        n = 2 * R + tl.arange(0, BREST)
        rest = inside & (n < D)[None, :]
        tl.store(target + n[None, :], tl.load(source + n[None, :], mask=rest, other=0.0), mask=rest)
