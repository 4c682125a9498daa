"""Gradients of queries, and of keys and values. Probabilities are made again from the final log-sum-exp."""

import triton
import triton.language as tl

from ltrain.kernels.attention.triton_kernels.tiles import LOG2E, REST, load, put, scored, sight, tiles_of, unit


@triton.jit
def _query_step(
    sums,
    query,
    grad,
    level,
    less,
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
    """The gradient of queries, to be scaled, a tile of keys later."""
    columns = first + tl.arange(0, COLUMNS)
    key = load(k, first, k_stride, end, COLUMNS, D, BD, MASKED)
    value = load(v, first, v_stride, end, COLUMNS, DV, BV, MASKED)
    product = tl.dot(query, tl.trans(key), input_precision=DOT)
    scores, bent = scored(product, rows[:, None] + apart[:, None] - columns[None, :], scale, cap, slope, CAPPED, SLOPED)
    scores = scores * unit(scale, CAPPED, SLOPED) - level[:, None]
    if MASKED:
        scores = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), scores, float("-inf"))
    back = tl.exp2(scores) * (tl.dot(grad, tl.trans(value), input_precision=DOT) - less[:, None])
    if CAPPED:
        back *= 1.0 - bent * bent
    return tl.dot(back.to(key.dtype), key, sums, input_precision=DOT)


