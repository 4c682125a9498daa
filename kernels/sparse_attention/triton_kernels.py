"""Attention over selected latents on a GPU: what one program computes. `triton_latent` launches these.

All heads of a query see the same keys, so that a query's heads are the rows of its matrix products and the latents of its keys, gathered
once, serve them all. The first R numbers of a latent are key and value, the rest of D is key alone. Forward: `attend`. Backward, in which
each product is as large as in a dense backward and none is made twice but the scores:

    key_parts           per query and block of its keys: dS to memory, and what the query adds to the gradient of each of its keys
    query_gradients     per query and block of heads: dQ = dS K
    add_parts           per key: the sum of what the queries that selected it add, in their order

The last takes the place of atomic additions: a part costs one store and one load in the inputs' type, and sums do not depend on which
program comes first. A product's result is never transposed for another product: Triton 3.4 to 3.7 computes that wrongly on Hopper.
A slot without a key holds -1: its latent loads as zeros and its weight is zero.
"""

import triton
import triton.language as tl

COUNTS = ["H", "K"]  # no kernel is compiled anew for another number of heads or slots
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _slots(indices, t, at, K, BK: tl.constexpr):
    """Slots at, at + 1, ... of query t: their numbers, the keys in them (int64, 0 for none), and whether there is one."""
    slots = at + tl.arange(0, BK)
    key = tl.load(indices + t * K + slots, mask=slots < K, other=-1).to(tl.int64)
    return slots, tl.maximum(key, 0), key >= 0


@triton.jit
def _tile(x, rows, there, WIDTH: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, B: tl.constexpr):
    """x[rows, FIRST : STOP] of [n, WIDTH], zeros where not there -> [rows, B]"""
    columns = FIRST + tl.arange(0, B)
    return tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=there[:, None] & (columns < STOP)[None, :], other=0.0)


@triton.jit
def _put(x, value, rows, there, WIDTH: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, B: tl.constexpr):
    columns = FIRST + tl.arange(0, B)
    at = x + rows[:, None] * WIDTH + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=there[:, None] & (columns < STOP)[None, :])


@triton.jit(do_not_specialize=["K"])
def ends(indices, stops, K, BK: tl.constexpr):
    """Grid (T): stops [T], the number of slots up to the last that holds a key."""
    t = tl.program_id(0).to(tl.int64)
    stop = 0
    for at in range(0, K, BK):
        slots, _, held = _slots(indices, t, at, K, BK)
        stop = tl.maximum(stop, tl.max(tl.where(held, slots + 1, 0), 0))
    tl.store(stops + t, stop)


