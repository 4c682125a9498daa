"""Attention over selected latents, and their selection, on a GPU: what one program computes. `triton_latent` and `triton_select` launch these.

All heads of a query see the same keys, so that a query's heads are the rows of its matrix products and the latents of its keys, gathered
once, serve them all. The first R numbers of a latent are key and value, the rest of D is key alone. `attend` is the forward,
`score_gradients` the backward of scores and queries. What a query adds to the gradient of a key is a product over its heads of what the
latter stores, one matrix product for all of its keys; `add_parts` sums for each key what its queries add, in their order: in the place of
atomic additions, a part costs one store and one load in the inputs' type, and sums do not depend on which program comes first.

A product's result is never transposed for another product: Triton 3.4 to 3.7 computes that wrongly on Hopper.
A slot without a key holds -1 and loads as zeros.

The indexer: `everything`, `index_scores` and `best_keys` select, `index_terms`, `index_query_gradients` and `index_key_parts` are of its loss
over what is selected.
"""

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["H"])
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
    divisor = tl.where(total > 0, total, 1.0)
    _put(out, sums / divisor[:, None], rows, there, R, 0, R, BR)
    tl.store(lse + rows, highest / LOG2E + tl.log(divisor), mask=there)


@triton.jit(do_not_specialize=["H", "first"])
def score_gradients(
    q,
    latent,
    indices,
    stops,
    out,
    lse,
    dlse,
    dout,
    dq,
    weights,
    factors,
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
    """Grid (queries from first on, blocks of BH heads): dq [T, H, D], weights [queries, 2, H, K] up to the stops: the gradients of the products
    with keys, and the attention; and factors [queries, 2, H, D]: what these are multiplied with for keys, the queries and dout, 0 behind R."""
    row = tl.program_id(0).to(tl.int64)
    t = row + first
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    there, rows = heads < H, t * H + heads
    query, query_rest, grad = _tile(q, rows, there, D, 0, R, BR), _tile(q, rows, there, D, R, D, BP), _tile(dout, rows, there, R, 0, R, BR)
    beside = row * 2 * H + heads
    _put(factors, query, beside, there, D, 0, R, BR)
    _put(factors, query_rest, beside, there, D, R, D, BP)
    _put(factors, grad, beside + H, there, D, 0, R, BR)
    _put(factors, tl.zeros_like(query_rest), beside + H, there, D, R, D, BP)
    level = tl.load(lse + rows, mask=there, other=0.0) * LOG2E
    less = tl.sum(grad.to(tl.float32) * _tile(out, rows, there, R, 0, R, BR).to(tl.float32), 1)
    less -= tl.load(dlse + rows, mask=there, other=0.0)
    sums, sums_rest = tl.zeros((BH, BR), tl.float32), tl.zeros((BH, BP), tl.float32)
    for at in range(0, tl.load(stops + t), BK):
        slots, keys, held = _slots(indices, t, at, K, BK)
        value, rest = _tile(latent, keys, held, D, 0, R, BR), _tile(latent, keys, held, D, R, D, BP)
        scores = tl.dot(query_rest, tl.trans(rest), input_precision=DOT)
        scores = tl.dot(query, tl.trans(value), scores, input_precision=DOT)
        p = tl.exp2(tl.where(held[None, :], scores * (scale * LOG2E) - level[:, None], float("-inf")))
        dp = tl.dot(grad, tl.trans(value), input_precision=DOT)
        back = (p * (dp - less[:, None]) * scale).to(value.dtype)
        to, exists = weights + (row * 2 * H + heads)[:, None] * K + slots[None, :], there[:, None] & (slots < K)[None, :]
        tl.store(to, back, mask=exists)
        tl.store(to + H.to(tl.int64) * K, p.to(value.dtype), mask=exists)
        sums = tl.dot(back, value, sums, input_precision=DOT)
        sums_rest = tl.dot(back, rest, sums_rest, input_precision=DOT)
    _put(dq, sums, rows, there, D, 0, R, BR)
    _put(dq, sums_rest, rows, there, D, R, D, BP)


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


@triton.jit(do_not_specialize=["K"])
def everything(begins, counts, found, K, BK: tl.constexpr):
    """Grid (T): found [T, K], the first keys of each query that has counts [T] of them from begins [T] on, and -1 behind them."""
    t = tl.program_id(0).to(tl.int64)
    begin, count = tl.load(begins + t), tl.load(counts + t)
    for at in range(0, K, BK):
        slots = at + tl.arange(0, BK)
        tl.store(found + t * K + slots, tl.where(slots < count, begin + slots, -1), mask=slots < K)


@triton.jit(do_not_specialize=["rows", "keys", "place", "H"])
def index_scores(
    q,
    k,
    weights,
    sizes,
    scores,
    rows,
    keys,
    stride,
    place,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks of BN keys, blocks of BM queries): scores [rows, stride], sum_h w_h relu(q_h . k) in float32, of the blocks that have a key
    which one of their queries sees: query i sees keys up to place + i. sizes [keys]: what keys are to be multiplied with, None: nothing."""
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN <= place + tl.minimum(tl.program_id(1) * BM + BM, rows) - 1:
        there = m < rows
        key = _tile(k, n.to(tl.int64), n < keys, D, 0, D, BD)
        total = tl.zeros((BM, BN), tl.float32)
        for h in range(H):
            at = m.to(tl.int64) * H + h
            products = tl.dot(_tile(q, at, there, D, 0, D, BD), tl.trans(key), input_precision=DOT)
            total += tl.maximum(products, 0.0) * tl.load(weights + at, mask=there, other=0.0).to(tl.float32)[:, None]
        if sizes is not None:  # above 0, as of queries in the weights: they may wait behind the relu
            total *= tl.load(sizes + n, mask=n < keys, other=0.0)[None, :]
        tl.store(scores + m.to(tl.int64)[:, None] * stride + n[None, :], total, mask=there[:, None] & (n < keys)[None, :])


@triton.jit
def _ranks(scores, place, inside):
    """uint32 numbers in the order of scores [place], which are sums that began with 0.0, and so never -0.0"""
    bits = tl.load(scores + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _digit(rank, inside, threshold, DIGIT: tl.constexpr):
    """How many of the numbers that begin with the bits `threshold` have which 8 bits behind them [256]."""
    if DIGIT > 0:
        inside = inside & ((rank >> (32 - 8 * DIGIT)) == threshold)
    return tl.histogram(((rank >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 256, mask=inside)


@triton.jit
def _next(counts, threshold, need):
    """threshold with the 8 bits of the need-th highest number behind it, and how many of those that begin with these are among the highest"""
    bins = tl.arange(0, 256)
    last = tl.max(tl.where(tl.cumsum(counts, 0, reverse=True) >= need, bins, 0), 0)
    return (threshold << 8) | last.to(tl.uint32), need - tl.sum(tl.where(bins > last, counts, 0), 0)


@triton.jit
def _places(chosen, at, count, B: tl.constexpr):
    """Places at, at + 1, ... of a row's scores or, of a row that has them, those that are chosen; and which are below count."""
    n = at + tl.arange(0, B)
    if chosen is None:
        place = n
    else:
        place = tl.load(chosen + n, mask=n < count, other=0)
    return place, n < count


@triton.jit
def _best_of(scores, found, chosen, count, begin, K, B: tl.constexpr):
    """Of `best_keys`: found [K] of one row's first `count` scores, or of `count` that are chosen. The K-th highest is found 8 bits at a time, from
    the highest on, by counting."""
    threshold, need = tl.zeros((), tl.uint32), K  # bits of the score so far, and how many of those that begin with them are taken
    for digit in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for at in range(0, count, B):
            slots, inside = _places(chosen, at, count, B)
            counts += _digit(_ranks(scores, slots, inside), inside, threshold, digit)
        threshold, need = _next(counts, threshold, need)
    equal, written = 0, 0
    for at in range(0, count, B):
        slots, inside = _places(chosen, at, count, B)
        rank = _ranks(scores, slots, inside)
        ties = (inside & (rank == threshold)).to(tl.int32)
        taken = (inside & (rank > threshold)) | ((ties > 0) & (equal + tl.cumsum(ties, 0) <= need))
        to = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(found + to, begin + slots, mask=taken)
        equal += tl.sum(ties, 0)
        written += tl.sum(taken.to(tl.int32), 0)


@triton.jit(do_not_specialize=["place", "begin", "K"])
def best_keys(scores, found, chosen, stride, place, begin, K, CHOSEN, B: tl.constexpr, SAMPLE: tl.constexpr):
    """Grid (rows): found [rows, K], the keys of the K highest scores [rows, stride] in the order of their places, the first of equals. begin:
    the number of the first key. Query i sees keys up to place + i, and has no fewer than K.

    Of long rows a sample says above which score some 2 K lie, and these alone are counted, if they are at least K and have room in
    chosen [rows, CHOSEN].
    """
    row = tl.program_id(0).to(tl.int64)
    count = place + tl.program_id(0) + 1
    scores += row * stride
    found += row * K
    chosen += row * CHOSEN
    above = 0
    if (count > 2 * CHOSEN) & (count > 2 * SAMPLE) & (CHOSEN > 0):
        n = tl.arange(0, SAMPLE)  # 8 neighbours at a time, which are one sector of memory
        sample = _ranks(scores, n // 8 * (count // (SAMPLE // 8)) + n % 8, n < SAMPLE)
        threshold, need = tl.zeros((), tl.uint32), tl.cdiv(2 * K * SAMPLE, count)
        for digit in tl.static_range(4):
            threshold, need = _next(_digit(sample, n < SAMPLE, threshold, digit), threshold, need)
        for at in range(0, count, B):
            slots = at + tl.arange(0, B)
            taken = (slots < count) & (_ranks(scores, slots, slots < count) >= threshold)
            to = above + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(chosen + to, slots, mask=taken & (to < CHOSEN))
            above += tl.sum(taken.to(tl.int32), 0)
        tl.debug_barrier()  # what other threads have stored
    if (above >= K) & (above <= CHOSEN):
        _best_of(scores, found, chosen, above, begin, K, B)
    else:
        _best_of(scores, found, None, count, begin, K, B)


@triton.jit(do_not_specialize=["H", "HI", "first"])
def index_terms(
    q,
    latent,
    lse,
    iq,
    ik,
    weights,
    indices,
    stops,
    target,
    scores,
    first,
    scale,
    share,
    H,
    K,
    HI,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    DI: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (queries from first on, blocks of BK slots), for each of their slots that holds a key: target [queries, K], share times the sum of
    the heads' attention, and scores [queries, K] of the indexer."""
    row = tl.program_id(0).to(tl.int64)
    t, at = row + first, tl.program_id(1) * BK
    if at < tl.load(stops + t):
        slots, keys, held = _slots(indices, t, at, K, BK)
        value, rest = _tile(latent, keys, held, D, 0, R, BR), _tile(latent, keys, held, D, R, D, BP)
        attention = tl.zeros((BK,), tl.float32)
        for h in range(0, H, BH):
            heads = h + tl.arange(0, BH)
            there, rows = heads < H, t * H + heads
            products = tl.dot(rest, tl.trans(_tile(q, rows, there, D, R, D, BP)), input_precision=DOT)
            products = tl.dot(value, tl.trans(_tile(q, rows, there, D, 0, R, BR)), products, input_precision=DOT)
            level = tl.load(lse + rows, mask=there, other=float("inf")) * LOG2E
            attention += tl.sum(tl.exp2(products * (scale * LOG2E) - level[None, :]), 1)
        tl.store(target + row * K + slots, attention * share, mask=held)
        key = _tile(ik, keys, held, DI, 0, DI, BD)
        score = tl.zeros((BK,), tl.float32)
        for h in range(0, HI, BI):
            heads = h + tl.arange(0, BI)
            there, rows = heads < HI, t * HI + heads
            products = tl.dot(key, tl.trans(_tile(iq, rows, there, DI, 0, DI, BD)), input_precision=DOT)
            weight = tl.load(weights + rows, mask=there, other=0.0).to(tl.float32)
            score += tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1)
        tl.store(scores + row * K + slots, score, mask=held)


@triton.jit(do_not_specialize=["HI"])
def index_query_gradients(
    iq,
    ik,
    weights,
    indices,
    stops,
    dscores,
    factor,
    diq,
    dweights,
    HI,
    K,
    DI: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (T, blocks of BI heads): diq [T, HI, DI] and dweights [T, HI], from dscores [T, K] times factor []."""
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BI + tl.arange(0, BI)
    there, rows = heads < HI, t * HI + heads
    query = _tile(iq, rows, there, DI, 0, DI, BD)
    sums, of_weights = tl.zeros((BI, BD), tl.float32), tl.zeros((BI,), tl.float32)
    for at in range(0, tl.load(stops + t), BK):
        slots, keys, held = _slots(indices, t, at, K, BK)
        key = _tile(ik, keys, held, DI, 0, DI, BD)
        products = tl.dot(query, tl.trans(key), input_precision=DOT)
        back = tl.where(products > 0, tl.load(dscores + t * K + slots, mask=held, other=0.0)[None, :], 0.0)
        of_weights += tl.sum(back * products, 1)
        sums = tl.dot(back.to(key.dtype), key, sums, input_precision=DOT)
    times = tl.load(factor)
    weight = tl.load(weights + rows, mask=there, other=0.0).to(tl.float32)
    _put(diq, sums * (weight * times)[:, None], rows, there, DI, 0, DI, BD)
    tl.store(dweights + rows, (of_weights * times).to(dweights.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["HI", "first"])
def index_key_parts(
    iq,
    ik,
    weights,
    indices,
    stops,
    dscores,
    parts,
    first,
    HI,
    K,
    DI: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (queries from first on, blocks of BK slots): parts [queries, K, DI] of the gradient of ik, up to the stops."""
    row = tl.program_id(0).to(tl.int64)
    t, at = row + first, tl.program_id(1) * BK
    if at < tl.load(stops + t):
        slots, keys, held = _slots(indices, t, at, K, BK)
        key = _tile(ik, keys, held, DI, 0, DI, BD)
        dscore = tl.load(dscores + t * K + slots, mask=held, other=0.0)
        sums = tl.zeros((BK, BD), tl.float32)
        for h in range(0, HI, BI):
            heads = h + tl.arange(0, BI)
            there, rows = heads < HI, t * HI + heads
            query = _tile(iq, rows, there, DI, 0, DI, BD)
            weight = tl.load(weights + rows, mask=there, other=0.0).to(tl.float32)
            products = tl.dot(key, tl.trans(query), input_precision=DOT)
            back = tl.where(products > 0, dscore[:, None] * weight[None, :], 0.0)
            sums = tl.dot(back.to(query.dtype), query, sums, input_precision=DOT)
        _put(parts, sums, row * K + slots, held, DI, 0, DI, BD)
