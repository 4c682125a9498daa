"""The programs of the forward pass: see the package. q, k [T, H / G, K], v [T, H, V], beta [T, H], decay [T, H] or [T, H, K].

For each block of C tokens, prepare leaves what the decays make of queries and keys; g here is summed from the block's start:
reader = e^{g_t} q_t and writer = e^{g_C - g_t} k_t [T, H, K], and fade = e^{g_C} [blocks, H, K] or [blocks, H]. With the delta rule
what reads, reader and scores, has the scale in it, so that products with it go into the accumulators of others.
"""

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence.triton_kernels.tiles import (
    ALL,
    CHANNEL,
    HALVES,
    HEAD,
    NONE,
    add_columns,
    add_rows,
    bounded,
    decays,
    decays_transposed,
    fade_across,
    fade_between,
    fades_beside,
    fades_of_rows,
    first_level,
    from_middle,
    half_of,
    halves_suffice,
    inverse_of,
    numbers_at,
    pair_spans,
    pair_spans_transposed,
    place_of,
    put,
    rows_of,
    signs_from_middle,
    split,
    state_at,
    state_of_chunk,
    state_or_zeros,
    sums_of_halves,
    tile,
    tile_transposed,
    to_middle,
)

# No kernel is compiled anew for another number of heads; and a loop over a constant number of levels would be unrolled, beyond all registers.
COUNTS = ["T", "H", "G", "levels"]


