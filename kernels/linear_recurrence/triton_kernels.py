"""The chunked recurrence with one decay per head on a GPU: what one program computes. `triton_chunked` launches these.

Notation as in `chunked`: a chunk holds C tokens, g_t is the sum of its log decays up to token t, S the state before it and U what
its tokens write, so that S' = e^{g_C} S + sum_i e^{g_C - g_i} k_i u_i^T. For the delta rule U = T (beta V - (beta e^g K) S) with
T = (I + A)^{-1}, A_ti = beta_t e^{g_t - g_i} k_t . k_i below the diagonal. Forward:

    prepare         chunks at once: W = T (beta e^g K) and U0 = T (beta V)
    pass_states     chunk by chunk: S before each, and U = U0 - W S
    read            chunks at once: O = scale ((e^g Q) S + (Q K^T . e^{g_t - g_i}) U)

Backward, with D = T^T dU, so that dA = -D U^T below the diagonal and the gradient of beta e^g K is -D S^T:

    write_gradients     chunks at once: the part of dU that comes from O of its own chunk
    pass_gradients      from the last chunk back: dS' after each, and dU
    products            chunks at once: everything that is a product with a state or a value
    token_gradients     chunks at once: dQ, dK, dbeta and the decays' gradients, from those products

Decays are summed in float64 and only differences <= 0 are exponentiated. A product's result is never transposed for another
product: Triton 3.4 to 3.7 computes that wrongly on Hopper. Rows past the end of a chunk load as zeros: no write, no decay.
"""

import triton
import triton.language as tl

COUNTS = ["H", "G"]  # no kernel is compiled anew for another number of heads
BLOCK = tl.constexpr(16)  # rows that the triangular system is solved in one by one


@triton.jit
def _rows(starts, stops, C: tl.constexpr):
    """Token of each row of this program's chunk (int64), and which rows are inside it."""
    chunk = tl.program_id(0)
    start = tl.load(starts + chunk).to(tl.int64)
    rows = tl.arange(0, C)
    return start + rows, start + rows < tl.load(stops + chunk).to(tl.int64)


@triton.jit
def _sums(decay, t, inside, h, H, DECAY: tl.constexpr, C: tl.constexpr):
    """g [C] in float64: inclusive sums of the log decays; rows past the end repeat the last."""
    if DECAY:
        return tl.cumsum(tl.load(decay + t * H + h, mask=inside, other=0.0).to(tl.float64), 0)
    return tl.zeros((C,), dtype=tl.float64)


@triton.jit
def _fade(g, C: tl.constexpr, STRICT: tl.constexpr):
    """e^{g_t - g_i} [C, C] for i <= t (i < t where STRICT), else 0."""
    rows = tl.arange(0, C)
    later = rows[:, None] > rows[None, :] if STRICT else rows[:, None] >= rows[None, :]
    return tl.where(later, tl.exp(tl.where(later, g[:, None] - g[None, :], 0.0).to(tl.float32)), 0.0)


