"""What the programs are built of: rows of a chunk, tiles of tokens and states, decays between tokens, the triangular inverse."""

import triton
import triton.language as tl

from ltrain.kernels.linear_recurrence import chunked

NONE = tl.constexpr(0)  # values of DECAY
HEAD = tl.constexpr(1)
CHANNEL = tl.constexpr(2)

# values of PAIRS, which chunks of decays per channel a program takes: all, or those where halves_suffice, or the others. What takes all holds the
# registers that the others need.
ALL = tl.constexpr(0)
HALVES = tl.constexpr(1)
LEVELS = tl.constexpr(2)

LOWEST = tl.constexpr(chunked.LOWEST)


# Tokens are given as the first of a chunk, int64, and the distance of each row from it, int32: the address of a tile is then one number, and the
# offsets of its rows, which are the same from chunk to chunk, need no multiplications of 64 bits, of which a processor does few at a time.


@triton.jit
def rows_of(starts, stops, chunk, C: tl.constexpr):
    """The tokens of the rows of a chunk, and which rows are inside it."""
    start = tl.load(starts + chunk)
    rows = tl.arange(0, C)
    return (start.to(tl.int64), rows), rows < tl.load(stops + chunk) - start


@triton.jit
def place_of(block, starts, chunks, begins, ends, C: tl.constexpr):
    """Of a block of C tokens: its chunk, its tokens, from the chunk's first on, the chunk's length, and how many of its blocks come before and after
    this one."""
    chunk = tl.load(chunks + block)
    begin = tl.load(begins + chunk)
    length, start = tl.load(ends + chunk) - begin, tl.load(starts + block) - begin
    return chunk, (begin.to(tl.int64), start + tl.arange(0, C)), length, start // C, (length - 1) // C - start // C


@triton.jit
def numbers_at(x, t, head, heads):
    """Pointers to x[t, head] of [tokens, heads] -> [C]"""
    return x + (t[0] * heads + head) + t[1] * heads


@triton.jit
def _rows_at(x, t, head, heads, WIDTH):
    """Pointers to x[t, head] of [tokens, heads, WIDTH]: of the first token, and each row's distance from it [C]"""
    return x + (t[0] * heads + head) * WIDTH, t[1] * (heads * WIDTH)