@triton.jit(do_not_specialize=["Q"])
def query_gradients(
    q,
    k,
    v,
    slopes,
    out,
    dout,
    lse,
    rest,
    dq,
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
    out_stride,
    out_head,
    dout_stride,
    dout_head,
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
    DOT: tl.constexpr,
):
    """Grid (blocks of ROWS queries, heads): dq [Q, H, D], and for `key_gradients` rest [H, Q, REST]: lse to base 2, and the sum of out
    times its gradient."""
    program = tl.program_id(0)
    head = program % H
    first = tl.load(order + program // H) * ROWS
    block = first // ROWS
    rows = first + tl.arange(0, ROWS)
    query = load(q + head * q_head, first, q_stride, Q, ROWS, D, BD, True)
    grad = load(dout + head * dout_head, first, dout_stride, Q, ROWS, DV, BV, True)
    less = tl.sum(load(out + head * out_head, first, out_stride, Q, ROWS, DV, BV, True).to(tl.float32) * grad.to(tl.float32), 1)
    level = tl.load(lse + rows.to(tl.int64) * H + head, mask=rows < Q, other=0.0) * LOG2E
    of_row = rest + (head.to(tl.int64) * Q + rows) * REST
    tl.store(of_row, level, mask=rows < Q)
    tl.store(of_row + 1, less, mask=rows < Q)
    k += (head // G) * k_head
    v += (head // G) * v_head
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes + head)
    sums = tl.zeros((ROWS, BD), tl.float32)
    for number in range(tl.load(bounds + block), tl.load(bounds + block + 1)):
        begin, end, low, high, apart = sight(ranges, spans, number, rows)
        tiles, whole, stop = tiles_of(begin, end, low, high, COLUMNS)
        for tile in range(whole, stop):
            at = begin + tile * COLUMNS
            sums = _query_step(
                sums, query, grad, level, less, k, v, k_stride, v_stride, at, end, rows, low, high, apart, scale, cap, slope,
                D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, False,
            )  # fmt: skip
        for other in range(tiles - (stop - whole)):
            at = begin + (other + tl.where(other >= whole, stop - whole, 0)) * COLUMNS
            sums = _query_step(
                sums, query, grad, level, less, k, v, k_stride, v_stride, at, end, rows, low, high, apart, scale, cap, slope,
                D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, True,
            )  # fmt: skip
    put(dq + head * D, sums * scale, first, H * D, Q, ROWS, D, BD)


@triton.jit
def _key_step(
    sums,
    value_sums,
    key,
    value,
    q,
    dout,
    rest,
    q_stride,
    dout_stride,
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
    """The gradients of keys, to be scaled, and of values, a tile of queries later."""
    columns = first + tl.arange(0, COLUMNS)
    query = load(q, first, q_stride, end, COLUMNS, D, BD, MASKED)
    grad = load(dout, first, dout_stride, end, COLUMNS, DV, BV, MASKED)
    # REST numbers of a query in one load: of tiles with fewer numbers than threads Triton lets each thread load all that it needs, one by one
    both = load(rest, first, REST, end, COLUMNS, REST, REST, MASKED)
    even, odd = tl.split(tl.reshape(both, (COLUMNS, 2, 2)))
    level, less = tl.split(even)[0], tl.split(odd)[0]
    product = tl.dot(key, tl.trans(query), input_precision=DOT)
    scores, bent = scored(product, columns[None, :] + apart[:, None] - rows[:, None], scale, cap, slope, CAPPED, SLOPED)
    scores = scores * unit(scale, CAPPED, SLOPED) - level[None, :]
    if MASKED:
        scores = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), scores, float("-inf"))
    p = tl.exp2(scores)
    value_sums = tl.dot(p.to(grad.dtype), grad, value_sums, input_precision=DOT)
    back = p * (tl.dot(value, tl.trans(grad), input_precision=DOT) - less[None, :])
    if CAPPED:
        back *= 1.0 - bent * bent
    return tl.dot(back.to(query.dtype), query, sums, input_precision=DOT), value_sums


@triton.jit(do_not_specialize=["Q", "K"])
def key_gradients(
    q,
    k,
    v,
    slopes,
    dout,
    rest,
    dk,
    dv,
    order,
    bounds,
    ranges,
    spans,
    scale,
    cap,
    Q,
    K,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    dout_stride,
    dout_head,
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
    DOT: tl.constexpr,
):
    """Grid (blocks of ROWS keys, K/V heads): dk [K, H / G, D] and dv [K, H / G, DV], over the heads of a group one after another."""
    program = tl.program_id(0)
    kv_head = program % (H // G)
    first = tl.load(order + program // (H // G)) * ROWS
    block = first // ROWS
    rows = first + tl.arange(0, ROWS)
    key = load(k + kv_head * k_head, first, k_stride, K, ROWS, D, BD, True)
    value = load(v + kv_head * v_head, first, v_stride, K, ROWS, DV, BV, True)
    sums, value_sums = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS, BV), tl.float32)
    for number in range(tl.load(bounds + block), tl.load(bounds + block + 1)):
        begin, end, low, high, apart = sight(ranges, spans, number, rows)
        tiles, whole, stop = tiles_of(begin, end, low, high, COLUMNS)
        for member in range(G):
            head = kv_head * G + member
            of_head = rest + head.to(tl.int64) * Q * REST
            slope = 0.0
            if SLOPED:
                slope = tl.load(slopes + head)
            for tile in range(whole, stop):
                at = begin + tile * COLUMNS
                sums, value_sums = _key_step(
                    sums, value_sums, key, value, q + head * q_head, dout + head * dout_head, of_head, q_stride, dout_stride,
                    at, end, rows, low, high, apart, scale, cap, slope, D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, False,
                )  # fmt: skip
            for other in range(tiles - (stop - whole)):
                at = begin + (other + tl.where(other >= whole, stop - whole, 0)) * COLUMNS
                sums, value_sums = _key_step(
                    sums, value_sums, key, value, q + head * q_head, dout + head * dout_head, of_head, q_stride, dout_stride,
                    at, end, rows, low, high, apart, scale, cap, slope, D, DV, BD, BV, COLUMNS, CAPPED, SLOPED, DOT, True,
                )  # fmt: skip
    put(dk + kv_head * D, sums * scale, first, H // G * D, K, ROWS, D, BD)
    put(dv + kv_head * DV, value_sums, first, H // G * DV, K, ROWS, DV, BV)
