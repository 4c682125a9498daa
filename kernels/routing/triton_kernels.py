"""The programs of routing. Rows and slots are int32, what addresses are made of is int64."""

import triton
import triton.language as tl

SIZES = ["tokens", "n", "blocks"]
LOWEST = tl.constexpr(-(2**31))  # below what any number is as an integer: a column that is taken or absent


@triton.jit
def ranked(x, there):
    """Floats as integers in the same order, LOWEST where not there. NaN is above all, none has the bits of LOWEST, and both zeros are one."""
    bits = tl.where(x != x, float("inf"), x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(there, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit(do_not_specialize=SIZES)
def best(scores, found, tokens, E, K, ROWS: tl.constexpr, BE: tl.constexpr):
    """Grid (tokens / ROWS): scores [T, E] -> found [T, K]. Floats are compared as integers, which no -inf makes equal to a column that is
    taken already."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BE)
    inside = t < tokens
    x = tl.load(scores + t[:, None] * E + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    bits = ranked(x, (e < E)[None, :])
    for j in range(K):
        chosen = tl.argmax(bits, 1, tie_break_left=True)
        tl.store(found + t * K + j, chosen.to(tl.int64), mask=inside)
        bits = tl.where(e[None, :] == chosen[:, None], LOWEST, bits)


@triton.jit(do_not_specialize=SIZES)
def count(slots, counts, n, E, blocks, B: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (blocks): slots [n] -> counts [E, blocks], how often each expert is in a block of B"""
    block = tl.program_id(0)
    at = block * B + tl.arange(0, B)
    expert = tl.load(slots + at, mask=at < n, other=-1).to(tl.int32)
    for first in range(0, E, COLUMNS):
        e = first + tl.arange(0, COLUMNS)
        found = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts + e.to(tl.int64) * blocks + block, found, mask=e < E)


@triton.jit(do_not_specialize=SIZES)
def place(slots, firsts, order, places, n, blocks, B: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (blocks): firsts [E, blocks], the first row of an expert's slots of a block -> order and places [n]"""
    block = tl.program_id(0)
    rows = tl.arange(0, B)
    at = block * B + rows
    inside = at < n
    expert = tl.load(slots + at, mask=inside, other=-1).to(tl.int32)
    before = tl.zeros((B,), dtype=tl.int32)  # slots of the same expert in this block
    for first in range(0, B, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        other = tl.load(slots + block * B + columns, mask=block * B + columns < n, other=-1).to(tl.int32)
        before += tl.sum(((expert[:, None] == other[None, :]) & (columns[None, :] < rows[:, None])).to(tl.int32), 1)
    row = tl.load(firsts + expert.to(tl.int64) * blocks + block, mask=inside, other=0) + before
    tl.store(places + at, row, mask=inside)
    tl.store(order + row, at, mask=inside)


@triton.jit
def copy_rows(x, order, weights, y, D, K, BD: tl.constexpr):
    """Grid (T K, D / BD): y [T K, D], row r of it x [T, D]'s of token order[r] // K, times weights[order[r]] where given"""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    number = tl.load(x + (slot // K).to(tl.int64) * D + columns, mask=columns < D, other=0.0)
    if weights is not None:
        number = number.to(tl.float32) * tl.load(weights + slot).to(tl.float32)
    tl.store(y + row * D + columns, number.to(y.dtype.element_ty), mask=columns < D)


@triton.jit
def sum_rows(y, places, weights, x, D, K, BD: tl.constexpr):
    """Grid (T, D / BD): x [T, D], the sum of y [T K, D]'s rows places[t K + j], times weights [T, K] where given, in float32"""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), dtype=tl.float32)
    for j in range(K):
        row = tl.load(places + token * K + j).to(tl.int64)
        number = tl.load(y + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        if weights is not None:
            number *= tl.load(weights + token * K + j).to(tl.float32)
        total += number
    tl.store(x + token * D + columns, total.to(x.dtype.element_ty), mask=columns < D)


@triton.jit
def multiply_rows(grad, y, places, found, D, K, BD: tl.constexpr):
    """Grid (T K): found [T K], the product of grad's [T, D] row of a slot's token and y's [T K, D] row places[slot]"""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(places + slot).to(tl.int64)
    total = tl.zeros((BD,), dtype=tl.float32)
    for first in range(0, D, BD):
        columns = first + tl.arange(0, BD)
        a = tl.load(grad + (slot // K) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        total += a * tl.load(y + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(found + slot, tl.sum(total, 0))
