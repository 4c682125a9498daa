"""What the programs are built of: tiles of rows, what a block of rows sees, scores."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SPAN = tl.constexpr(7)  # as in `intervals`
RANGE = tl.constexpr(4)
REST = tl.constexpr(4)  # numbers of a query and head that the gradients of keys read, two of them used


@triton.jit
def load(x, first, stride, stop, ROWS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, MASKED: tl.constexpr):
    """Rows first, first + 1, ... of x [rows, WIDTH], zeros from row `stop` on -> [ROWS, B]; not MASKED: there are none such."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, B)
    at = x + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        tile = tl.load(at, mask=(first + rows < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH != B:
        tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def put(x, value, first, stride, stop, ROWS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, B)
    at = x + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + rows < stop)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def sight(ranges, spans, number, rows):
    """Of a range: the first row of the other side, and for each row that it sees [low, high), and how far apart they are."""
    at = ranges + number * RANGE
    low, high, apart = tl.zeros_like(rows), tl.zeros_like(rows), tl.zeros_like(rows)
    for span in range(tl.load(at + 2), tl.load(at + 3)):
        of = spans + span * SPAN
        inside = (rows >= tl.load(of)) & (rows < tl.load(of + 1))
        low = tl.where(inside, tl.maximum(tl.load(of + 2), rows + tl.load(of + 4)), low)
        high = tl.where(inside, tl.minimum(tl.load(of + 3), rows + tl.load(of + 5) + 1), high)
        apart = tl.where(inside, tl.load(of + 6), apart)
    return tl.load(at), tl.load(at + 1), low, high, apart


@triton.jit
def tiles_of(begin, end, low, high, B: tl.constexpr):
    """How many tiles of B [begin, end) has, and which of them, from .. to, every row sees whole."""
    whole = (tl.maximum(tl.max(low, 0) - begin, 0) + B - 1) // B
    stop = tl.maximum(tl.min(high, 0) - begin, 0) // B
    stop = tl.where(stop > whole, stop, 0)
    return (end - begin + B - 1) // B, tl.minimum(whole, stop), stop


@triton.jit
def scored(product, behind, scale, cap, slope, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """Products of queries and keys -> scores in units that `unit` says, and the hyperbolic tangent of what is CAPPED."""
    bent = product
    if CAPPED:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(product * (scale / cap * (2.0 * LOG2E))))
        scores = bent * cap
    elif SLOPED:
        scores = product * scale
    else:
        scores = product
    if SLOPED:
        scores = scores - slope * tl.abs(behind).to(tl.float32)
    return scores, bent


@triton.jit
def unit(scale, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """What makes scores of `scored` logarithms to base 2."""
    if CAPPED or SLOPED:
        found = scale * 0.0 + LOG2E
    else:
        found = scale * LOG2E
    return found
