"""What becomes of a token's products with the vocabulary: logsumexp, the label's logit and, in place, the gradient. One program per token,
whose row is read a second time from its end, where it is most likely still in the cache."""

import triton
import triton.language as tl


@triton.jit
def _logits(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Of products in float32; tanh(z) = 2 sigmoid(2 z) - 1."""
    z = products * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.jit(do_not_specialize=["z_loss", "factor", "scale", "softcap"])
def rows(
    products,
    labels,
    lse,
    target,
    V,
    first,
    total,
    z_loss,
    factor,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    READS: tl.constexpr,
    LEARNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """products [n, V], labels, lse and target [n]: see `reference.rows`."""
    row = tl.program_id(0).to(tl.int64)
    products += row * V
    label = tl.load(labels + row)
    local = label - first
    columns = tl.arange(0, BLOCK)
    blocks = tl.cdiv(V, BLOCK)
    if label < 0:
        if READS:
            tl.store(lse + row, 0.0)
            tl.store(target + row, 0.0)
        if LEARNS:
            for i in range(blocks):
                at = i * BLOCK + columns
                tl.store(products + at, tl.zeros((BLOCK,), tl.float32).to(products.dtype.element_ty), mask=at < V)
    else:
        if READS:
            here = (local >= 0) & (local < V)
            picked = _logits(tl.load(products + local, mask=here, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
            # a label outside the vocabulary has no logit: its loss is not a number
            tl.store(target + row, tl.where(label >= total, float("nan"), tl.where(here, picked, 0.0)))
            # each lane keeps a maximum and a sum of its own: one reduction, at the end
            top = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite: minus infinity from itself would be no number
            sums = tl.zeros((BLOCK,), tl.float32)
            for i in range(blocks):
                at = i * BLOCK + columns
                z = _logits(tl.load(products + at, mask=at < V, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
                z = tl.where(at < V, z, -float("inf"))
                above = tl.maximum(top, z)
                sums = sums * tl.exp(top - above) + tl.exp(z - above)
                top = above
            highest = tl.max(top, 0)
            logsumexp = highest + tl.log(tl.sum(sums * tl.exp(top - highest), 0))
            tl.store(lse + row, logsumexp)
        else:
            logsumexp = tl.load(lse + row)
        if LEARNS:
            share = 1 + 2 * z_loss * logsumexp
            for i in range(blocks):
                at = (blocks - 1 - i) * BLOCK + columns
                z = _logits(tl.load(products + at, mask=at < V, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
                grad = tl.exp(z - logsumexp) * share - tl.where(at == local, 1.0, 0.0)
                if SOFTCAP:
                    grad *= 1 - (z / softcap) * (z / softcap)
                tl.store(products + at, (grad * (factor * scale)).to(products.dtype.element_ty), mask=at < V)