@triton.jit(do_not_specialize=COUNTS)
def attend(
    q,
    latent,
    indices,
    stops,
    out,
    lse,
    scale,
    H,
    K,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (T, blocks of BH heads): out [T, H, R] and lse [T, H], natural logarithms."""
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    there, rows = heads < H, t * H + heads
    query, query_rest = _tile(q, rows, there, D, 0, R, BR), _tile(q, rows, there, D, R, D, BP)
    highest = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    sums = tl.zeros((BH, BR), tl.float32)
    for at in range(0, tl.load(stops + t), BK):
        _, keys, held = _slots(indices, t, at, K, BK)
        value, rest = _tile(latent, keys, held, D, 0, R, BR), _tile(latent, keys, held, D, R, D, BP)
        scores = tl.dot(query_rest, tl.trans(rest), input_precision=DOT)
        scores = tl.dot(query, tl.trans(value), scores, input_precision=DOT)
        scores = tl.where(held[None, :], scores * (scale * LOG2E), float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no key so far
        fade, p = tl.exp2(highest - base), tl.exp2(scores - base[:, None])
        total = total * fade + tl.sum(p, 1)
        sums = tl.dot(p.to(value.dtype), value, sums * fade[:, None], input_precision=DOT)
        highest = new
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    _put(out, sums / divisor[:, None], rows, there, R, 0, R, BR)
    tl.store(lse + rows, tl.where(some, highest / LOG2E + tl.log(divisor), float("-inf")), mask=there)


@triton.jit(do_not_specialize=[*COUNTS, "first"])
def key_parts(
    q,
    latent,
    indices,
    stops,
    lse,
    delta,
    dout,
    ds,
    parts,
    first,
    scale,
    H,
    K,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (queries from first on, blocks of BK slots): ds [queries, K, H] and parts [queries, K, D], up to the stops.

    delta [T, H]: sum of out times its gradient, less the gradient of lse.
    """
    row = tl.program_id(0).to(tl.int64)
    t, at = row + first, tl.program_id(1) * BK
    if at < tl.load(stops + t):
        slots, keys, held = _slots(indices, t, at, K, BK)
        value, rest = _tile(latent, keys, held, D, 0, R, BR), _tile(latent, keys, held, D, R, D, BP)
        sums, sums_rest = tl.zeros((BK, BR), tl.float32), tl.zeros((BK, BP), tl.float32)
        for h in range(0, H, BH):
            heads = h + tl.arange(0, BH)
            there, rows = heads < H, t * H + heads
            query, query_rest = _tile(q, rows, there, D, 0, R, BR), _tile(q, rows, there, D, R, D, BP)
            grad = _tile(dout, rows, there, R, 0, R, BR)
            seen = held[:, None] & there[None, :]
            scores = tl.dot(rest, tl.trans(query_rest), input_precision=DOT)
            scores = tl.dot(value, tl.trans(query), scores, input_precision=DOT)
            level = tl.load(lse + rows, mask=there, other=0.0) * LOG2E
            p = tl.exp2(tl.where(seen, scores * (scale * LOG2E) - level[None, :], float("-inf")))
            dp = tl.dot(value, tl.trans(grad), input_precision=DOT)
            back = (p * (dp - tl.load(delta + rows, mask=there, other=0.0)[None, :]) * scale).to(query.dtype)
            tl.store(ds + (row * K + slots)[:, None] * H + heads[None, :], back, mask=(slots < K)[:, None] & there[None, :])
            sums = tl.dot(back, query, sums, input_precision=DOT)
            sums = tl.dot(p.to(grad.dtype), grad, sums, input_precision=DOT)
            sums_rest = tl.dot(back, query_rest, sums_rest, input_precision=DOT)
        _put(parts, sums, row * K + slots, slots < K, D, 0, R, BR)
        _put(parts, sums_rest, row * K + slots, slots < K, D, R, D, BP)


@triton.jit(do_not_specialize=[*COUNTS, "first"])
def query_gradients(
    latent,
    indices,
    stops,
    ds,
    dq,
    first,
    H,
    K,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (queries from first on, blocks of BH heads): dq [T, H, D] from ds [queries, K, H]."""
    row = tl.program_id(0).to(tl.int64)
    t = row + first
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    there = heads < H
    sums, sums_rest = tl.zeros((BH, BR), tl.float32), tl.zeros((BH, BP), tl.float32)
    for at in range(0, tl.load(stops + t), BK):
        slots, keys, held = _slots(indices, t, at, K, BK)
        value, rest = _tile(latent, keys, held, D, 0, R, BR), _tile(latent, keys, held, D, R, D, BP)
        back = tl.load(ds + (row * K + slots)[None, :] * H + heads[:, None], mask=held[None, :] & there[:, None], other=0.0)
        sums = tl.dot(back, value, sums, input_precision=DOT)
        sums_rest = tl.dot(back, rest, sums_rest, input_precision=DOT)
    _put(dq, sums, t * H + heads, there, D, 0, R, BR)
    _put(dq, sums_rest, t * H + heads, there, D, R, D, BP)


@triton.jit
def add_parts(parts, order, bounds, total, W: tl.constexpr, BW: tl.constexpr, B: tl.constexpr):
    """Grid (keys): total[key] += the sum of parts[order[i]] for i from bounds[key] to bounds[key + 1]; parts [n, W], total [keys, W]."""
    key = tl.program_id(0).to(tl.int64)
    begin, stop = tl.load(bounds + key), tl.load(bounds + key + 1)
    if begin < stop:
        columns = tl.arange(0, BW)
        sums = tl.zeros((BW,), tl.float32)
        for at in range(begin, stop, B):
            places = at + tl.arange(0, B)
            rows = tl.load(order + places, mask=places < stop, other=0)
            sums += tl.sum(_tile(parts, rows, places < stop, W, 0, W, BW).to(tl.float32), 0)
        where = total + key * W + columns
        tl.store(where, tl.load(where, mask=columns < W, other=0.0) + sums, mask=columns < W)
