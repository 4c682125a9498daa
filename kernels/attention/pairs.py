"""What a piece of attention covers, and how pieces over the same queries are put together."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Query rows [q_start, q_start + q_len) see key rows [k_start, k_start + k_len).

    `causal` aligns the two ranges at their ends: query i of the pair sees its keys 0 .. k_len - q_len + i.
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    causal: bool


def causal_pairs(bounds: list[int]) -> list[Pair]:
    """Every segment sees itself, causally."""
    return [Pair(a, b - a, a, b - a, True) for a, b in pairwise(bounds) if b > a]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of two disjoint key sets.

    out [T, H, Dv] and lse [T, H] (log of the sum of exponentials of the scaled scores); a side that saw no key has lse -inf.
    Computed in float32 or wider. Source: the online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
    """
    dtype = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf is not a number: where neither side saw a key both weights are exp(-inf) = 0.
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - shift).exp().unsqueeze(-1), (lse_b - shift).exp().unsqueeze(-1)  # [T, H, 1]
    return out_a.to(dtype) * weight_a + out_b.to(dtype) * weight_b, lse