@triton.jit
def _tile(x, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    """x[t, head, offset : offset + B] of [tokens, heads, WIDTH] -> [C, B]"""
    columns = offset + tl.arange(0, B)
    return tl.load(x + (t * heads + head)[:, None] * WIDTH + columns[None, :], mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _put(x, value, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    columns = offset + tl.arange(0, B)
    at = x + (t * heads + head)[:, None] * WIDTH + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _tile_transposed(x, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    """As _tile -> [B, C]"""
    columns = offset + tl.arange(0, B)
    return tl.load(x + (t * heads + head)[None, :] * WIDTH + columns[:, None], mask=inside[None, :] & (columns < WIDTH)[:, None], other=0.0)


@triton.jit
def _state(x, index, K, V, BK: tl.constexpr, BV: tl.constexpr, offset):
    """Pointers to x[index, :, offset : offset + BV] of [states, K, V], and which exist -> [BK, BV]"""
    rows, columns = tl.arange(0, BK), offset + tl.arange(0, BV)
    return x + index.to(tl.int64) * K * V + rows[:, None] * V + columns[None, :], (rows < K)[:, None] & (columns < V)[None, :]


@triton.jit
def _state_transposed(x, index, K, V, BK: tl.constexpr, BV: tl.constexpr, offset):
    """As _state -> [BV, BK]"""
    rows, columns = tl.arange(0, BK), offset + tl.arange(0, BV)
    return x + index.to(tl.int64) * K * V + rows[None, :] * V + columns[:, None], (rows < K)[None, :] & (columns < V)[:, None]


@triton.jit
def _inverse(a, C: tl.constexpr):
    """(I + a)^{-1} for a strictly lower triangular a [C, C], float32.

    Blocks of 16 on the diagonal are solved row by row. With their inverse D and the blocks L below the diagonal,
    (I + a)^{-1} = (I + D L)^{-1} D, where M = D L has no more than C / 16 - 1 powers: (I - M)(I + M^2) for C = 64. Powers of a itself
    would grow like binomial coefficients where keys repeat.
    """
    n: tl.constexpr = C // BLOCK
    block = tl.arange(0, n)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    x = tl.sum(tl.where(diagonal, tl.reshape(-a, (n, BLOCK, n, BLOCK)), 0.0), axis=2)  # [n, 16, 16]
    row_number = tl.arange(0, BLOCK)[None, :, None]
    for i in range(1, BLOCK):
        row = tl.sum(tl.where(row_number == i, x, 0.0), axis=1)  # [n, 16]
        row += tl.sum(row[:, :, None] * x, axis=1)
        x = tl.where(row_number == i, row[:, None, :], x)
    rows = tl.arange(0, C)
    d = tl.reshape(tl.where(diagonal, x[:, :, None, :], 0.0), (C, C)) + (rows[:, None] == rows[None, :]).to(tl.float32)
    below = tl.where(rows[:, None] // BLOCK > rows[None, :] // BLOCK, a, 0.0)
    m = tl.dot(d, below, input_precision="tf32x3")
    y = d - tl.dot(m, d, input_precision="tf32x3")
    return y + tl.dot(tl.dot(m, m, input_precision="tf32x3"), y, input_precision="tf32x3")


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    k,
    v,
    decay,
    beta,
    starts,
    stops,
    w,
    u,
    solve,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> w [T, H, K], u = U0 [T, H, V], solve = T [T, H, C]; k [T, H / G, K], v [T, H, V], decay and beta [T, H]"""
    h = tl.program_id(1)
    t, inside = _rows(starts, stops, C)
    g = _sums(decay, t, inside, h, H, DECAY, C)
    b = tl.load(beta + t * H + h, mask=inside, other=0.0).to(tl.float32)
    key = _tile(k, t, inside, h // G, H // G, K, BK, 0)
    a = tl.dot(key, _tile_transposed(k, t, inside, h // G, H // G, K, BK, 0), input_precision=DOT)
    inverse = _inverse(a * b[:, None] * _fade(g, C, True), C).to(k.dtype.element_ty)
    _put(solve, inverse, t, inside, h, H, C, C, 0)
    faded = (key * (b * tl.exp(g.to(tl.float32)))[:, None]).to(k.dtype.element_ty)
    _put(w, tl.dot(inverse, faded, input_precision=DOT), t, inside, h, H, K, BK, 0)
    for offset in range(0, V, BV):
        value = (_tile(v, t, inside, h, H, V, BV, offset) * b[:, None]).to(k.dtype.element_ty)
        _put(u, tl.dot(inverse, value, input_precision=DOT), t, inside, h, H, V, BV, offset)


@triton.jit(do_not_specialize=COUNTS)
def pass_states(
    k,
    decay,
    w,
    u,
    starts,
    stops,
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
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (segments, H, V / BV) -> states [chunks, H, K, V] before each chunk, final [N, H, K, V]; turns u from U0 to U.

    bounds [N + 1]: the chunks of each segment; initial [N, H, K, V].
    """
    segment, h, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    at, exists = _state(initial, segment * H + h, K, V, BK, BV, offset)
    state = tl.load(at, mask=exists, other=0.0)
    rows = tl.arange(0, C)
    for chunk in range(tl.load(bounds + segment), tl.load(bounds + segment + 1)):
        before, here = _state(states, chunk * H + h, K, V, BK, BV, offset)
        low = state.to(k.dtype.element_ty)
        tl.store(before, low, mask=here)
        start = tl.load(starts + chunk).to(tl.int64)
        t, inside = start + rows, start + rows < tl.load(stops + chunk).to(tl.int64)
        write = _tile(u, t, inside, h, H, V, BV, offset)
        if DELTA:
            write = (write - tl.dot(_tile(w, t, inside, h, H, K, BK, 0), low, input_precision=DOT)).to(k.dtype.element_ty)
            _put(u, write, t, inside, h, H, V, BV, offset)
        key = _tile_transposed(k, t, inside, h // G, H // G, K, BK, 0)
        if DECAY:
            g = _sums(decay, t, inside, h, H, True, C)
            last = tl.sum(tl.where(rows == C - 1, g, 0.0), 0)
            key = (key * tl.exp((last - g).to(tl.float32))[None, :]).to(k.dtype.element_ty)
            state *= tl.exp(last.to(tl.float32))
        state += tl.dot(key, write, input_precision=DOT)
    at, exists = _state(final, segment * H + h, K, V, BK, BV, offset)
    tl.store(at, state, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def read(
    q,
    k,
    u,
    decay,
    states,
    starts,
    stops,
    o,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> o [T, H, V]"""
    h = tl.program_id(1)
    t, inside = _rows(starts, stops, C)
    g = _sums(decay, t, inside, h, H, DECAY, C)
    query = _tile(q, t, inside, h // G, H // G, K, BK, 0)
    scores = tl.dot(query, _tile_transposed(k, t, inside, h // G, H // G, K, BK, 0), input_precision=DOT)
    scores = (scores * _fade(g, C, False)).to(q.dtype.element_ty)
    from_start = tl.exp(g.to(tl.float32))
    for offset in range(0, V, BV):
        at, exists = _state(states, tl.program_id(0) * H + h, K, V, BK, BV, offset)
        out = tl.dot(query, tl.load(at, mask=exists, other=0.0), input_precision=DOT) * from_start[:, None]
        out += tl.dot(scores, _tile(u, t, inside, h, H, V, BV, offset), input_precision=DOT)
        _put(o, out * scale, t, inside, h, H, V, BV, offset)


@triton.jit(do_not_specialize=COUNTS)
def write_gradients(
    q,
    k,
    do,
    decay,
    starts,
    stops,
    du,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> du [T, H, V] = scale (Q K^T . e^{g_t - g_i})^T dO"""
    h = tl.program_id(1)
    t, inside = _rows(starts, stops, C)
    g = _sums(decay, t, inside, h, H, DECAY, C)
    key = _tile(k, t, inside, h // G, H // G, K, BK, 0)
    scores = tl.dot(key, _tile_transposed(q, t, inside, h // G, H // G, K, BK, 0), input_precision=DOT)  # [i, t]
    rows = tl.arange(0, C)
    later = rows[:, None] <= rows[None, :]
    scores = tl.where(later, scores * tl.exp(tl.where(later, g[None, :] - g[:, None], 0.0).to(tl.float32)), 0.0)
    scores = (scores * scale).to(q.dtype.element_ty)
    for offset in range(0, V, BV):
        _put(du, tl.dot(scores, _tile(do, t, inside, h, H, V, BV, offset), input_precision=DOT), t, inside, h, H, V, BV, offset)


@triton.jit(do_not_specialize=COUNTS)
def pass_gradients(
    q,
    k,
    decay,
    w,
    do,
    du,
    starts,
    stops,
    bounds,
    dfinal,
    dstates,
    dinitial,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (segments, H, V / BV) -> dstates [chunks, H, K, V] after each chunk, dinitial [N, H, K, V]; adds to du what comes from there."""
    segment, h, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    at, exists = _state(dfinal, segment * H + h, K, V, BK, BV, offset)
    state = tl.load(at, mask=exists, other=0.0)
    rows = tl.arange(0, C)
    begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    for back in range(end - begin):
        chunk = end - 1 - back
        after, here = _state(dstates, chunk * H + h, K, V, BK, BV, offset)
        low = state.to(k.dtype.element_ty)
        tl.store(after, low, mask=here)
        start = tl.load(starts + chunk).to(tl.int64)
        t, inside = start + rows, start + rows < tl.load(stops + chunk).to(tl.int64)
        key = _tile(k, t, inside, h // G, H // G, K, BK, 0)
        query = _tile_transposed(q, t, inside, h // G, H // G, K, BK, 0)
        if DECAY:
            g = _sums(decay, t, inside, h, H, True, C)
            last = tl.sum(tl.where(rows == C - 1, g, 0.0), 0)
            key = (key * tl.exp((last - g).to(tl.float32))[:, None]).to(k.dtype.element_ty)
            query = (query * tl.exp(g.to(tl.float32))[None, :]).to(k.dtype.element_ty)
            state *= tl.exp(last.to(tl.float32))
        write = (_tile(du, t, inside, h, H, V, BV, offset) + tl.dot(key, low, input_precision=DOT)).to(k.dtype.element_ty)
        _put(du, write, t, inside, h, H, V, BV, offset)
        state += tl.dot(query, _tile(do, t, inside, h, H, V, BV, offset), input_precision=DOT) * scale
        if DELTA:
            state -= tl.dot(_tile_transposed(w, t, inside, h, H, K, BK, 0), write, input_precision=DOT)
    at, exists = _state(dinitial, segment * H + h, K, V, BK, BV, offset)
    tl.store(at, state, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def products(
    k,
    v,
    u,
    decay,
    beta,
    solve,
    do,
    du,
    states,
    dstates,
    starts,
    stops,
    read_key,
    erase,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    scale,
    H,
    G,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H) -> dv [T, H, V]; the parts of dq, dk [T, H, K], dg and dbeta [T, H] (float32) that come through states and values;
    read_key [T, H, C]: the gradient of Q K^T; erase [T, H, C]: that of beta_t k_t . k_i."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    t, inside = _rows(starts, stops, C)
    g = _sums(decay, t, inside, h, H, DECAY, C)
    rows = tl.arange(0, C)
    dtype = k.dtype.element_ty
    on_reads = tl.zeros((C, C), dtype=tl.float32)
    on_erases = tl.zeros((C, C), dtype=tl.float32)
    through_query = tl.zeros((C, BK), dtype=tl.float32)
    through_key = tl.zeros((C, BK), dtype=tl.float32)
    through_erase = tl.zeros((C, BK), dtype=tl.float32)
    db = tl.zeros((C,), dtype=tl.float32)
    fading = 0.0  # <dS', S>
    if DELTA:
        b = tl.load(beta + t * H + h, mask=inside, other=0.0).to(tl.float32)
        inverse = _tile_transposed(solve, t, inside, h, H, C, C, 0)
    for offset in range(0, V, BV):
        write, out = _tile_transposed(u, t, inside, h, H, V, BV, offset), _tile(do, t, inside, h, H, V, BV, offset)
        at, exists = _state_transposed(states, chunk * H + h, K, V, BK, BV, offset)
        state = tl.load(at, mask=exists, other=0.0)
        at, exists = _state_transposed(dstates, chunk * H + h, K, V, BK, BV, offset)
        dstate = tl.load(at, mask=exists, other=0.0)
        on_reads += tl.dot(out, write, input_precision=DOT)
        through_query += tl.dot(out, state, input_precision=DOT)
        through_key += tl.dot(_tile(u, t, inside, h, H, V, BV, offset), dstate, input_precision=DOT)
        if DECAY:
            fading += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        if DELTA:
            wide = tl.dot(inverse, _tile(du, t, inside, h, H, V, BV, offset), input_precision=DOT)  # D
            db += tl.sum(wide * _tile(v, t, inside, h, H, V, BV, offset), 1)
            _put(dv, wide * b[:, None], t, inside, h, H, V, BV, offset)
            on_erases -= tl.dot(wide.to(dtype), write, input_precision=DOT)
            through_erase -= tl.dot(wide.to(dtype), state, input_precision=DOT)
    key = _tile(k, t, inside, h // G, H // G, K, BK, 0).to(tl.float32)
    from_start = tl.exp(g.to(tl.float32))
    last = tl.sum(tl.where(rows == C - 1, g, 0.0), 0)
    through_key *= tl.exp((last - g).to(tl.float32))[:, None]
    _put(dq, through_query * (scale * from_start)[:, None], t, inside, h, H, K, BK, 0)
    if DECAY:
        stored = tl.sum(through_key * key, 1)
        # A row past the end of the chunk is not stored: the last row that is holds what concerns the whole chunk.
        ends = inside & (t + 1 == tl.load(stops + chunk).to(tl.int64))
        of_decay = -stored + tl.where(ends, tl.sum(stored, 0) + tl.exp(last.to(tl.float32)) * fading, 0.0)
    if DELTA:
        through_erase *= from_start[:, None]
        erased = tl.sum(through_erase * key, 1)
        tl.store(dbeta + t * H + h, db + erased, mask=inside)
        through_key += through_erase * b[:, None]
        if DECAY:
            of_decay += erased * b
        _put(erase, on_erases * _fade(g, C, True), t, inside, h, H, C, C, 0)
    if DECAY:
        tl.store(dg + t * H + h, of_decay, mask=inside)
    _put(dk, through_key, t, inside, h, H, K, BK, 0)
    _put(read_key, on_reads * _fade(g, C, False) * scale, t, inside, h, H, C, C, 0)


@triton.jit(do_not_specialize=COUNTS)
def token_gradients(
    q,
    k,
    decay,
    beta,
    read_key,
    erase,
    starts,
    stops,
    dq,
    dk,
    dg,
    dbeta,
    ddecay,
    H,
    G,
    K,
    C: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (chunks, H): completes dq, dk [T, H, K] and dbeta [T, H] in place, and ddecay [T, H] from dg."""
    h = tl.program_id(1)
    t, inside = _rows(starts, stops, C)
    query, key = _tile(q, t, inside, h // G, H // G, K, BK, 0), _tile(k, t, inside, h // G, H // G, K, BK, 0)
    dquery = _tile(dq, t, inside, h, H, K, BK, 0) + tl.dot(_tile(read_key, t, inside, h, H, C, C, 0), key, input_precision=DOT)
    _put(dq, dquery, t, inside, h, H, K, BK, 0)
    as_key = tl.dot(_tile_transposed(read_key, t, inside, h, H, C, C, 0), query, input_precision=DOT)
    total = _tile(dk, t, inside, h, H, K, BK, 0) + as_key
    of_decay = tl.sum(dquery * query - as_key * key, 1)
    if DELTA:
        b = tl.load(beta + t * H + h, mask=inside, other=0.0).to(tl.float32)
        erasing = tl.dot(_tile(erase, t, inside, h, H, C, C, 0), key, input_precision=DOT)
        with_beta = (key * b[:, None]).to(key.dtype)
        erased = tl.dot(_tile_transposed(erase, t, inside, h, H, C, C, 0), with_beta, input_precision=DOT)
        total += erasing * b[:, None] + erased
        of_beta = tl.sum(erasing * key, 1)
        tl.store(dbeta + t * H + h, tl.load(dbeta + t * H + h, mask=inside, other=0.0) + of_beta, mask=inside)
        of_decay += of_beta * b - tl.sum(erased * key, 1)
    _put(dk, total, t, inside, h, H, K, BK, 0)
    if DECAY:
        of_decay = tl.where(inside, of_decay + tl.load(dg + t * H + h, mask=inside, other=0.0), 0.0)
        tl.store(ddecay + t * H + h, tl.cumsum(of_decay, 0, reverse=True), mask=inside)