@triton.jit
def tile(x, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    """x[t, head, offset : offset + B] of [tokens, heads, WIDTH] -> [C, B]; inside None: all of it is there."""
    columns = offset + tl.arange(0, B)
    first, rows = _rows_at(x, t, head, heads, WIDTH)
    at = first + (rows[:, None] + columns[None, :])
    if inside is None:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return found


@triton.jit
def put(x, value, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    columns = offset + tl.arange(0, B)
    first, rows = _rows_at(x, t, head, heads, WIDTH)
    at = first + (rows[:, None] + columns[None, :])
    if inside is None:
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def tile_transposed(x, t, inside, head, heads, WIDTH, B: tl.constexpr, offset):
    """As tile -> [B, C]"""
    columns = offset + tl.arange(0, B)
    first, rows = _rows_at(x, t, head, heads, WIDTH)
    at = first + (rows[None, :] + columns[:, None])
    if inside is None:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=inside[None, :] & (columns < WIDTH)[:, None], other=0.0)
    return found


@triton.jit
def state_at(x, index, K, V, BK: tl.constexpr, BV: tl.constexpr, row, column):
    """Pointers to x[index, row : row + BK, column : column + BV] of [states, K, V], and which exist -> [BK, BV]"""
    rows, columns = row + tl.arange(0, BK), column + tl.arange(0, BV)
    return x + index.to(tl.int64) * K * V + rows[:, None] * V + columns[None, :], (rows < K)[:, None] & (columns < V)[None, :]


@triton.jit
def state_or_zeros(x, index, K, V, BK: tl.constexpr, BV: tl.constexpr, column):
    """x[index, :, column : column + BV] of [states, K, V], zeros for None -> [BK, BV]"""
    if x is None:
        state = tl.zeros((BK, BV), dtype=tl.float32)
    else:
        at, exists = state_at(x, index, K, V, BK, BV, 0, column)
        state = tl.load(at, mask=exists, other=0.0)
    return state


@triton.jit
def state_transposed(x, index, K, V, BK: tl.constexpr, BV: tl.constexpr, row, column):
    """x[index, row : row + BK, column : column + BV]^T -> [BV, BK]"""
    rows, columns = row + tl.arange(0, BK), column + tl.arange(0, BV)
    at = x + index.to(tl.int64) * K * V + rows[None, :] * V + columns[:, None]
    return tl.load(at, mask=(rows < K)[None, :] & (columns < V)[:, None], other=0.0)


@triton.jit
def bounded(decay):
    """In float32, and no less than LOWEST: sums stay finite, and the decays around a reset exact. What is no number stays none, which maximum would
    make LOWEST of."""
    x = decay.to(tl.float32)
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
def both_of_sums(sums, t, inside, h, H):
    """From sums [T, H, 2] of a head, both numbers [C, 2]. Loaded at once: Triton copies a load of fewer numbers than a program has threads to every
    place where it is needed, in its layout: a thread then loads 16 numbers for one."""
    return tile(sums, t, inside, h, H, 2, 2, 0)


@triton.jit
def sums_of(sums, t, inside, h, H, DECAY: tl.constexpr):
    """g [C] of a head and what float32 loses of it, as forward.prepare left them."""
    if DECAY == HEAD:
        high, low = tl.split(both_of_sums(sums, t, inside, h, H))
    else:
        high, low = 0.0, 0.0
    return high, low


@triton.jit
def fade_of(fade, chunk, exists, h, H, K, DECAY: tl.constexpr, BK: tl.constexpr, row):
    """What a chunk or block leaves of the state before it, of channels from `row` on [BK, 1]. That of a head for each channel, too: a number alone
    would go into a uniform register, for which a program waits as soon as it is on its way."""
    tl.static_assert(DECAY != NONE)
    channels = row + tl.arange(0, BK)
    if DECAY == CHANNEL:
        at = fade + (chunk * H + h).to(tl.int64) * K + channels
    else:
        at = fade + (chunk * H + h).to(tl.int64) + 0 * channels
    return tl.load(at, mask=(channels < K) & exists, other=0.0)[:, None]


@triton.jit
def state_of_chunk(
    state,
    states,
    fade,
    chunk,
    h,
    H,
    K,
    V,
    column,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    DECAY: tl.constexpr,
    dtype: tl.constexpr,
):
    """A state (or gradient of one) [BK, BV] as the products of a chunk take it, which states [chunks, H, K, V] keeps, unless it is None, and what the
    chunk leaves of it. WHOLE: BK and BV channels are all there."""
    low = state
    leaves = 1.0
    if DECAY != NONE:
        # It adds nothing, but Triton loads ahead only what goes into a factor of a product; loaded one chunk ahead by hand, 0.1 ms more were waited.
        leaves = fade_of(fade, chunk, True, h, H, K, DECAY, BK, 0)
        low += 0.0 * leaves
    low = low.to(dtype)
    if states is not None:
        at, exists = state_at(states, chunk * H + h, K, V, BK, BV, 0, column)
        if WHOLE:
            tl.store(at, low)
        else:
            tl.store(at, low, mask=exists)
    return low, leaves


@triton.jit
def fades_beside(fade, block, step, count, h, H, K, BLOCKS: tl.constexpr, BK: tl.constexpr, row):
    """What each of `count` < BLOCKS blocks from the one beside `block` on leaves of channels of the state [BK], 1 past the last."""
    found = ()
    channels = row + tl.arange(0, BK)
    for n in tl.static_range(1, BLOCKS):
        at = fade + ((block + step * n) * H + h).to(tl.int64) * K + channels
        found = found + (tl.load(at, mask=(channels < K) & (n <= count), other=1.0),)  # type: ignore[assignment]
    return found


@triton.jit
def fade_across(fades, n, BLOCKS: tl.constexpr, BK: tl.constexpr):
    """Of fades_beside: what all blocks before the n-th leave."""
    left = tl.full((BK,), 1.0, dtype=tl.float32)
    for between in tl.static_range(1, BLOCKS):
        left *= tl.where(between < n, fades[between - 1], 1.0)
    return left


@triton.jit
def last_of(g, C: tl.constexpr):
    """The last row of g [C, B]."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], g, 0.0), 0)


@triton.jit
def fade_between(high, low, C: tl.constexpr, DECAY: tl.constexpr, STRICT: tl.constexpr):
    """e^{g_t - g_i} [C, C] for i <= t (i < t where STRICT), else 0; g [C] as the sum of two, whose differences are exact or long ones."""
    rows = tl.arange(0, C)
    later = rows[:, None] > rows[None, :] if STRICT else rows[:, None] >= rows[None, :]
    if DECAY == HEAD:
        gaps = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        fades = tl.exp(tl.where(later, gaps, float("-inf")))
    else:
        fades = tl.where(later, 1.0, 0.0)
    return fades


@triton.jit
def products_of_rows(x, y, t, inside, others, exist, head, heads, K, C: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """sum_c x_tc y_ic -> [C, C], for x and y [T, heads, K], t and i = others [C]; WHOLE: BK channels are all, and no loop is in the way of
    one around this."""
    if WHOLE:
        row = tile(x, t, inside, head, heads, K, BK, 0)
        total = tl.dot(row, tile_transposed(y, others, exist, head, heads, K, BK, 0), input_precision=DOT)
    else:
        total = tl.zeros((C, C), dtype=tl.float32)
        for offset in range(0, K, BK):
            row = tile(x, t, inside, head, heads, K, BK, offset)
            total += tl.dot(row, tile_transposed(y, others, exist, head, heads, K, BK, offset), input_precision=DOT)
    return total


# Decays per channel. A sum over rows is a product with a matrix of zeros and ones, which the tensor cores do at once for all rows. Beside
# bfloat16 a number goes in as the sum of two, which hold 16 of its bits: nothing cancels in a sum of decays, so that is its relative error.


@triton.jit
def split(x, dtype):
    """x, float32, as what add_rows takes; dtype: of the inputs."""
    if dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high = x
        low = x  # unused
    return high, low


@triton.jit
def add_rows(ones, high, low, DOT: tl.constexpr):
    """sum_j ones_tj x_j -> float32; ones [C, C] of 0, 1 and -1, or booleans, x [C, B]."""
    chosen = ones.to(high.dtype)
    total = tl.zeros(high.shape, dtype=tl.float32)
    if high.dtype == tl.bfloat16:
        # In a loop: Triton 3.6 lays out a product that it sees go into another one, or into a loop that has one, for a tile of twice the rows,
        # and every number is held twice.
        for part in range(2):
            total += tl.dot(chosen, tl.where(part == 0, high, low))
    else:
        total += tl.dot(chosen, high, input_precision="ieee" if DOT == "ieee" else "tf32x3")
    return total


@triton.jit
def add_columns(high, low, ones, DOT: tl.constexpr):
    """sum_j x_j ones_jt -> float32; x [B, C]. The transpose of add_rows, which must not be transposed itself."""
    chosen = ones.to(high.dtype)
    total = tl.zeros(high.shape, dtype=tl.float32)
    if high.dtype == tl.bfloat16:
        for part in range(2):
            total += tl.dot(tl.where(part == 0, high, low), chosen)
    else:
        total += tl.dot(high, chosen, input_precision="ieee" if DOT == "ieee" else "tf32x3")
    return total


@triton.jit
def decays(decay, t, inside, h, H, K, B: tl.constexpr, offset):
    return bounded(tile(decay, t, inside, h, H, K, B, offset))


@triton.jit
def decays_transposed(decay, t, inside, h, H, K, B: tl.constexpr, offset):
    return bounded(tile_transposed(decay, t, inside, h, H, K, B, offset))


@triton.jit
def _bound(dtype):
    """float32 has the range of bfloat16, but is to keep more of an exponent; float16 has little range."""
    return 60.0 if dtype == tl.bfloat16 else 16.0 if dtype == tl.float32 else 4.0


@triton.jit
def halves_suffice(start, stop, dtype):
    """Whether all pairs of a chunk may meet in one product, as factors of what decays from its middle on: see first_level; start and stop [B]
    are the sums of its halves."""
    return tl.min(tl.minimum(start, stop), 0) > -_bound(dtype)


@triton.jit
def sums_of_halves(high, low, C: tl.constexpr):
    """Of split decays [C, B]: what the rows before the middle add up to, and those after it [B]."""
    x = high.to(tl.float32)
    if high.dtype == tl.bfloat16:
        x += low.to(tl.float32)
    before = (tl.arange(0, C) < C // 2)[:, None]
    return tl.sum(tl.where(before, x, 0.0), 0), tl.sum(tl.where(before, 0.0, x), 0)


@triton.jit
def signs_from_middle(C: tl.constexpr):
    """With add_rows: g_t less the g of the last row before the middle [t, j]. The difference is summed, not subtracted."""
    t, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where((j >= C // 2) & (j <= t), 1.0, tl.where((j < C // 2) & (j > t), -1.0, 0.0))


@triton.jit
def first_level(x, dtype, C: tl.constexpr):
    """The level that pairs start from (see pair_spans): above 0 with all pairs of its blocks; decays x [C, B].

    dtype: of the products. Their numbers may be e^bound times as large or as small as they come.
    """
    bound = _bound(dtype)
    by_8 = tl.sum(tl.reshape(x, (C // 8, 8, x.shape[1])), 1)
    by_16 = tl.sum(tl.reshape(by_8, (C // 16, 2, x.shape[1])), 1)
    by_32 = tl.sum(tl.reshape(by_16, (C // 32, 2, x.shape[1])), 1)
    level = tl.where(tl.min(tl.min(by_8, 1), 0) > -bound, 3, 0)
    level = tl.where(tl.min(tl.min(by_16, 1), 0) > -bound, 4, level)
    return tl.where(tl.min(tl.min(by_32, 1), 0) > -bound, 5, level)


@triton.jit
def pair_spans(level, all_pairs, C: tl.constexpr):
    """What e^{g_t - g_i} is made of between rows i < t of one block of 2^(level + 1), and between which it is right [t, i].

    It cannot be split into e^{g_t} e^{-g_i}, which overflows. But what decays from i up to the middle of the block, and from there to t, are
    sums of decays <= 0 where the middle lies between the two: there the split is exact, however strong the decays. Every pair has a middle
    between its rows on one of log2(C) levels. And with `all_pairs` the others of the block are right too, though one exponent is then
    positive: where the decays of half a block add up to a number whose exponential is well inside a type's range, as most do.

    Returns which rows j to sum for row t [t, j], whether t comes after the middle [t, 1], and the pairs.
    """
    rows = tl.arange(0, C)
    t, j = rows[:, None], rows[None, :]
    odd = ((t >> level) & 1) == 1
    spans = ((t >> level) == (j >> level)) & (odd == (j <= t))
    pairs = ((t >> (level + 1)) == (j >> (level + 1))) & (j < t) & (all_pairs | (odd & ((t >> level) != (j >> level))))
    return spans, odd, pairs


@triton.jit
def pair_spans_transposed(level, all_pairs, C: tl.constexpr):
    """As pair_spans: [j, t], [1, t] and [i, t]"""
    rows = tl.arange(0, C)
    j, t = rows[:, None], rows[None, :]
    odd = ((t >> level) & 1) == 1
    spans = ((t >> level) == (j >> level)) & (odd == (j <= t))
    pairs = ((t >> (level + 1)) == (j >> (level + 1))) & (j < t) & (all_pairs | (odd & ((t >> level) != (j >> level))))
    return spans, odd, pairs


@triton.jit
def from_middle(span, odd, all_pairs):
    """The factor of a row as the later of a pair, from what decays between it and the middle; 0 where it is never that."""
    return tl.exp(tl.where(odd, span, tl.where(all_pairs, -span, LOWEST)))


@triton.jit
def to_middle(span, odd, all_pairs):
    """As from_middle, as the earlier."""
    return tl.exp(tl.where(odd, tl.where(all_pairs, -span, LOWEST), span))


@triton.jit
def factors_of_level(level, all_pairs, high, low, C: tl.constexpr, DOT: tl.constexpr):
    """Of split decays: the factors of a row as the later and as the earlier of a pair [C, B], and the pairs [t, i] and [i, t]."""
    spans, odd, pairs = pair_spans(level, all_pairs, C)
    _, _, pairs_columns = pair_spans_transposed(level, all_pairs, C)
    span = add_rows(spans, high, low, DOT)
    return from_middle(span, odd, all_pairs), to_middle(span, odd, all_pairs), pairs, pairs_columns


@triton.jit
def fades_of_rows(high, low, C: tl.constexpr, DOT: tl.constexpr):
    """Of split decays: the factors from a chunk's start to each row and from there to its end [C, B], and of all of it [B]."""
    rows = tl.arange(0, C)
    g = add_rows(rows[:, None] >= rows[None, :], high, low, DOT)
    return tl.exp(g), tl.exp(add_rows(rows[:, None] < rows[None, :], high, low, DOT)), tl.exp(last_of(g, C))


@triton.jit
def half_of(halves, chunk, h, H, K, B: tl.constexpr, offset):
    """From halves [blocks, H, 2, K], what the decays of channels from `offset` on add up to before a chunk's middle, and after it [B]."""
    columns = offset + tl.arange(0, B)
    at = halves + (chunk * H + h).to(tl.int64) * 2 * K + columns
    return tl.load(at, mask=columns < K, other=0.0), tl.load(at + K, mask=columns < K, other=0.0)


@triton.jit
def factors_of_halves(halves, chunk, h, H, K, B: tl.constexpr, offset, high, low, C: tl.constexpr, DOT: tl.constexpr):
    """Of split decays where halves_suffice: the factors of a row as the later and as the earlier of a pair, and from the chunk's start to it and from
    there to its end [C, B]."""
    start, stop = half_of(halves, chunk, h, H, K, B, offset)
    middle = add_rows(signs_from_middle(C), high, low, DOT)
    later, earlier = tl.exp(middle), tl.exp(-middle)
    return later, earlier, later * tl.exp(start)[None, :], earlier * tl.exp(stop)[None, :]


@triton.jit
def inverse_of(a, C: tl.constexpr, DOT: tl.constexpr):
    """(I + a)^{-1} for a strictly lower triangular a [C, C], float32.

    Of blocks of 4 on the diagonal, m, it is (I - m)(I + m^2), for m^4 = 0. From the inverse D of blocks of any size follows that of blocks of twice
    as much, D - D L D, with L what is below D in them. Powers of all of a would grow like binomial coefficients where keys repeat, and rows one by
    one take longer. In TF32, with keys of unit length and beta up to 1 the error is near that of rounding to bfloat16 next; with beta up to 2 and
    keys that are alike it is some ten times that.
    """
    tl.static_assert(C == 64)
    precision: tl.constexpr = "tf32x3" if DOT == "ieee" else DOT
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    m = tl.where(row // 4 == column // 4, a, 0.0)
    d = tl.where(row == column, 1.0, -m)
    d += tl.dot(d, tl.dot(m, m, input_precision=precision), input_precision=precision)
    for level in tl.static_range(2, 6):
        below = tl.where((row >> level != column >> level) & (row >> (level + 1) == column >> (level + 1)), a, 0.0)
        d -= tl.dot(tl.dot(d, below, input_precision=precision), d, input_precision=precision)
    return d
