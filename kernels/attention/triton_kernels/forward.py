"""Output and log-sum-exp."""

import triton
import triton.language as tl

from ltrain.kernels.attention.triton_kernels.tiles import LOG2E, load, put, scored, sight, tiles_of, unit


@triton.jit
def _advance(
    highest,
    total,
    sums,
    query,
    k,
    v,
    k_stride,
    v_stride,
    first,
    end,
    rows,
    low,
    high,
    apart,
    scale,
    cap,
    slope,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running maximum (to base 2), sum of exponentials and weighted sum of values, a tile of keys later."""
    columns = first + tl.arange(0, COLUMNS)
    key = load(k, first, k_stride, end, COLUMNS, D, BD, MASKED)
    product = tl.dot(query, tl.trans(key), input_precision=DOT)
    scores, _ = scored(product, rows[:, None] + apart[:, None] - columns[None, :], scale, cap, slope, CAPPED, SLOPED)
    factor = unit(scale, CAPPED, SLOPED)
    if MASKED:
        scores = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * factor)
    base = new
    if MASKED:
        base = tl.where(new == float("-inf"), 0.0, new)  # no key so far
    fade, p = tl.exp2(highest - base), tl.exp2(scores * factor - base[:, None])
    value = load(v, first, v_stride, end, COLUMNS, DV, BV, MASKED)
    sums = tl.dot(p.to(value.dtype), value, sums * fade[:, None], input_precision=DOT)
    return new, total * fade + tl.sum(p, 1), sums


@triton.jit(do_not_specialize=["Q"])
def attend(
    q,
    k,
    v,
    slopes,
    sinks,
    out,
    lse,
    order,
    bounds,
    ranges,
    spans,
    scale,
    cap,
    Q,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    SUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks of ROWS queries, heads): out [Q, H, DV] and lse [Q, H], natural logarithms, sinks [H] included where SUNK.

    The numbers of q's, k's and v's heads follow each other; a token is *_stride further on, a head *_head.
    """
    program = tl.program_id(0)
    head = program % H
    first = tl.load(order + program // H) * ROWS
    block = first // ROWS
    rows = first + tl.arange(0, ROWS)
    query = load(q + head * q_head, first, q_stride, Q, ROWS, D, BD, True)
    k += (head // G) * k_head
    v += (head // G) * v_head
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes + head)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SUNK:  # a key without a value, which came first
        highest = tl.zeros((ROWS,), tl.float32) + tl.load(sinks + head) * LOG2E
        total += 1.0
    sums = tl.zeros((ROWS, BV), tl.float32)
    for number in range(tl.load(bounds + block), tl.load(bounds + block + 1)):
        begin, end, low, high, apart = sight(ranges, spans, number, rows)
        tiles, whole, stop = tiles_of(begin, end, low, high, COLUMNS)
        for tile in range(whole, stop):
            at = begin + tile * COLUMNS
            highest, total, sums = _advance(
                highest, total, sums, query, k, v, k_stride, v_stride, at, end, rows, low, high, apart, scale, cap, slope,
                D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, False,
            )  # fmt: skip
        for other in range(tiles - (stop - whole)):
            at = begin + (other + tl.where(other >= whole, stop - whole, 0)) * COLUMNS
            highest, total, sums = _advance(
                highest, total, sums, query, k, v, k_stride, v_stride, at, end, rows, low, high, apart, scale, cap, slope,
                D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, True,
            )  # fmt: skip
    divisor = tl.where(total > 0, total, 1.0)
    put(out + head * DV, sums / divisor[:, None], first, H * DV, Q, ROWS, DV, BV)
    tl.store(lse + rows.to(tl.int64) * H + head, highest / LOG2E + tl.log(divisor), mask=rows < Q)
