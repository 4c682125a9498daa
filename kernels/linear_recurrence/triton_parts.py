"""Long segments in parts that are passed through at once, where heads and columns of a state alone do not fill a GPU.

The state after a part is M S + E of the state S before it, as between ranks: E and M are where zeros, and the identity with nothing to store,
end. They are made for all parts at once, then the states before the parts from each other, and then all parts are passed through once more.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST = 16  # chunks of a part
FEWEST = 4  # parts at once


class Parts(NamedTuple):
    """On the device: the tokens and the chunks of each part, cuts and bounds [P + 1] (int32); each segment's first and last part [N]; and of
    those that are the second of their segment, the third and so on, which they are."""

    cuts: Tensor
    bounds: Tensor
    firsts: Tensor
    lasts: Tensor
    later: tuple[Tensor, ...]

    @property
    def number(self) -> int:
        return len(self.cuts) - 1


def part_length(cuts: tuple[int, ...], at_once: int, block: int) -> int:
    """Chunks of a part, of `block` tokens, where a GPU has room for `at_once` parts of all heads; 0 where segments are to be passed through
    whole, which takes as long as the longest one: parts take as long as three of them in the forward pass, and three in the backward, not two.
    """
    length = max(SHORTEST, -(-cuts[-1] // (block * max(at_once, 1))))
    longest = max((b - a for a, b in pairwise(cuts)), default=0)
    return length if at_once >= FEWEST and longest > 3 * length * block else 0


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def parts_of(cuts: tuple[int, ...], length: int, block: int, device: torch.device) -> Parts:
    """Parts of up to `length` chunks of `block` tokens; an empty segment is one."""
    tokens = torch.tensor(cuts, dtype=torch.int64)
    counts = ((tokens.diff() + length * block - 1) // (length * block)).clamp(min=1)
    ends = counts.cumsum(0)
    segment = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(segment)) - (ends - counts)[segment]
    starts = torch.minimum(tokens[segment] + place * length * block, tokens[segment + 1])
    found = torch.cat([starts, tokens[-1:]])
    bounds = torch.cat([tokens.new_zeros(1), ((found.diff() + block - 1) // block).cumsum(0)])

    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    later = tuple(moved(torch.nonzero(place == n)[:, 0]) for n in range(1, int(counts.max()) if len(counts) else 1))
    return Parts(moved(found.to(torch.int32)), moved(bounds.to(torch.int32)), moved(ends - counts), moved(ends - 1), later)


def _composed(maps: Tensor, x: Tensor, added: Tensor) -> Tensor:
    """maps x + added, of [n, H, K, K], [n, H, K, V] and [n, H, K, V], float32."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.baddbmm(added.flatten(0, 1), maps.flatten(0, 1), x.flatten(0, 1)).view_as(x)


def states_before(initial: Tensor, maps: Tensor, ends: Tensor, parts: Parts) -> Tensor:
    """The state before each part [P, H, K, V] from those before the segments [N, H, K, V] and each part's M and E."""
    states = torch.empty_like(ends)
    states[parts.firsts] = initial
    for at in parts.later:
        states[at] = _composed(maps[at - 1], states[at - 1], ends[at - 1])
    return states


def gradients_after(dfinal: Tensor, maps: Tensor, begins: Tensor, parts: Parts) -> Tensor:
    """The gradient of the state after each part [P, H, K, V], likewise from the last one back; begins: where zeros get to before each part."""
    gradients = torch.empty_like(begins)
    gradients[parts.lasts] = dfinal
    for at in reversed(parts.later):
        gradients[at - 1] = _composed(maps[at].mT, gradients[at], begins[at])
    return gradients
