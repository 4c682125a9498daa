"""Which blocks of keys a query selects, on a GPU: what one program computes. `triton_choice` launches these.

Scores of blocks are made for some queries at a time and read by `best_blocks`. Query i of such a run has the place `place` + i in its document.
"""

import triton
import triton.language as tl

from ltrain.kernels.sparse_attention.triton_kernels_blocks import LOG2E, load


@triton.jit(do_not_specialize=["rows", "place", "blocks", "stride"])
def importance(
    q,
    k,
    lse,
    scores,
    rows,
    place,
    blocks,
    stride,
    scale,
    H: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    LENGTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BJ: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (tiles of TOGETHER selected blocks, blocks of ROWS queries, K/V heads): scores [rows, HK, stride], for each block up to a query's own
    the attention, summed over the heads of the group, to compressed blocks k [blocks, HK, D] of LENGTH tokens at every STEP-th, times the
    steps that both share (NSA, equations 9 and 10)."""
    row, kv = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    there = row < rows
    last = place + tl.minimum(tl.program_id(1) * ROWS + ROWS, rows) - 1
    first = tl.program_id(0) * TOGETHER
    if first * BLOCK <= last:
        number = first + tl.arange(0, BJ)
        ended = tl.maximum(place + row - LENGTH + 1 + STEP, 0) // STEP
        begin = tl.maximum(first * BLOCK - LENGTH + STEP, 0) // STEP
        end = tl.minimum((first + TOGETHER) * BLOCK + STEP - 1, tl.maximum(last - LENGTH + 1 + STEP, 0)) // STEP
        total = tl.zeros((ROWS, BJ), tl.float32)
        for at in range(begin, end, COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            key = load(k, columns.to(tl.int64) * HK + kv, columns < blocks, D, BD)
            p = tl.zeros((ROWS, COLUMNS), tl.float32)
            for member in range(H // HK):
                head = row.to(tl.int64) * H + kv * (H // HK) + member
                product = tl.dot(load(q, head, there, D, BD), tl.trans(key), input_precision=DOT)
                level = tl.load(lse + head, mask=there, other=0.0) * LOG2E
                p += tl.exp2(product * (scale * LOG2E) - level[:, None])
            # before the first block has ended the log-sum-exp is -inf, and p anything
            p = tl.where(columns[None, :] < tl.minimum(ended, end)[:, None], p, 0.0)
            tokens, of_block = columns[:, None] * STEP, number[None, :] * BLOCK
            shared = tl.maximum(tl.minimum(tokens + LENGTH, of_block + BLOCK) - tl.maximum(tokens, of_block), 0) // STEP
            if EXACT:
                total = tl.dot(p, shared.to(tl.float32), total, input_precision="ieee")
            else:  # in two halves of 8 bits each: few of the steps are shared, and numbers below 257 are bfloat16
                high = p.to(tl.bfloat16)
                total = tl.dot(high, shared.to(tl.bfloat16), total)
                total = tl.dot((p - high.to(tl.float32)).to(tl.bfloat16), shared.to(tl.bfloat16), total)
        inside = there[:, None] & (number < first + TOGETHER)[None, :] & (number[None, :] * BLOCK <= (place + row)[:, None])
        tl.store(scores + (row.to(tl.int64) * HK + kv)[:, None] * stride + number[None, :], total, mask=inside)


@triton.jit
def means(k, found, starts, stops, HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Grid (blocks, K/V heads): found [blocks, HK, D], the mean key of each block."""
    block, kv = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(starts + block), tl.load(stops + block)
    total = tl.zeros((BD,), tl.float32)
    for at in range(first, stop, ROWS):
        keys = at + tl.arange(0, ROWS)
        total += tl.sum(load(k, keys.to(tl.int64) * HK + kv, keys < stop, D, BD).to(tl.float32), 0)
    columns = tl.arange(0, BD)
    mean = total / tl.maximum(stop - first, 1).to(tl.float32)
    tl.store(found + (block.to(tl.int64) * HK + kv) * D + columns, mean.to(found.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["rows", "place", "blocks", "stride"])
def products(
    q,
    k,
    scores,
    rows,
    place,
    blocks,
    stride,
    H: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (tiles of COLUMNS blocks, blocks of ROWS queries, heads): scores [rows, H, stride] of queries and k [blocks, HK, D], where a query's own
    block is not before the tile's first."""
    row, h = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    there, head = row < rows, row.to(tl.int64) * H + h
    if tl.program_id(0) * COLUMNS * BLOCK <= place + tl.minimum(tl.program_id(1) * ROWS + ROWS, rows) - 1:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        key = load(k, columns.to(tl.int64) * HK + h // (H // HK), columns < blocks, D, BD)
        product = tl.dot(load(q, head, there, D, BD), tl.trans(key), input_precision=DOT)
        kept = columns < tl.minimum(blocks, stride)  # a row has no numbers for blocks behind its part
        tl.store(scores + head[:, None] * stride + columns[None, :], product, mask=there[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["rows", "place", "stride"])
def best_blocks(
    scores,
    found,
    rows,
    place,
    stride,
    S: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (blocks of ROWS selections): found [queries, S, TOP], of scores [queries, S, stride] the numbers of the best blocks up to a query's own,
    the last LOCAL and the FIRST ones before all others; of equals the first, -1 where there are fewer. rows: queries * S."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, B)[None, :]
    behind = ((place + row // S) // BLOCK).to(tl.int32)[:, None] - number
    seen = (row < rows)[:, None] & (behind >= 0)
    score = tl.load(scores + row[:, None] * stride + number, mask=seen, other=float("-inf"))
    score = tl.where(score == score, score, 0.0)  # a block it must be, even of what is no number
    score = tl.where(seen & ((behind < LOCAL) | (number < FIRST)), float("inf"), score)
    for slot in range(TOP):
        best = tl.max(score, 1)
        chosen = tl.min(tl.where(score == best[:, None], number, B), 1)
        tl.store(found + row * TOP + slot, tl.where(best == float("-inf"), -1, chosen), mask=row < rows)
        score = tl.where(number == chosen[:, None], float("-inf"), score)
