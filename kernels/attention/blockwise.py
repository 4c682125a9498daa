"""Attention by blocks of queries and keys in plain torch: any type, any device, memory linear in the stream.

Source: FlashAttention-2 (Dao 2023), its forward and backward recurrences.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ltrain.kernels.attention.pairs import PLAIN, Pair, Score, merge
from ltrain.kernels.segments import accumulator

ROWS = 512  # queries of one block
COLUMNS = 1024  # keys of one block: with ROWS it bounds the scores held at a time to 2 MiB of float32 per head


def _blocks(pair: Pair) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Query rows of the whole tensor, each with the key rows they see and, where only some do, the mask of those that do not."""
    q_start, q_len, k_start, k_len, causal, window, gap = pair
    offset = k_len - q_len + gap  # query i stands at key i + offset
    ahead = -gap if causal else window - 1 if window else k_len - offset  # how far past it a query sees
    for first in range(0, q_len, ROWS):
        last = min(first + ROWS, q_len)
        columns: list[tuple[slice, Tensor | None]] = []
        begin, end = max(first + offset - window + 1, 0) if window else 0, min(k_len, last + offset + ahead)
        for left in range(begin, end, COLUMNS):
            right = min(left + COLUMNS, end)
            mask = None
            if right - 1 > first + offset + ahead or window and left < last + offset - window:
                behind = torch.arange(first, last).unsqueeze(1) + offset - torch.arange(left, right)  # [rows, columns]
                mask = (behind < -ahead) | (behind >= window) if window else behind < -ahead
            columns.append((slice(k_start + left, k_start + right), mask))
        yield slice(q_start + first, q_start + last), columns


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[rows, H, D] -> [Hk, H / Hk * rows, D]: the queries of a K/V head as one matrix."""
    return q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(x: Tensor, rows: int) -> Tensor:
    """[Hk, H / Hk * rows, D] -> [rows, H, D]"""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _behind(rows: slice, keys: slice, apart: int, device: torch.device) -> Tensor:
    """[rows, keys]: how far before the query a key is; apart: of their pair."""
    return torch.arange(rows.start + apart, rows.stop + apart, device=device).unsqueeze(1) - torch.arange(keys.start, keys.stop, device=device)


def _scores(
    q: Tensor, k: Tensor, rows: slice, keys: slice, apart: int, mask: Tensor | None, scale: float, score: Score
) -> tuple[Tensor, Tensor | None]:
    """q [Hk, G * rows, D], k [columns, Hk, D] -> scores [Hk, G * rows, columns], and their derivative by the scaled product where it is not 1."""
    scores, slope = (q * scale) @ k.permute(1, 2, 0), None
    if score.softcap:
        bent = (scores / score.softcap).tanh_()
        scores, slope = bent * score.softcap, 1 - bent.square()
    if mask is not None or score.slopes is not None or score.bias is not None:
        by_head = scores.unflatten(1, (-1, rows.stop - rows.start))  # [Hk, G, rows, columns]
        added = score.added(_behind(rows, keys, apart, q.device), by_head.shape[0] * by_head.shape[1])
        if added is not None:
            by_head.add_(added.to(scores).unflatten(0, (len(q), -1)))
        if mask is not None:
            by_head.masked_fill_(mask.to(q.device), -torch.inf)
    return scores, slope


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float, score: Score = PLAIN) -> tuple[Tensor, Tensor]:
    wide, kv_heads = accumulator(q.dtype), k.shape[1]
    out = q.new_zeros(len(q), q.shape[1], v.shape[2], dtype=wide)
    lse = q.new_full((len(q), q.shape[1]), -torch.inf, dtype=wide)
    for pair in pairs:
        for rows, columns in _blocks(pair):
            size = rows.stop - rows.start
            queries = _grouped(q[rows].to(wide), kv_heads)
            top = queries.new_full((*queries.shape[:2], 1), -torch.inf)  # running maximum of the scores
            total = torch.zeros_like(top)  # running sum of exp(score - top)
            weighted = queries.new_zeros(*queries.shape[:2], v.shape[2])
            for keys, mask in columns:
                scores, _ = _scores(queries, k[keys].to(wide), rows, keys, pair.apart, mask, scale, score)
                raised = torch.maximum(top, scores.amax(-1, keepdim=True))
                shift = raised.masked_fill(raised == -torch.inf, 0.0)  # a window may leave a row nothing of its first block
                p, fade = (scores - shift).exp_(), (top - shift).exp_()
                total = total * fade + p.sum(-1, keepdim=True)
                weighted = torch.baddbmm(weighted * fade, p, v[keys].to(wide).transpose(0, 1))
                top = raised
            part, part_lse = _ungrouped(weighted / total, size), _ungrouped(top + total.log(), size).squeeze(-1)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)
    return out, lse


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float, score: Score = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    return backward_scores(dout, q, k, v, out, lse, pairs, scale, score)[:3]


def backward_scores(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float, score: Score
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `backward_pairs`, and the gradient of score.bias."""
    wide, kv_heads = accumulator(q.dtype), k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    dbias = None if score.bias is None else torch.zeros_like(score.bias, dtype=wide)
    for pair in pairs:
        for rows, columns in _blocks(pair):
            size = rows.stop - rows.start
            queries, grad = _grouped(q[rows].to(wide), kv_heads), _grouped(dout[rows].to(wide), kv_heads)
            row_lse = _grouped(lse[rows].to(wide).unsqueeze(-1), kv_heads)  # [Hk, G * rows, 1]
            delta = _grouped((dout[rows].to(wide) * out[rows].to(wide)).sum(-1, keepdim=True), kv_heads)
            grad_q = torch.zeros_like(queries)
            for keys, mask in columns:
                key, value = k[keys].to(wide), v[keys].to(wide)
                scores, slope = _scores(queries, key, rows, keys, pair.apart, mask, scale, score)
                p = (scores - row_lse).exp_()
                dv[keys] += (p.mT @ grad).transpose(0, 1)
                ds = p.mul_((grad @ value.permute(1, 2, 0)).sub_(delta))
                if dbias is not None:
                    buckets = score.buckets(_behind(rows, keys, pair.apart, q.device))
                    dbias.index_add_(1, buckets.flatten(), ds.unflatten(1, (-1, size)).flatten(0, 1).flatten(1))
                ds = ds if slope is None else ds.mul_(slope)
                grad_q += ds @ key.transpose(0, 1)
                dk[keys] += (ds.mT @ queries).transpose(0, 1) * scale
            dq[rows] += _ungrouped(grad_q, size) * scale
    return dq, dk, dv, dbias
