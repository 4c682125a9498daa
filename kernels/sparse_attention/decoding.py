"""The choice of keys or blocks for one new token of each document, where each of several ranks has scores of some of them.

A rank's best candidates, as many as are chosen in all, are enough to know the best of all ranks: whatever it leaves out has that many before it.
That holds for blocks too whose score is the largest of parts that several ranks have, since the largest part is some rank's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def candidates(scores: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """scores and numbers [..., n] of keys or blocks (-inf: none) -> the `count` of highest score, [..., count] each, filled up with -inf and -1."""
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    missing = (0, count - best.values.shape[-1])
    return F.pad(best.values, missing, value=-torch.inf), F.pad(numbers.gather(-1, best.indices), missing, value=-1)


def best_numbers(scores: Tensor, numbers: Tensor, count: int) -> Tensor:
    """scores and numbers [..., n] of candidates (-inf: none) -> the numbers of the `count` of highest score [..., count], -1 where there are fewer.

    Of a number that is there more than once the highest score counts. Of equal scores the lowest number comes first: all ranks choose alike.
    """
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    numbers, by_number = numbers.gather(-1, order).sort(dim=-1, stable=True)  # of each the highest score first
    scores = scores.gather(-1, by_number)
    again = F.pad(numbers[..., 1:] == numbers[..., :-1], (1, 0))
    scores, order = scores.masked_fill(again, -torch.inf).sort(dim=-1, descending=True, stable=True)
    found = numbers.gather(-1, order).masked_fill(scores == -torch.inf, -1)[..., :count]
    return F.pad(found, (0, count - found.shape[-1]), value=-1)


def among(numbers: Tensor, chosen: Tensor) -> Tensor:
    """numbers [..., n], chosen [..., c] (-1: none) -> [..., n], whether a number, at least 0, is chosen"""
    if not chosen.shape[-1]:
        return torch.zeros_like(numbers, dtype=torch.bool)
    ordered = chosen.sort(dim=-1).values
    place = torch.searchsorted(ordered, numbers.contiguous()).clamp(max=chosen.shape[-1] - 1)
    return (ordered.gather(-1, place) == numbers) & (numbers >= 0)


def seen_blocks(chosen: Tensor, blocks: Tensor, own: Tensor, local: int) -> Tensor:
    """chosen [N, h, c] (-1: none), blocks [N, L] of the keys (negative: none), own [N], the new tokens' -> [N, h, L], whether a key is seen: one of
    a chosen block or of the last `local` up to the own one."""
    near = (blocks > (own - local).unsqueeze(1)).unsqueeze(1)
    return among(blocks.unsqueeze(1).expand(-1, chosen.shape[1], -1), chosen) | near
