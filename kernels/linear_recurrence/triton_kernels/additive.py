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
    factors_of_level,
    fade_across,
    fade_of,
    fades_beside,
    half_of,
    place_of,
    products_of_rows,
    put,
    signs_from_middle,
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
    begin = tl.load(begins + chunk).to(tl.int64)
    length = tl.load(ends + chunk) - tl.load(begins + chunk)
    if DECAY == CHANNEL:
        x += begin * H * K
    else:
        x += begin * (H // G) * K
    if DECAY == HEAD:
        factors += begin * H
    y += begin * H * V
    block, step = tl.load(firsts + chunk), 1
    count = tl.cdiv(length, C)
    t = tl.arange(0, C)
    if BACKWARD:
        t += (count - 1) * C
        block, step = block + count - 1, -1
    state = tl.zeros((BK, BV), dtype=tl.float32)
    if DECAY == CHANNEL:
        whole = fade_of(fade, block, True, h, H, K, DECAY, BK, row)
        following = whole
    for done in range(count):
        inside = t < length
        write = tile(y, t, inside, h, H, V, BV, column)
        if DECAY == CHANNEL:
            key = tile_transposed(x, t, inside, h, H, K, BK, row)
        else:
            key = tile_transposed(x, t, inside, h // G, H // G, K, BK, row)
        if DECAY == HEAD:
            write = (write * tl.load(factors + t * H + h, mask=inside, other=0.0)[:, None]).to(x.dtype.element_ty)
        if DECAY == CHANNEL:
            state *= following
            if done > 0:
                whole *= following
            following = fade_of(fade, block + step * (done + 1), done + 1 < count, h, H, K, DECAY, BK, row)
        state += tl.dot(key, write, input_precision=DOT)
        t += step * C
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


@triton.jit
def _of_head(
    x,
    y,
    z,
    mine,
    theirs,
    decay,
    fade,
    levels_from,
    halves,
    states,
    moved,
    recalled,
    scale,
    H,
    G,
    K,
    V,
    levels,
    block,
    part,
    h,
    t,
    length,
    chunk,
    count,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    LATER: tl.constexpr,
    DOT: tl.constexpr,
):
    """What value head h adds to the gradient [C, BK], of `count` other blocks; stores its parts of `moved` and `recalled`: see `pair_gradients`."""
    here = part * BK
    rows, channels = tl.arange(0, C), here + tl.arange(0, BK)
    inside = t < length
    dtype = z.dtype.element_ty
    # Through the state: of what reads the one before the chunk, or is stored in the one after it. For the loop see tiles.add_rows.
    result = tl.zeros((C, BK), dtype=tl.float32)
    for column in tl.range(0, V, BV, num_stages=1):
        state = state_transposed(states, chunk * H + h, K, V, BK, BV, here, column)
        result += tl.dot(tile(x, t, inside, h, H, V, BV, column), state, input_precision=DOT)
    if not LATER:  # the gradient of a state has the scale in it
        result *= scale
    # What decays from the block's start to each row, LATER from there to its end: `factor`, where halves suffice without what does up to the
    # middle, or from it on.
    high, low = split(decays(decay, t, inside, h, H, K, BK, here), dtype)
    first = tl.load(levels_from + block * H + h)
    factor = tl.zeros((C, BK), dtype=tl.float32)
    edge = tl.full((BK,), 1.0, dtype=tl.float32)
    # Branches, though a launch takes one of them: see tiles.add_rows.
    if PAIRS != LEVELS:
        if first == levels - 1:
            middle = add_rows(signs_from_middle(C), high, low, DOT)
            start, stop = half_of(halves, block, h, H, K, BK, here)
            factor, edge = tl.exp(-middle if LATER else middle), tl.exp(stop if LATER else start)
    if PAIRS != HALVES:
        if first != levels - 1:
            factor = tl.exp(add_rows(rows[:, None] < rows[None, :] if LATER else rows[:, None] >= rows[None, :], high, low, DOT))
    if not LATER:
        fades = fades_beside(fade, block, -1, count, h, H, K, CHANNEL, BLOCKS, BK, here)
        across = fade_across(fades, BLOCKS, CHANNEL, BLOCKS, BK) * edge
        query = tile(mine, t, inside, h // G, H // G, K, BK, here)
        at = recalled + (block * H + h).to(tl.int64) * K + channels
        tl.store(at, tl.sum(result * across[None, :] * factor * query, 0), mask=channels < K)
    # Through the scores with the other blocks of the chunk, the farthest first: what is there already fades over each. What both sides of a pair
    # move is rounded alike: their difference is a decay's.
    if BLOCKS > 1:
        for done in range(count):
            away = count - done if LATER else done - count
            others = t + away * C
            exist = others < length
            left = tl.load(fade + ((block + away) * H + h).to(tl.int64) * K + channels, mask=channels < K, other=0.0)
            there = tile(z, others, exist, h, H, K, BK, here)
            near = products_of_rows(x, y, t, inside, others, exist, h, H, V, C, BV, False, DOT) * scale
            result *= left[None, :]
            result += tl.dot(near.to(dtype), there, input_precision=DOT)
    # And in its own block, but for a token's score with itself, which does not decay.
    near = products_of_rows(x, y, t, inside, t, inside, h, H, V, C, BV, False, DOT) * scale
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], near, 0.0), 1)[:, None]
    other = tile(theirs, t, inside, h // G, H // G, K, BK, here)
    if PAIRS != LEVELS:
        if first == levels - 1:
            chosen = tl.where(rows[:, None] < rows[None, :] if LATER else rows[:, None] > rows[None, :], near, 0.0).to(dtype)
            start, stop = half_of(halves, block, h, H, K, BK, here)  # again: kept up to here, they would take other numbers' registers
            result = result * tl.exp(stop if LATER else start)[None, :] + tl.dot(chosen, (other / factor).to(dtype), input_precision=DOT)
            result *= factor
    if PAIRS != HALVES:
        if first != levels - 1:
            result *= factor
            all_pairs = first > 0
            for level in range(first, levels):
                later, earlier, pairs, pairs_columns = factors_of_level(level, all_pairs, high, low, C, DOT)
                all_pairs = level < 0
                chosen = tl.where(pairs_columns if LATER else pairs, near, 0.0).to(dtype)
                of_others = tl.dot(chosen, (other * (later if LATER else earlier)).to(dtype), input_precision=DOT)
                result += (earlier if LATER else later) * of_others
    moves = result * tile(mine, t, inside, h // G, H // G, K, BK, here)
    if LATER:
        moves = tile(moved, t, inside, h, H, K, BK, here) - moves
    put(moved, moves, t, inside, h, H, K, BK, here)
    return result + own * other


@triton.jit(do_not_specialize=COUNTS)
def pair_gradients(
    x,
    y,
    z,
    mine,
    theirs,
    decay,
    fade,
    levels_from,
    halves,
    states,
    starts,
    chunks,
    begins,
    ends,
    out,
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
    BLOCKS: tl.constexpr,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    LATER: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks * K / BK, H / G) -> out [T, H / G, K]: dq, of x = dO, y = V, z = writer, mine = q, theirs = k and the states before each chunk
    [chunks, H, K, V]. And for `decay_gradients`: moved = q_t dq_t [T, H, K], and what of it comes from the state before the chunk, summed over
    the block: recalled [blocks, H, K].

    LATER, after that: dk, of x = V, y = dO, z = reader, mine = k, theirs = q and the gradients of the states after each chunk; k_t dk_t is taken
    from moved. Each alone has the registers of half a processor, so that one waits for memory while another computes; both in one program have
    all of them."""
    parts = tl.cdiv(K, BK)
    block, part, source = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    if PAIRS != ALL:
        if (tl.load(levels_from + block * H + source) == levels - 1) != (PAIRS == HALVES):
            return
    chunk, begin, t, length, count, after = place_of(block, starts, chunks, begins, ends, C)
    if LATER:
        count = after
    for_keys, for_values, for_channels = begin * (H // G) * K, begin * H * V, begin * H * K
    x += for_values
    y += for_values
    z += for_channels
    mine += for_keys
    theirs += for_keys
    decay += for_channels
    out += for_keys
    moved += for_channels
    if GROUPED:
        result = tl.zeros((C, BK), dtype=tl.float32)
        for member in range(G):
            result += _of_head(
                *(x, y, z, mine, theirs, decay, fade, levels_from, halves, states, moved, recalled, scale, H, G, K, V, levels),
                *(block, part, source * G + member, t, length, chunk, count, C, BK, BV, BLOCKS, PAIRS, LATER, DOT),
            )
    else:
        result = _of_head(
            *(x, y, z, mine, theirs, decay, fade, levels_from, halves, states, moved, recalled, scale, H, G, K, V, levels),
            *(block, part, source, t, length, chunk, count, C, BK, BV, BLOCKS, PAIRS, LATER, DOT),
        )
    put(out, result, t, t < length, source, H // G, K, BK, part * BK)


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
    begin, end = tl.load(begins + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)
    block = tl.load(firsts + chunk)
    count = tl.cdiv(end - begin, C).to(tl.int32)
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
        t = begin + place * C + rows
        inside = t < end
        x = tile(moved, t, inside, h, H, K, BK, here)
        high, low = split(x, states.dtype.element_ty)
        put(ddecay, passing[None, :] - add_rows(rows[:, None] > rows[None, :], high, low, DOT), t, inside, h, H, K, BK, here)
        passing -= tl.sum(x, 0)
