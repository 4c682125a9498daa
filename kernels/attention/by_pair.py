"""Attention of one pair after the other, by kernels whose causal mask is aligned at the start: those of a CPU, and cuDNN's."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.attention.merging import merge_into
from ltrain.kernels.attention.pairs import Pair
from ltrain.kernels.segments import accumulator

# Of tensors [1, H, n, D]: q, k, v, causal -> out, lse [1, H, n] or [1, H, n, 1]; and dout, q, k, v, out, lse, causal -> dq, dk, dv
Attend = Callable[..., tuple[Tensor, Tensor]]
Differentiate = Callable[..., Sequence[Tensor]]
Lengths = Callable[[int], int]  # of a pair's queries -> how many it is given, at least as many


def squares(pairs: list[Pair]) -> Iterator[Pair]:
    """A causal pair as the keys that all its queries see, and a square."""
    for pair in pairs:
        extra = pair.k_len - pair.q_len
        if pair.causal and extra:
            yield pair._replace(k_len=extra, causal=False)
            yield pair._replace(k_start=pair.k_start + extra, k_len=pair.q_len)
        else:
            yield pair


def _exactly(rows: int) -> int:
    return rows


def _heads_first(x: Tensor, rows: slice, lengths: Lengths, grows: bool) -> Tensor:
    """[T, H, ...] -> [1, H, rows, ...]. There may be more queries behind the last: what they find is dropped, and their gradients of zero add
    nothing. So may keys of a causal square, which no true query sees."""
    more = lengths(rows.stop - rows.start) - (rows.stop - rows.start) if grows else 0
    x = x[rows]
    if more:
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, more))
    return x.transpose(0, 1).unsqueeze(0)


def _rows(pair: Pair) -> tuple[slice, slice, slice]:
    """Of q, k and v"""
    keys = slice(pair.k_start, pair.k_start + pair.k_len)
    return slice(pair.q_start, pair.q_start + pair.q_len), keys, keys


def forward(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], attend: Attend, lengths: Lengths = _exactly) -> tuple[Tensor, Tensor]:
    """-> out [T, H, Dv], lse [T, H] in float32 or wider; out in q's type, where one pair is all there is."""

    def of_pair(pair: Pair) -> tuple[Tensor, Tensor]:
        rows, keys, _ = _rows(pair)
        given = [_heads_first(x, of, lengths, of is rows or pair.causal) for x, of in ((q, rows), (k, keys), (v, keys))]
        part, part_lse = attend(*given, pair.causal)
        return part[0].transpose(0, 1)[: pair.q_len], part_lse.reshape(part_lse.shape[1:3]).T[: pair.q_len]

    kept = list(squares(pairs))
    if len(kept) == 1 and kept[0].q_len == len(q):
        part, part_lse = of_pair(kept[0])
        return part, part_lse.contiguous()
    wide = accumulator(q.dtype)
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=wide, device=q.device)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    reach = 0  # rows before it may hold a part already; merging is right everywhere, and needless from there on
    for pair in kept:
        rows, (part, part_lse) = _rows(pair)[0], of_pair(pair)
        if rows.start >= reach:
            out[rows], lse[rows] = part, part_lse
        else:
            merge_into(out[rows], lse[rows], part, part_lse)
        reach = max(reach, rows.stop)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pairs: list[Pair],
    differentiate: Differentiate,
    lengths: Lengths = _exactly,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse: over all keys. -> dq, dk, dv in float32 or wider, or in q's type, where one pair is all there is."""
    wide = accumulator(q.dtype)
    sums: list[Tensor] = []
    kept = list(squares(pairs))
    for pair in kept:
        rows, keys, _ = places = _rows(pair)
        given = ((dout, rows), (q, rows), (k, keys), (v, keys), (out, rows), (lse, rows))
        parts = differentiate(*(_heads_first(x, of, lengths, of is rows or pair.causal) for x, of in given), pair.causal)
        parts = [part[0].transpose(0, 1)[: of.stop - of.start] for part, of in zip(parts, places, strict=True)]
        if len(kept) == 1 and pair.q_len == len(q) and pair.k_len == len(k):
            return parts[0], parts[1], parts[2]
        sums = sums or [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for total, of, part in zip(sums, places, parts, strict=True):
            total[of] += part
    dq, dk, dv = sums or [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
    return dq, dk, dv
