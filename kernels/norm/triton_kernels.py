"""The programs of norms: a row is a head of a token, T x H of them. Inputs [T, H, D] have strides for tokens and heads; outputs are contiguous."""

import triton
import triton.language as tl


@triton.jit
def _places(first, rows, token, head, H, D, ROWS: tl.constexpr, BD: tl.constexpr):
    """Of ROWS rows from first on: where their numbers lie in a strided input and in a contiguous output, and which there are."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BD)[None, :]
    there = (row < rows)[:, None] & (columns < D)
    return ((row // H) * token + (row % H) * head)[:, None] + columns, (row * D)[:, None] + columns, there


@triton.jit(do_not_specialize=["rows"])
def l2_norm(x, y, rows, token, head, H, D, eps, ROWS: tl.constexpr, BD: tl.constexpr):
    """Grid (rows / ROWS)"""
    at, out, there = _places(tl.program_id(0) * ROWS, rows, token, head, H, D, ROWS, BD)
    number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(number * number, 1) + eps)
    tl.store(y + out, (number * scale[:, None]).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def l2_norm_gradients(x, grad, dx, rows, token, head, grad_token, grad_head, H, D, eps, ROWS: tl.constexpr, BD: tl.constexpr):
    """Grid (rows / ROWS)"""
    first = tl.program_id(0) * ROWS
    at, out, there = _places(first, rows, token, head, H, D, ROWS, BD)
    from_grad, _, _ = _places(first, rows, grad_token, grad_head, H, D, ROWS, BD)
    number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + from_grad, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(number * number, 1) + eps)
    along = tl.sum(number * g, 1) * scale * scale
    tl.store(dx + out, ((g - number * along[:, None]) * scale[:, None]).to(dx.dtype.element_ty), mask=there)


@triton.jit
def _head(program, tokens, stride, H, D, C, ROWS: tl.constexpr, BD: tl.constexpr):
    """Of ROWS heads of queries and keys, H of each a token: where their numbers lie in x, in an output of either, and in one as wide as x; which
    there are, and which of these are queries."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, h, columns = row // (2 * H), row % (2 * H), tl.arange(0, BD)[None, :]
    there = (t < tokens)[:, None] & (columns < D)
    at = (h * D)[:, None] + columns
    return (t * stride)[:, None] + at, ((t * H + h % H) * D)[:, None] + columns, (t * C)[:, None] + at, there, (h < H)[:, None]


@triton.jit
def _copied(program, stride, H, D, REST, C, COLUMNS: tl.constexpr):
    """Of COLUMNS numbers of a row of values: where they lie in x, in an output, and in one as wide as x; which there are."""
    across = tl.cdiv(REST, COLUMNS)
    t, columns = (program // across).to(tl.int64), (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    return t * stride + 2 * H * D + columns, t * REST + columns, t * C + 2 * H * D + columns, columns < REST


@triton.jit(do_not_specialize=["tokens", "norms"])
def l2_normed_parts(x, q, k, v, tokens, stride, norms, H, D, REST, eps, ROWS: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (norms + tokens x REST / COLUMNS)"""
    program = tl.program_id(0)
    if program < norms:
        at, out, at_dx, there, query = _head(program, tokens, stride, H, D, 2 * H * D + REST, ROWS, BD)
        number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        normed = (number * tl.rsqrt(tl.sum(number * number, 1) + eps)[:, None]).to(q.dtype.element_ty)
        tl.store(q + out, normed, mask=there & query)
        tl.store(k + out, normed, mask=there & (query == 0))
    else:
        # other names than above: both branches would have to give them one shape
        source, target, behind, here = _copied(program - norms, stride, H, D, REST, 2 * H * D + REST, COLUMNS)
        tl.store(v + target, tl.load(x + source, mask=here, other=0.0), mask=here)


@triton.jit(do_not_specialize=["tokens", "norms"])
def l2_normed_parts_gradients(x, dq, dk, dv, dx, tokens, stride, norms, H, D, REST, eps, ROWS: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (norms + tokens x REST / COLUMNS): dx [T, C] is contiguous"""
    program = tl.program_id(0)
    if program < norms:
        at, out, at_dx, there, query = _head(program, tokens, stride, H, D, 2 * H * D + REST, ROWS, BD)
        number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(dq + out, mask=there & query, other=0.0).to(tl.float32) + tl.load(dk + out, mask=there & (query == 0), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(number * number, 1) + eps)
        along = tl.sum(number * g, 1) * scale * scale
        tl.store(dx + at_dx, ((g - number * along[:, None]) * scale[:, None]).to(dx.dtype.element_ty), mask=there)
    else:
        source, target, behind, here = _copied(program - norms, stride, H, D, REST, 2 * H * D + REST, COLUMNS)
        tl.store(dx + behind, tl.load(dv + target, mask=here, other=0.0), mask=here)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm(x, weight, z, y, rows, token, head, z_token, z_head, H, D, eps, SILU: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Grid (rows / ROWS)"""
    first = tl.program_id(0) * ROWS
    at, out, there = _places(first, rows, token, head, H, D, ROWS, BD)
    at_z, _, _ = _places(first, rows, z_token, z_head, H, D, ROWS, BD)
    columns = tl.arange(0, BD)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    into = tl.load(z + at_z, mask=there, other=0.0).to(tl.float32)
    gate = tl.sigmoid(into)
    if SILU:
        gate *= into
    scale = tl.rsqrt(tl.sum(number * number, 1) / D + eps)
    tl.store(y + out, (number * scale[:, None] * w * gate).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_gradients(
    x,
    weight,
    z,
    grad,
    dx,
    dz,
    parts,
    rows,
    token,
    head,
    z_token,
    z_head,
    grad_token,
    grad_head,
    H,
    D,
    eps,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid (programs), each of every so many-th ROWS rows; parts [programs, D]: what it adds to the weight's gradient."""
    program = tl.program_id(0)
    columns = tl.arange(0, BD)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BD,), dtype=tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = block * ROWS
        at, out, there = _places(first, rows, token, head, H, D, ROWS, BD)
        at_z, _, _ = _places(first, rows, z_token, z_head, H, D, ROWS, BD)
        from_grad, _, _ = _places(first, rows, grad_token, grad_head, H, D, ROWS, BD)
        number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        into = tl.load(z + at_z, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + from_grad, mask=there, other=0.0).to(tl.float32)
        s = tl.sigmoid(into)
        if SILU:
            gate, slope = into * s, s * (1 + into * (1 - s))
        else:
            gate, slope = s, s * (1 - s)
        scale = tl.rsqrt(tl.sum(number * number, 1) / D + eps)[:, None]
        normed = number * scale
        tl.store(dz + out, (g * normed * w * slope).to(dz.dtype.element_ty), mask=there)
        total += tl.sum(g * gate * normed, 0)
        onto = g * gate * w
        along = tl.sum(onto * normed, 1)[:, None] / D
        tl.store(dx + out, ((onto - normed * along) * scale).to(dx.dtype.element_ty), mask=there)
    tl.store(parts + program * D + columns, total, mask=columns < D)
