"""The programs of recurrences that only add, beside `forward.prepare` and `forward.read`; from `pair_gradients` on of decays per channel, the
others are in `heads`. See the package.

Their chunks have several blocks of C tokens. A state is kept for a chunk only; tokens of different blocks of one meet as in attention, block
by block. What decays from token i to token t of a later block is what decays from i to the end of its block, in the blocks between, and from
the start of t's block to t: each a factor of at most 1, which prepare leaves for every block.
"""

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence.triton_kernels.forward import COUNTS
from ltrain.kernels.linear_recurrence.triton_kernels.tiles import (
    ALL,
    CHANNEL,
    HALVES,
    HEAD,
    LEVELS,
    add_rows,
    decays,
    factors_of_halves,
    factors_of_level,
    fade_of,
    fades_of_rows,
    numbers_at,
    place_of,
    products_of_rows,
    put,
    split,
    state_at,
    state_transposed,
    tile,
    tile_transposed,
)


@triton.jit(do_not_specialize=COUNTS)
def add_chunks(
    x,
    y,
    factors,
    fade,
    begins,
    ends,
    firsts,
    added,
    left,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    BACKWARD: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H, K / BK V / BV) -> added [chunks, H, K, V] = scale sum_t f_t x_t y_t^T over each chunk's tokens, f_t being what is left
    at the chunk's end (its start where BACKWARD); of decays per channel left [chunks, H, K]: what the chunk leaves of a state.

    What its writes add to the state (x: keys, y: values) or, BACKWARD, its reads to the gradient (x: queries, y: dO). factors [T, H]: of
    decays per head. Those per channel are in x [T, H, K] already for the block of t; those of the blocks between are in fade [blocks, H, K].
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    parts = tl.cdiv(K, BK)
    row, column = tl.program_id(2) % parts * BK, tl.program_id(2) // parts * BV
    begin = tl.load(begins + chunk)
    length = tl.load(ends + chunk) - begin
    block, step = tl.load(firsts + chunk), 1
    count = tl.cdiv(length, C)
    rows = tl.arange(0, C)
    if BACKWARD:
        rows += (count - 1) * C
        block, step = block + count - 1, -1
    state = tl.zeros((BK, BV), dtype=tl.float32)
    if DECAY == CHANNEL:
        whole = fade_of(fade, block, True, h, H, K, DECAY, BK, row)
        following = whole
    for done in range(count):
        t, inside = (begin.to(tl.int64), rows), rows < length
        write = tile(y, t, inside, h, H, V, BV, column)
        if DECAY == CHANNEL:
            key = tile_transposed(x, t, inside, h, H, K, BK, row)
        else:
            key = tile_transposed(x, t, inside, h // G, H // G, K, BK, row)
        if DECAY == HEAD:
            write = (write * tl.load(numbers_at(factors, t, h, H), mask=inside, other=0.0)[:, None]).to(x.dtype.element_ty)
        if DECAY == CHANNEL:
            state *= following
            if done > 0:
                whole *= following
            following = fade_of(fade, block + step * (done + 1), done + 1 < count, h, H, K, DECAY, BK, row)
        state += tl.dot(key, write, input_precision=DOT)
        rows += step * C
    at, exists = state_at(added, chunk * H + h, K, V, BK, BV, row, column)
    tl.store(at, (state * scale).to(added.dtype.element_ty), mask=exists)
    if DECAY == CHANNEL and column == 0:
        channels = row + tl.arange(0, BK)
        tl.store(left + (chunk * H + h).to(tl.int64) * K + channels[:, None], whole, mask=(channels < K)[:, None])


@triton.jit
def _of_chunk(states, left, chunk, exists, h, H, K, V, place, inside, DECAY: tl.constexpr):
    """Of `accumulate`: what a chunk adds and, of decays, leaves."""
    added = tl.load(states + (chunk * H + h).to(tl.int64) * K * V + place, mask=inside & exists, other=0.0)
    if DECAY == CHANNEL:
        leaves = tl.load(left + (chunk * H + h).to(tl.int64) * K + place // V, mask=inside & exists, other=1.0)
    elif DECAY == HEAD:
        leaves = tl.load(left + (chunk * H + h).to(tl.int64), mask=exists, other=1.0)
    else:
        leaves = 1.0
    return added, leaves


@triton.jit
def _meet(states, chunk, exists, state, added, leaves, h, H, K, V, place, inside, TRACE: tl.constexpr):
    """Of `accumulate`: the state is kept, fades and is added to."""
    if TRACE:
        tl.store(states + (chunk * H + h).to(tl.int64) * K * V + place, state.to(states.dtype.element_ty), mask=inside & exists)
    return state * leaves + added.to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def accumulate(
    states,
    left,
    bounds,
    initial,
    final,
    H,
    K,
    V,
    N: tl.constexpr,
    DECAY: tl.constexpr,
    BACKWARD: tl.constexpr,
    TRACE: tl.constexpr,
):
    """Grid (segments, H, K V / N): turns states [chunks, H, K, V] from what each chunk adds to what is there before it, in the order of the
    chunks or from the last one back, and without a TRACE leaves them; initial (None: zeros) and final (None: not wanted) [N, H, K, V] stand
    before and after all of a segment."""
    segment, h = tl.program_id(0), tl.program_id(1)
    place = tl.program_id(2) * N + tl.arange(0, N)
    inside = place < K * V
    whole = (segment * H + h).to(tl.int64) * K * V
    if initial is None:
        state = tl.zeros((N,), dtype=tl.float32)
    else:
        state = tl.load(initial + whole + place, mask=inside, other=0.0)
    a = tl.load(bounds + segment)
    count = tl.load(bounds + segment + 1) - a
    step = 1
    if BACKWARD:
        a, step = a + count - 1, -1
    # Chunks are loaded four at a time, and the next four before these are met: each load waits for memory, and the next state for each.
    add_a, leave_a = _of_chunk(states, left, a, count > 0, h, H, K, V, place, inside, DECAY)
    add_b, leave_b = _of_chunk(states, left, a + step, count > 1, h, H, K, V, place, inside, DECAY)
    add_c, leave_c = _of_chunk(states, left, a + 2 * step, count > 2, h, H, K, V, place, inside, DECAY)
    add_d, leave_d = _of_chunk(states, left, a + 3 * step, count > 3, h, H, K, V, place, inside, DECAY)
    for done in range(0, count, 4):
        more = count - done
        next_a, remain_a = _of_chunk(states, left, a + 4 * step, more > 4, h, H, K, V, place, inside, DECAY)
        next_b, remain_b = _of_chunk(states, left, a + 5 * step, more > 5, h, H, K, V, place, inside, DECAY)
        next_c, remain_c = _of_chunk(states, left, a + 6 * step, more > 6, h, H, K, V, place, inside, DECAY)
        next_d, remain_d = _of_chunk(states, left, a + 7 * step, more > 7, h, H, K, V, place, inside, DECAY)
        state = _meet(states, a, True, state, add_a, leave_a, h, H, K, V, place, inside, TRACE)
        state = _meet(states, a + step, more > 1, state, add_b, leave_b, h, H, K, V, place, inside, TRACE)
        state = _meet(states, a + 2 * step, more > 2, state, add_c, leave_c, h, H, K, V, place, inside, TRACE)
        state = _meet(states, a + 3 * step, more > 3, state, add_d, leave_d, h, H, K, V, place, inside, TRACE)
        add_a, add_b, add_c, add_d = next_a, next_b, next_c, next_d
        leave_a, leave_b, leave_c, leave_d = remain_a, remain_b, remain_c, remain_d
        a += 4 * step
    if final is not None:
        tl.store(final + whole + place, state, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def pair_gradients(
    q,
    k,
    v,
    do,
    decay,
    reader,
    writer,
    fade,
    levels_from,
    halves,
    states,
    dstates,
    starts,
    chunks,
    begins,
    ends,
    dq,
    dk,
    moved,
    recalled,
    scale,
    H,
    G,
    K,
    V,
    levels,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks * K / BK, H) -> dq, dk [T, H, K], and for `decay_gradients`: moved = q_t dq_t - k_t dk_t [T, H, K], and what of q_t dq_t comes
    from the state before the chunk, summed over the block: recalled [blocks, H, K]. states and dstates [chunks, H, K, V]: before each chunk, and
    of those after it. Both gradients in one program: in programs of their own, two at once on a processor, they took 2.20 ms in place of 2.13."""
    tl.static_assert(PAIRS != ALL)
    parts = tl.cdiv(K, BK)
    block, part, h = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    if (tl.load(levels_from + block * H + h) == levels - 1) != (PAIRS == HALVES):
        return
    chunk, t, length, before, after = place_of(block, starts, chunks, begins, ends, C)
    here = part * BK
    rows, channels = tl.arange(0, C), here + tl.arange(0, BK)
    inside = t[1] < length
    dtype = k.dtype.element_ty
    exist = channels < K
    reading = tl.zeros((C, BK), dtype=tl.float32)
    storing = tl.zeros((C, BK), dtype=tl.float32)
    across_before = tl.full((BK,), 1.0, dtype=tl.float32)
    across_after = tl.full((BK,), 1.0, dtype=tl.float32)
    # Through the scores with the other blocks of the chunk, the farthest first: what is there already fades over each.
    if BLOCKS > 1:
        for n in range(before):
            others = t[0], t[1] - (before - n) * C
            exist_there = others[1] >= 0
            left = tl.load(fade + ((block - before + n) * H + h).to(tl.int64) * K + channels, mask=exist, other=0.0)
            near = products_of_rows(do, v, t, inside, others, exist_there, h, H, V, C, BV, BV == VALUES, DOT) * scale
            reading *= left[None, :]
            reading += tl.dot(near.to(dtype), tile(writer, others, exist_there, h, H, K, BK, here), input_precision=DOT)
            across_before *= left
        for n in range(after):
            others = t[0], t[1] + (after - n) * C
            exist_there = others[1] < length
            left = tl.load(fade + ((block + after - n) * H + h).to(tl.int64) * K + channels, mask=exist, other=0.0)
            near = products_of_rows(v, do, t, inside, others, exist_there, h, H, V, C, BV, BV == VALUES, DOT) * scale
            storing *= left[None, :]
            storing += tl.dot(near.to(dtype), tile(reader, others, exist_there, h, H, K, BK, here), input_precision=DOT)
            across_after *= left
    # Through the states: of what reads the one before the chunk, and is stored in the one after it. For the loop see tiles.add_rows.
    recalling = tl.zeros((C, BK), dtype=tl.float32)
    keeping = tl.zeros((C, BK), dtype=tl.float32)
    near = tl.zeros((C, C), dtype=tl.float32)
    near_columns = tl.zeros((C, C), dtype=tl.float32)
    for column in tl.range(0, V, BV, num_stages=1):
        read = tile(do, t, inside, h, H, V, BV, column)
        value = tile(v, t, inside, h, H, V, BV, column)
        state = state_transposed(states, chunk * H + h, K, V, BK, BV, here, column)
        dstate = state_transposed(dstates, chunk * H + h, K, V, BK, BV, here, column)
        near += tl.dot(read, tl.trans(value), input_precision=DOT)
        near_columns += tl.dot(value, tl.trans(read), input_precision=DOT)
        recalling += tl.dot(read, state, input_precision=DOT)
        keeping += tl.dot(value, dstate, input_precision=DOT)
    recalling *= (scale * across_before)[None, :]
    reading += recalling
    storing += keeping * across_after[None, :]
    near *= scale
    near_columns *= scale
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], near, 0.0), 1)[:, None]
    query = tile(q, t, inside, h // G, H // G, K, BK, here)
    key = tile(k, t, inside, h // G, H // G, K, BK, here)
    high, low = split(decays(decay, t, inside, h, H, K, BK, here), dtype)
    at = recalled + (block * H + h).to(tl.int64) * K + channels
    first = tl.load(levels_from + block * H + h)
    # Branches, though a launch takes one of them: see tiles.add_rows.
    if PAIRS != LEVELS:
        if first == levels - 1:
            later, earlier, from_start, to_end = factors_of_halves(halves, block, h, H, K, BK, here, high, low, C, DOT)
            tl.store(at, tl.sum(recalling * from_start * query, 0), mask=exist)
            on_read = tl.where(rows[:, None] > rows[None, :], near, 0.0).to(dtype)
            on_store = tl.where(rows[:, None] < rows[None, :], near_columns, 0.0).to(dtype)
            reading = reading * from_start + later * tl.dot(on_read, (key * earlier).to(dtype), input_precision=DOT)
            storing = storing * to_end + earlier * tl.dot(on_store, (query * later).to(dtype), input_precision=DOT)
    if PAIRS != HALVES:
        if first != levels - 1:
            from_start, to_end, _ = fades_of_rows(high, low, C, DOT)
            tl.store(at, tl.sum(recalling * from_start * query, 0), mask=exist)
            reading *= from_start
            storing *= to_end
            all_pairs = first > 0
            for level in range(first, levels):
                later, earlier, pairs, pairs_columns = factors_of_level(level, all_pairs, high, low, C, DOT)
                all_pairs = level < 0
                reading += later * tl.dot(tl.where(pairs, near, 0.0).to(dtype), (key * earlier).to(dtype), input_precision=DOT)
                storing += earlier * tl.dot(tl.where(pairs_columns, near_columns, 0.0).to(dtype), (query * later).to(dtype), input_precision=DOT)
    put(moved, reading * query - storing * key, t, inside, h, H, K, BK, here)
    put(dq, reading + own * key, t, inside, h, H, K, BK, here)
    put(dk, storing + own * query, t, inside, h, H, K, BK, here)


@triton.jit(do_not_specialize=COUNTS)
def decay_gradients(
    moved,
    recalled,
    left,
    states,
    dstates,
    begins,
    ends,
    firsts,
    ddecay,
    H,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H, K / BK) -> ddecay [T, H, K].

    A decay's gradient is all that passes it: what earlier tokens of the chunk and the state before it hand on to its own and later tokens
    and to the state after it. At the start of the chunk that is what its state hands on; from one token to the next, less what the token
    reads, more of what it writes. What was moved in between cancels as it was added, so that behind a strong decay next to nothing is left.
    """
    chunk, h, here = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK
    begin = tl.load(begins + chunk)
    length = tl.load(ends + chunk) - begin
    block = tl.load(firsts + chunk)
    count = tl.cdiv(length, C)
    rows = tl.arange(0, C)
    channels = here + tl.arange(0, BK)
    exist = channels < K
    products = tl.zeros((BK, BV), dtype=tl.float32)
    for column in range(0, V, BV):
        at, exists = state_at(states, chunk * H + h, K, V, BK, BV, here, column)
        after, _ = state_at(dstates, chunk * H + h, K, V, BK, BV, here, column)
        products += tl.load(at, mask=exists, other=0.0).to(tl.float32) * tl.load(after, mask=exists, other=0.0).to(tl.float32)
    passing = tl.sum(products, 1) * tl.load(left + (chunk * H + h).to(tl.int64) * K + channels, mask=exist, other=0.0)
    for place in range(count):
        passing += tl.load(recalled + ((block + place) * H + h).to(tl.int64) * K + channels, mask=exist, other=0.0)
    for place in range(count):
        t = begin.to(tl.int64), place * C + rows
        inside = t[1] < length
        x = tile(moved, t, inside, h, H, K, BK, here)
        high, low = split(x, states.dtype.element_ty)
        put(ddecay, passing[None, :] - add_rows(rows[:, None] > rows[None, :], high, low, DOT), t, inside, h, H, K, BK, here)
        passing -= tl.sum(x, 0)
