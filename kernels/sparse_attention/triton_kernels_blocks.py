"""Attention over selected blocks of keys on a GPU: what one program computes. `triton_blocks` launches these.

A pair is a query, of a run of M heads that share a selection, and a block that it selected. `order` has the pairs of a K/V head and block one
after another, an item is a stretch of them: a program keeps to one block of keys and gathers the queries that chose it. MP is M rounded up to
a power of two, and ROWS // MP pairs are the rows of a tile. Row `pair // TOP * M` of [queries * H, ...] is a pair's first head.

A product's result is never transposed for another product: Triton 3.4 to 3.7 computes that wrongly on Hopper.
Source: NSA (Yuan et al. 2025, arXiv 2502.11089), section 3.4; FlashAttention-2 (Dao 2023), its forward and backward recurrences.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ITEM = tl.constexpr(4)  # numbers of an item: K/V head * NB + block, the places of its pairs in order [from, to), and its number among extra ones
REST = tl.constexpr(4)  # numbers of a query and head that gradients are made with, two of them used


@triton.jit
def load(x, rows, there, WIDTH: tl.constexpr, B: tl.constexpr):
    """x[rows] of [n, WIDTH], zeros where not there -> [rows, B]"""
    columns = tl.arange(0, B)
    return tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=there[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def put(x, value, rows, there, WIDTH: tl.constexpr, B: tl.constexpr):
    columns = tl.arange(0, B)
    at = x + rows[:, None] * WIDTH + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=there[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _keys(x, first, stop, kv, HK: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first, first + 1, ... of a head of x [n, HK, WIDTH], zeros from row `stop` on -> [COLUMNS, B]"""
    row, columns = tl.arange(0, COLUMNS), tl.arange(0, B)
    at = x + (first.to(tl.int64) * HK + kv) * WIDTH + (row[:, None] * (HK * WIDTH) + columns[None, :])
    return tl.load(at, mask=(first + row < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _members(order, highs, at, end, H: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr):
    """Of the pairs at, at + 1, ... up to `end`: whether there is such a row, its number among the pairs' rows and among all queries' heads,
    and the key at which what its query sees ends. int32 is enough for addresses: `triton_blocks.PARTS` bounds a chunk's."""
    place, member = at + tl.arange(0, ROWS) // MP, tl.arange(0, ROWS) % MP
    there = (place < end) & (member < M)
    pair = tl.load(order + place, mask=there, other=0)
    high = tl.load(highs + pair // TOP // (H // M), mask=there, other=0)
    return there, pair * M + member, pair // TOP * M + member, high


@triton.jit
def _advance(highest, total, sums, query, key, value, keys, limit, factor, DOT: tl.constexpr, MASKED: tl.constexpr):
    """The running maximum (to base 2), sum of exponentials and weighted sum of values, a tile of keys later."""
    scores = tl.dot(query, tl.trans(key), input_precision=DOT)
    if MASKED:
        scores = tl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * factor)
    base = new
    if MASKED:
        base = tl.where(new == float("-inf"), 0.0, new)  # no key so far
    fade, p = tl.exp2(highest - base), tl.exp2(scores * factor - base[:, None])
    return new, total * fade + tl.sum(p, 1), tl.dot(p.to(value.dtype), value, sums * fade[:, None], input_precision=DOT)


@triton.jit
def _stretches(first, limit, there, COLUMNS: tl.constexpr):
    """How many tiles of keys every row sees whole, and how many a row sees some of."""
    all_see = tl.min(tl.where(there, limit, 2147483647), 0)
    return tl.maximum(all_see - first, 0) // COLUMNS, (tl.maximum(tl.max(limit, 0) - first, 0) + COLUMNS - 1) // COLUMNS


@triton.jit(do_not_specialize=["NB"])
def attend(
    q,
    k,
    v,
    order,
    items,
    starts,
    stops,
    highs,
    out,
    lse,
    scale,
    NB,
    H: tl.constexpr,
    HK: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TOP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (items): out [pairs, M, DV] and lse [pairs, M], natural logarithms, of each pair's block alone. WHOLE: a block is one tile.

    The last items come first: where blocks are documents, their queries see the most.
    """
    of = items + (tl.num_programs(0) - 1 - tl.program_id(0)) * ITEM
    begin, end = tl.load(of + 1), tl.load(of + 2)
    if begin < end:
        which = tl.load(of)
        kv, block = which // NB, which % NB
        first, stop = tl.load(starts + block), tl.load(stops + block)
        factor = scale * LOG2E
        if WHOLE:
            keys = first + tl.arange(0, COLUMNS)
            key, value = _keys(k, first, stop, kv, HK, D, BD, COLUMNS), _keys(v, first, stop, kv, HK, DV, BV, COLUMNS)
        for at in range(begin, end, ROWS // MP):
            there, pair, row, high = _members(order, highs, at, end, H, M, MP, TOP, ROWS)
            query, limit = load(q, row, there, D, BD), tl.minimum(high, stop)
            highest = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, BV), tl.float32)
            if WHOLE:
                highest, total, sums = _advance(highest, total, sums, query, key, value, keys, limit, factor, DOT, True)
            else:
                whole, seen = _stretches(first, limit, there, COLUMNS)
                for tile in range(whole):
                    at_key = first + tile * COLUMNS
                    keys = at_key + tl.arange(0, COLUMNS)
                    key, value = _keys(k, at_key, stop, kv, HK, D, BD, COLUMNS), _keys(v, at_key, stop, kv, HK, DV, BV, COLUMNS)
                    highest, total, sums = _advance(highest, total, sums, query, key, value, keys, limit, factor, DOT, False)
                for tile in range(whole, seen):
                    at_key = first + tile * COLUMNS
                    keys = at_key + tl.arange(0, COLUMNS)
                    key, value = _keys(k, at_key, stop, kv, HK, D, BD, COLUMNS), _keys(v, at_key, stop, kv, HK, DV, BV, COLUMNS)
                    highest, total, sums = _advance(highest, total, sums, query, key, value, keys, limit, factor, DOT, True)
            divisor = tl.where(total > 0, total, 1.0)
            put(out, sums / divisor[:, None], pair, there, DV, BV)
            tl.store(lse + pair, highest / LOG2E + tl.log(divisor), mask=there)


@triton.jit(do_not_specialize=["rows"])
def merge(parts, part_lse, indices, out, lse, rows, M: tl.constexpr, TOP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """Grid (blocks of ROWS heads of queries): out [rows, DV] and lse [rows] over the pairs of each, [rows / M, TOP, M, ...]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for slot in range(TOP):
        pair = row // M * TOP + slot
        held = (row < rows) & (tl.load(indices + pair, mask=row < rows, other=-1) >= 0)
        highest = tl.maximum(highest, tl.load(part_lse + pair * M + row % M, mask=held, other=float("-inf")))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BV), tl.float32)
    for slot in range(TOP):
        pair = row // M * TOP + slot
        held = (row < rows) & (tl.load(indices + pair, mask=row < rows, other=-1) >= 0)
        weight = tl.exp2((tl.load(part_lse + pair * M + row % M, mask=held, other=float("-inf")) - base) * LOG2E)
        total += weight
        sums += load(parts, pair * M + row % M, held, DV, BV).to(tl.float32) * weight[:, None]
    divisor = tl.where(total > 0, total, 1.0)
    put(out, sums / divisor[:, None], row, row < rows, DV, BV)
    tl.store(lse + row, highest + tl.log(divisor), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def add(parts, indices, out, rows, M: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Grid (blocks of ROWS heads of queries): out [rows, D], the sum over the pairs of each, in their order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BD), tl.float32)
    for slot in range(TOP):
        pair = row // M * TOP + slot
        held = (row < rows) & (tl.load(indices + pair, mask=row < rows, other=-1) >= 0)
        sums += load(parts, pair * M + row % M, held, D, BD).to(tl.float32)
    put(out, sums, row, row < rows, D, BD)


@triton.jit(do_not_specialize=["rows"])
def remember(out, dout, lse, dlse, rest, rows, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """Grid (blocks of ROWS heads of queries): rest [rows, REST], lse to base 2, and the sum of out times its gradient less that of lse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    pull = tl.sum(load(out, row, there, DV, BV).to(tl.float32) * load(dout, row, there, DV, BV).to(tl.float32), 1)
    tl.store(rest + row * REST, tl.load(lse + row, mask=there, other=0.0) * LOG2E, mask=there)
    tl.store(rest + row * REST + 1, pull - tl.load(dlse + row, mask=there, other=0.0), mask=there)


@triton.jit
def _remembered(rest, row, there, ROWS: tl.constexpr):
    """Of `remember`, both in one load: of tiles with fewer numbers than threads Triton lets each thread load all that it needs, one by one."""
    both = load(rest, row, there, REST, REST)
    even, odd = tl.split(tl.reshape(both, (ROWS, 2, 2)))
    return tl.split(even)[0], tl.split(odd)[0]


@triton.jit
def _query_step(sums, query, grad, level, less, key, value, keys, limit, factor, DOT: tl.constexpr, MASKED: tl.constexpr):
    """The gradient of queries, to be scaled, a tile of keys later."""
    scores = tl.dot(query, tl.trans(key), input_precision=DOT) * factor - level[:, None]
    if MASKED:
        scores = tl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    back = tl.exp2(scores) * (tl.dot(grad, tl.trans(value), input_precision=DOT) - less[:, None])
    return tl.dot(back.to(key.dtype), key, sums, input_precision=DOT)


@triton.jit(do_not_specialize=["NB"])
def query_gradients(
    q,
    k,
    v,
    order,
    items,
    starts,
    stops,
    highs,
    dout,
    rest,
    dq,
    scale,
    NB,
    H: tl.constexpr,
    HK: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TOP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (items): dq [pairs, M, D], what each pair's block gives; otherwise as `attend`."""
    of = items + (tl.num_programs(0) - 1 - tl.program_id(0)) * ITEM
    begin, end = tl.load(of + 1), tl.load(of + 2)
    if begin < end:
        which = tl.load(of)
        kv, block = which // NB, which % NB
        first, stop = tl.load(starts + block), tl.load(stops + block)
        factor = scale * LOG2E
        if WHOLE:
            keys = first + tl.arange(0, COLUMNS)
            key, value = _keys(k, first, stop, kv, HK, D, BD, COLUMNS), _keys(v, first, stop, kv, HK, DV, BV, COLUMNS)
        for at in range(begin, end, ROWS // MP):
            there, pair, row, high = _members(order, highs, at, end, H, M, MP, TOP, ROWS)
            query, grad, limit = load(q, row, there, D, BD), load(dout, row, there, DV, BV), tl.minimum(high, stop)
            level, less = _remembered(rest, row, there, ROWS)
            sums = tl.zeros((ROWS, BD), tl.float32)
            if WHOLE:
                sums = _query_step(sums, query, grad, level, less, key, value, keys, limit, factor, DOT, True)
            else:
                whole, seen = _stretches(first, limit, there, COLUMNS)
                for tile in range(whole):
                    at_key = first + tile * COLUMNS
                    keys = at_key + tl.arange(0, COLUMNS)
                    key, value = _keys(k, at_key, stop, kv, HK, D, BD, COLUMNS), _keys(v, at_key, stop, kv, HK, DV, BV, COLUMNS)
                    sums = _query_step(sums, query, grad, level, less, key, value, keys, limit, factor, DOT, False)
                for tile in range(whole, seen):
                    at_key = first + tile * COLUMNS
                    keys = at_key + tl.arange(0, COLUMNS)
                    key, value = _keys(k, at_key, stop, kv, HK, D, BD, COLUMNS), _keys(v, at_key, stop, kv, HK, DV, BV, COLUMNS)
                    sums = _query_step(sums, query, grad, level, less, key, value, keys, limit, factor, DOT, True)
            put(dq, sums * scale, pair, there, D, BD)


@triton.jit(do_not_specialize=["NB"])
def key_gradients(
    q,
    k,
    v,
    order,
    items,
    starts,
    stops,
    highs,
    dout,
    rest,
    dk,
    dv,
    extra_dk,
    extra_dv,
    scale,
    NB,
    H: tl.constexpr,
    HK: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TOP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (items, tiles of COLUMNS keys of the longest block): what an item's pairs give the gradients of its block's keys and values. The first
    item of a block adds it to dk [n, HK, D] and dv [n, HK, DV] in float32, others write it to extra_* [extra items, tiles, COLUMNS, ...]."""
    of = items + tl.program_id(0) * ITEM
    begin, end = tl.load(of + 1), tl.load(of + 2)
    which = tl.load(of)
    kv, block = which // NB, which % NB
    first, stop = tl.load(starts + block) + tl.program_id(1) * COLUMNS, tl.load(stops + block)
    if (begin < end) & (first < stop):
        STEP: tl.constexpr = ROWS // MP
        factor = scale * LOG2E
        keys = first + tl.arange(0, COLUMNS)
        key, value = _keys(k, first, stop, kv, HK, D, BD, COLUMNS), _keys(v, first, stop, kv, HK, DV, BV, COLUMNS)
        if not WHOLE:  # the queries follow each other: those before a block's later keys see none of them
            low, high = tl.zeros((), tl.int32), (end - begin + STEP - 1) // STEP
            while low < high:
                middle = (low + high) // 2
                last = tl.load(order + tl.minimum(begin + (middle + 1) * STEP, end) - 1)
                sees = tl.load(highs + last // TOP // (H // M)) > first
                low, high = tl.where(sees, low, middle + 1), tl.where(sees, middle, high)
            begin += low * STEP
        sums, value_sums = tl.zeros((COLUMNS, BD), tl.float32), tl.zeros((COLUMNS, BV), tl.float32)
        for at in range(begin, end, STEP):
            there, pair, row, limit = _members(order, highs, at, end, H, M, MP, TOP, ROWS)
            query, grad = load(q, row, there, D, BD), load(dout, row, there, DV, BV)
            level, less = _remembered(rest, row, there, ROWS)
            scores = tl.dot(key, tl.trans(query), input_precision=DOT) * factor - level[None, :]
            p = tl.exp2(tl.where(keys[:, None] < limit[None, :], scores, float("-inf")))
            value_sums = tl.dot(p.to(grad.dtype), grad, value_sums, input_precision=DOT)
            back = p * (tl.dot(value, tl.trans(grad), input_precision=DOT) - less[None, :])
            sums = tl.dot(back.to(query.dtype), query, sums, input_precision=DOT)
        number = tl.load(of + 3)
        if number < 0:
            rows, there = keys.to(tl.int64) * HK + kv, keys < stop
            put(dk, load(dk, rows, there, D, BD) + sums * scale, rows, there, D, BD)
            put(dv, load(dv, rows, there, DV, BV) + value_sums, rows, there, DV, BV)
        else:
            to = (number.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
            put(extra_dk, sums * scale, to, keys < stop, D, BD)
            put(extra_dv, value_sums, to, keys < stop, DV, BV)


@triton.jit(do_not_specialize=["NB"])
def add_extra(
    extra_dk,
    extra_dv,
    bounds,
    starts,
    stops,
    dk,
    dv,
    NB,
    HK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (K/V heads * NB, tiles of COLUMNS keys): dk and dv += those of a block's extra items, from bounds[which] to bounds[which + 1]."""
    which = tl.program_id(0)
    begin, end = tl.load(bounds + which).to(tl.int64), tl.load(bounds + which + 1).to(tl.int64)
    first, stop = tl.load(starts + which % NB) + tl.program_id(1) * COLUMNS, tl.load(stops + which % NB)
    if (begin < end) & (first < stop):
        keys = first + tl.arange(0, COLUMNS)
        rows, there = keys.to(tl.int64) * HK + which // NB, keys < stop
        sums, value_sums = load(dk, rows, there, D, BD), load(dv, rows, there, DV, BV)
        for number in range(begin, end):
            at = (number * tl.num_programs(1) + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
            sums += load(extra_dk, at, there, D, BD)
            value_sums += load(extra_dv, at, there, DV, BV)
        put(dk, sums, rows, there, D, BD)
        put(dv, value_sums, rows, there, DV, BV)