@triton.jit
def _scores_by_channel(q, k, decay, t, inside, h, H, G, K, first, levels, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr):
    """R and sum_c k_t k_i e^{g_t - g_i} below the diagonal -> [C, C] each"""
    rows = tl.arange(0, C)
    reads = tl.zeros((C, C), dtype=tl.float32)
    recalls = tl.zeros((C, C), dtype=tl.float32)
    for offset in range(0, K, BK):
        query, key = tile(q, t, inside, h // G, H // G, K, BK, offset), tile(k, t, inside, h // G, H // G, K, BK, offset)
        key_columns = tile_transposed(k, t, inside, h // G, H // G, K, BK, offset)
        high, low = split(decays(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
        high_columns, low_columns = split(decays_transposed(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
        itself = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        reads += tl.where(rows[:, None] == rows[None, :], itself[:, None], 0.0)
        all_pairs = first > 0
        for level in range(first, levels):
            spans, odd, pairs = pair_spans(level, all_pairs, C)
            later = from_middle(add_rows(spans, high, low, DOT), odd, all_pairs)
            spans, odd, _ = pair_spans_transposed(level, all_pairs, C)
            earlier = key_columns * to_middle(add_columns(high_columns, low_columns, spans, DOT), odd, all_pairs)
            earlier = earlier.to(k.dtype.element_ty)
            reads += tl.where(pairs, tl.dot((query * later).to(k.dtype.element_ty), earlier, input_precision=DOT), 0.0)
            if DELTA:
                recalls += tl.where(pairs, tl.dot((key * later).to(k.dtype.element_ty), earlier, input_precision=DOT), 0.0)
            all_pairs = level < 0
    return reads, recalls


@triton.jit
def _scores_by_halves(q, k, middle, t, inside, h, H, G, K, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr):
    """As _scores_by_channel where tiles.halves_suffice, as in most chunks: the last level alone, of what sum_decays left."""
    rows = tl.arange(0, C)
    dtype = k.dtype.element_ty
    reads = tl.zeros((C, C), dtype=tl.float32)
    recalls = tl.zeros((C, C), dtype=tl.float32)
    for offset in range(0, K, BK):
        later = tl.exp(tile(middle, t, inside, h, H, K, BK, offset))
        earlier = tl.exp(-tile_transposed(middle, t, inside, h, H, K, BK, offset))
        earlier = (tile_transposed(k, t, inside, h // G, H // G, K, BK, offset) * earlier).to(dtype)
        query = tile(q, t, inside, h // G, H // G, K, BK, offset)
        reads += tl.dot((query * later).to(dtype), earlier, input_precision=DOT)
        if DELTA:
            key = tile(k, t, inside, h // G, H // G, K, BK, offset)
            recalls += tl.dot((key * later).to(dtype), earlier, input_precision=DOT)
    reads = tl.where(rows[:, None] >= rows[None, :], reads, 0.0)
    return reads, tl.where(rows[:, None] > rows[None, :], recalls, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def sum_decays(
    k, decay, starts, stops, firsts, middle, halves, H, K, levels, C: tl.constexpr, BK: tl.constexpr, SOLVED: tl.constexpr, DOT: tl.constexpr
):
    """Grid (blocks, H), of decays per channel -> firsts [blocks, H] (int32, of tiles.first_level), which are there already where SOLVED;
    halves [blocks, H, 2, K]; and where these suffice, g_t less what it is at the middle: middle [T, H, K]."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = rows_of(starts, stops, chunk, C)
    dtype = k.dtype.element_ty
    suffice = 1
    for offset in range(0, K, BK):
        high, low = split(decays(decay, t, inside, h, H, K, BK, offset), dtype)
        columns = offset + tl.arange(0, BK)
        at = halves + (chunk * H + h).to(tl.int64) * 2 * K + columns
        start, stop = sums_of_halves(high, low, C)
        tl.store(at, start, mask=columns < K)
        tl.store(at + K, stop, mask=columns < K)
        suffice = tl.where(halves_suffice(start, stop, dtype), suffice, 0)
        put(middle, add_rows(signs_from_middle(C), high, low, DOT), t, inside, h, H, K, BK, offset)
    if not SOLVED:
        first = levels - 1
        if suffice == 0:
            for offset in range(0, K, BK):
                first = tl.minimum(first, first_level(decays(decay, t, inside, h, H, K, BK, offset), dtype, C))
        tl.store(firsts + chunk * H + h, first)


@triton.jit
def _fade_channels(
    q,
    k,
    decay,
    middle,
    halves,
    reader,
    writer,
    fade,
    w,
    inverse,
    b,
    t,
    inside,
    chunk,
    h,
    H,
    G,
    K,
    C: tl.constexpr,
    BK: tl.constexpr,
    scale,
    SUFFICE: tl.constexpr,
    DELTA: tl.constexpr,
    DOT: tl.constexpr,
):
    """Stores reader, writer, fade and -W of decays per channel; SUFFICE: where tiles.halves_suffice, and what sum_decays left is exact enough."""
    for offset in range(0, K, BK):
        columns = offset + tl.arange(0, BK)
        if SUFFICE:
            start, stop = half_of(halves, chunk, h, H, K, BK, offset)
            since = tile(middle, t, inside, h, H, K, BK, offset)
            from_start, to_end, left = tl.exp(start[None, :] + since), tl.exp(stop[None, :] - since), tl.exp(start + stop)
        else:
            high, low = split(decays(decay, t, inside, h, H, K, BK, offset), k.dtype.element_ty)
            from_start, to_end, left = fades_of_rows(high, low, C, DOT)
        tl.store(fade + (chunk * H + h).to(tl.int64) * K + columns, left, mask=columns < K)
        query, key = tile(q, t, inside, h // G, H // G, K, BK, offset), tile(k, t, inside, h // G, H // G, K, BK, offset)
        put(reader, query * from_start * scale, t, inside, h, H, K, BK, offset)
        put(writer, key * to_end, t, inside, h, H, K, BK, offset)
        if DELTA:
            faded = (key * -b[:, None] * from_start).to(k.dtype.element_ty)
            put(w, tl.dot(inverse, faded, input_precision=DOT), t, inside, h, H, K, BK, offset)


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    q,
    k,
    v,
    decay,
    beta,
    starts,
    stops,
    scores,
    solve,
    firsts,
    w,
    u,
    reader,
    writer,
    fade,
    halves,
    sums,
    middle,
    H,
    G,
    K,
    V,
    levels,
    scale,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    SOLVED: tl.constexpr,
    PAIRS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks, H), after sum_decays -> scores = scale R, solve = T [T, H, C], which are there already where SOLVED; w = -W [T, H, K],
    u = -U0 [T, H, V], reader (times scale), writer (None without decays), fade; sums [T, H, 2] of decays per head: g, and what float32 loses of it"""
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = rows_of(starts, stops, chunk, C)
    rows = tl.arange(0, C)
    dtype = k.dtype.element_ty
    high, low = 0.0, 0.0
    if DECAY == HEAD:
        g = tl.cumsum(bounded(tl.load(numbers_at(decay, t, h, H), mask=inside, other=0.0)).to(tl.float64), 0)
        last = tl.sum(tl.where(rows == C - 1, g, 0.0), 0)  # rows past the end repeat it
        high = g.to(tl.float32)
        low = (g - high).to(tl.float32)
        put(sums, tl.join(high, low), t, inside, h, H, 2, 2, 0)
        from_start, to_end = tl.exp(g.to(tl.float32))[:, None], tl.exp((last - g).to(tl.float32))[:, None]
        tl.store(fade + (chunk * H + h).to(tl.int64), tl.exp(last.to(tl.float32)))
    b = tl.zeros((C,), dtype=tl.float32)
    inverse = b
    if DECAY == CHANNEL:
        first = tl.load(firsts + chunk * H + h)
        if PAIRS != ALL:
            if (first == levels - 1) != (PAIRS == HALVES):
                return
        halves_are_enough = PAIRS == HALVES if PAIRS != ALL else first == levels - 1
    if DELTA:
        b = tl.load(numbers_at(beta, t, h, H), mask=inside, other=0.0).to(tl.float32)
    if not SOLVED:
        if DECAY == CHANNEL:
            if halves_are_enough:
                reads, recalls = _scores_by_halves(q, k, middle, t, inside, h, H, G, K, C, BK, DELTA, DOT)
            else:
                reads, recalls = _scores_by_channel(q, k, decay, t, inside, h, H, G, K, first, levels, C, BK, DELTA, DOT)
        else:
            reads = tl.zeros((C, C), dtype=tl.float32)
            recalls = tl.zeros((C, C), dtype=tl.float32)
            for offset in range(0, K, BK):
                key_columns = tile_transposed(k, t, inside, h // G, H // G, K, BK, offset)
                reads += tl.dot(tile(q, t, inside, h // G, H // G, K, BK, offset), key_columns, input_precision=DOT)
                recalls += tl.dot(tile(k, t, inside, h // G, H // G, K, BK, offset), key_columns, input_precision=DOT)
            fades = fade_between(high, low, C, DECAY, False)
            reads *= fades
            recalls = tl.where(rows[:, None] > rows[None, :], recalls * fades, 0.0)
        put(scores, reads * scale, t, inside, h, H, C, C, 0)
        if DELTA:
            inverse = inverse_of(recalls * b[:, None], C, DOT).to(dtype)
            put(solve, inverse, t, inside, h, H, C, C, 0)
    elif DELTA:
        inverse = tile(solve, t, inside, h, H, C, C, 0)
    if DECAY == CHANNEL:
        places = middle, halves, reader, writer, fade, w
        if halves_are_enough:
            _fade_channels(q, k, decay, *places, inverse, b, t, inside, chunk, h, H, G, K, C, BK, scale, True, DELTA, DOT)
        else:
            _fade_channels(q, k, decay, *places, inverse, b, t, inside, chunk, h, H, G, K, C, BK, scale, False, DELTA, DOT)
    else:
        for offset in range(0, K, BK):
            query = tile(q, t, inside, h // G, H // G, K, BK, offset).to(tl.float32)
            key = tile(k, t, inside, h // G, H // G, K, BK, offset).to(tl.float32)
            if DECAY == HEAD:
                put(writer, key * to_end, t, inside, h, H, K, BK, offset)
                query *= from_start
                key *= from_start
            put(reader, query * scale, t, inside, h, H, K, BK, offset)
            put(w, tl.dot(inverse, (key * -b[:, None]).to(dtype), input_precision=DOT), t, inside, h, H, K, BK, offset)
    if DELTA:
        for offset in range(0, V, BV):
            value = (tile(v, t, inside, h, H, V, BV, offset) * -b[:, None]).to(dtype)
            put(u, tl.dot(inverse, value, input_precision=DOT), t, inside, h, H, V, BV, offset)


@triton.jit
def _pass_chunk(
    state,
    t,
    inside,
    chunk,
    k,
    w,
    u,
    writer,
    fade,
    states,
    h,
    H,
    G,
    K,
    V,
    offset,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of pass_states: the state over a chunk. No address is loaded, so that the tiles of the next chunk can be on their way."""
    low, leaves = state_of_chunk(state, states, fade, chunk, h, H, K, V, offset, BK, BV, inside is None, DECAY, k.dtype.element_ty)
    write = tl.dot(tile(w, t, inside, h, H, K, BK, 0), low, input_precision=DOT)
    if u is not None:
        # A difference: Triton makes what is added to a product its accumulator, and the product waits for it: 0.9 ms in place of 0.5.
        write -= tile(u, t, inside, h, H, V, BV, offset)
    write = write.to(k.dtype.element_ty)
    if states is not None:
        put(u, write, t, inside, h, H, V, BV, offset)
    if DECAY == NONE:
        key = tile_transposed(k, t, inside, h // G, H // G, K, BK, 0)
    else:
        key = tile_transposed(writer, t, inside, h, H, K, BK, 0)
        state *= leaves
    return state + tl.dot(key, write, input_precision=DOT)


@triton.jit(do_not_specialize=COUNTS)
def pass_states(
    k,
    w,
    u,
    writer,
    fade,
    opens,
    closes,
    bounds,
    initial,
    states,
    final,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of the delta rule. Grid (segments, H, V / BV) -> states [chunks, H, K, V] before each chunk, final [N, H, K, V]; turns u from -U0 to U.

    opens, closes [N]: the first and last + 1 token, bounds [N + 1]: the chunks of each segment; u None: U0 is zeros; initial [N, H, K, V],
    None: zeros; states None: only what is there at the end is wanted, and u stays -U0; final None: not wanted.
    """
    segment, h, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    state = state_or_zeros(initial, segment * H + h, K, V, BK, BV, offset)
    rows = tl.arange(0, C)
    begin, end = tl.load(opens + segment), tl.load(closes + segment)
    first, stop = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    given = k, w, u, writer, fade, states, h, H, G, K, V, offset
    # Chunks of whole tiles ask for nothing whether it is there.
    whole = (end - begin) // C if WHOLE else 0
    for chunk in range(first, first + whole):
        t = (begin + (chunk - first) * C).to(tl.int64), rows
        state = _pass_chunk(state, t, None, chunk, *given, BK, BV, DECAY, DOT)
    for chunk in range(first + whole, stop):
        start = begin + (chunk - first) * C
        t, inside = (start.to(tl.int64), rows), rows < end - start
        state = _pass_chunk(state, t, inside, chunk, *given, BK, BV, DECAY, DOT)
    if final is not None:
        at, exists = state_at(final, segment * H + h, K, V, BK, BV, 0, offset)
        tl.store(at, state, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def read(
    x,
    y,
    z,
    scores,
    fade,
    states,
    starts,
    chunks,
    begins,
    ends,
    out,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DECAY: tl.constexpr,
    LATER: tl.constexpr,
    STATES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (blocks, H, V / BV) -> out [T, H, V]: what each token of a block takes of the state and of the tokens z [T, H, V] of its chunk.

    o: x = q, y = k and z = U, of the tokens up to its own, and states [chunks, H, K, V] before each chunk. LATER, from the token's own on, the
    gradient of U: x = k, y = q, z = dO and the gradients of the states after each chunk (without STATES, what comes from its own chunk alone).
    x and y are what prepare made of them, but for keys that do not decay. Chunks of several blocks are of decays per channel where nothing is
    erased: of the others see `heads.read`.
    """
    block, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    chunk, t, length, count, after = place_of(block, starts, chunks, begins, ends, C)
    inside = t[1] < length
    dtype = x.dtype.element_ty
    if DECAY == NONE and LATER:  # keys
        of, heads = h // G, H // G
    else:
        of, heads = h, H
    step = -1
    if LATER:
        count, step = after, 1
    result = tl.zeros((C, BV), dtype=tl.float32)
    if STATES:
        # A loop, if only of one turn, and not loaded ahead: see tiles.add_rows.
        for row in tl.range(0, K, BK, num_stages=1):
            at, exists = state_at(states, chunk * H + h, K, V, BK, BV, row, column)
            query = tile(x, t, inside, of, heads, K, BK, row)
            if BLOCKS > 1:
                of_part = fades_beside(fade, block, step, count, h, H, K, BLOCKS, BK, row)
                query = (query * fade_across(of_part, BLOCKS, BLOCKS, BK)[None, :]).to(dtype)
            result += tl.dot(query, tl.load(at, mask=exists, other=0.0), input_precision=DOT)
        if not LATER:  # the gradient of a state has the scale in it
            result *= scale
    if BLOCKS > 1:  # of decays per channel
        fades = fades_beside(fade, block, step, count, h, H, K, BLOCKS, BK, 0)
        for n in range(1, count + 1):
            others = t[0], t[1] + step * n * C
            exist = (others[1] >= 0) & (others[1] < length)
            if BK == KEYS:
                faded = (tile(x, t, inside, h, H, K, BK, 0) * fade_across(fades, n, BLOCKS, BK)[None, :]).to(dtype)
                near = tl.dot(faded, tile_transposed(y, others, exist, h, H, K, BK, 0), input_precision=DOT) * scale
            else:
                near = tl.zeros((C, C), dtype=tl.float32)
                for offset in range(0, K, BK):
                    of_part = fades_beside(fade, block, step, count, h, H, K, BLOCKS, BK, offset)
                    faded = (tile(x, t, inside, h, H, K, BK, offset) * fade_across(of_part, n, BLOCKS, BK)[None, :]).to(dtype)
                    near += tl.dot(faded, tile_transposed(y, others, exist, h, H, K, BK, offset), input_precision=DOT)
                near *= scale
            result += tl.dot(near.to(dtype), tile(z, others, exist, h, H, V, BV, column), input_precision=DOT)
    if LATER:
        near = tile_transposed(scores, t, inside, h, H, C, C, 0)
    else:
        near = tile(scores, t, inside, h, H, C, C, 0)
    result += tl.dot(near, tile(z, t, inside, h, H, V, BV, column), input_precision=DOT) * scale
    put(out, result, t, inside, h, H, V, BV, column)
