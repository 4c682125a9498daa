"""Keys and values of decoded documents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltrain.kernels.attention import FULL, Mask
from ltrain.model.sequence import Sequence


@dataclass
class KVCache:
    """Keys and values of N documents, or this rank's part of them, in a common capacity L that doubles when it is full.

    What the mask hides from every later token is not kept: with a window the slots behind the anchors are used in turn, and a chunk
    begins again at the first slot. Softmax does not ask in which order keys lie.
    """

    k: Tensor  # [N, L, Hk, D]
    v: Tensor  # [N, L, Hk, Dv]
    lengths: Tensor  # [N] int64: tokens held here, in the first slots
    longest: int  # tokens of the longest document, on the host
    seen: Tensor  # [N] int64: tokens of each document whose key and value came here
    mask: Mask = FULL
    decoded: int = 0  # tokens of each document since the prefill, on all ranks together

    @classmethod
    def of(cls, k: Tensor, v: Tensor, seq: Sequence, mask: Mask = FULL) -> "KVCache":
        """From this rank's part of a packed stream of whole documents, k [T, Hk, D] and v [T, Hk, Dv], with seq.room for what decoding
        adds. A mask that hides tokens takes the whole stream."""
        counts, row = [0] * (len(seq.cu_seqlens) - 1), 0
        places: list[tuple[int, Tensor, Tensor]] = []  # document, slots of its cache, rows of the stream
        for document, count in seq.exchange.runs(seq):
            kept = torch.arange(counts[document], counts[document] + count)  # positions, or places on this rank
            if mask.window:
                kept = kept[(kept < mask.anchors) | (kept >= count - mask.window)]
            if mask.chunk:
                kept = kept[kept >= (count - 1) // mask.chunk * mask.chunk]
            places.append((document, slots(kept, mask), kept - counts[document] + row))
            counts[document], row = counts[document] + count, row + count
        longest = max(counts, default=0)
        shape = len(counts), min(longest + seq.room, limit(mask) or longest + seq.room)
        seen = torch.tensor(counts).to(k.device)
        cache = cls(k.new_zeros(*shape, *k.shape[1:]), v.new_zeros(*shape, *v.shape[1:]), seen, longest, seen, mask)
        cache.lengths = cache._held()
        for document, to, rows in places:
            cache.k[document, to.to(k.device)], cache.v[document, to.to(k.device)] = k[rows.to(k.device)], v[rows.to(k.device)]
        return cache

    def append(self, k: Tensor, v: Tensor) -> None:
        """One token per document: k [N, Hk, D], v [N, Hk, Dv]."""
        most = limit(self.mask)
        if self.longest == self.k.shape[1] and not most or self.k.shape[1] <= self.longest < most:
            grown = max(self.longest, 16)
            grown = min(grown, most - self.k.shape[1]) if most else grown
            self.k = torch.cat((self.k, self.k.new_zeros(len(k), grown, *k.shape[1:])), dim=1)
            self.v = torch.cat((self.v, self.v.new_zeros(len(v), grown, *v.shape[1:])), dim=1)
        rows, to = torch.arange(len(k), device=k.device), slots(self.seen, self.mask)
        self.k[rows, to], self.v[rows, to] = k, v
        self.seen = self.seen + 1
        self.longest += 1
        self.lengths = self._held()

    def _held(self) -> Tensor:
        if self.mask.chunk:
            return (self.seen - 1) % self.mask.chunk + (self.seen > 0)
        return self.seen.clamp(max=limit(self.mask)) if self.mask.window else self.seen


def limit(mask: Mask) -> int:
    """The most tokens of a document that a later one sees under the mask; 0: all."""
    return mask.chunk or (mask.window and mask.window + mask.anchors)


def slots(positions: Tensor, mask: Mask) -> Tensor:
    """Where the cache of a document keeps the tokens at these positions."""
    if mask.chunk:
        return positions % mask.chunk
    return positions.where(positions < mask.anchors, mask.anchors + (positions - mask.anchors) % mask.window) if mask.window else positions
