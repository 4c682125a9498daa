"""Keys and values of decoded documents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltrain.kernels.attention import FULL, Mask
from ltrain.model.sequence import Sequence


@dataclass
class KVCache:
    """Keys and values of N documents, or this rank's part of them, in a common capacity L that doubles when it is full. A row may stand for a
    block of tokens: then positions and lengths are of blocks.

    What the mask hides from every later token is not kept: with a window the slots behind the anchors are used in turn, and a chunk
    begins again at the first slot. Softmax does not ask in which order keys lie; `positions` tell which they are.
    """

    k: Tensor  # [N, L, Hk, D]
    v: Tensor  # [N, L, Hk, Dv]
    positions: Tensor  # [N, L] int64: of the token in its document; -1: the slot is empty
    lengths: Tensor  # [N] int64: tokens that came here; where the mask hides none they have the first slots
    longest: int  # slots that the longest document takes, on the host
    mask: Mask = FULL
    prompt: int = 0  # tokens of the longest document in the prefill, on all ranks together
    decoded: int = 0  # and of each since then

    @classmethod
    def of(cls, k: Tensor, v: Tensor, seq: Sequence, mask: Mask = FULL, units: Callable[[int], int] = int) -> "KVCache":
        """From this rank's part of a packed stream of whole documents, k [T, Hk, D] and v [T, Hk, Dv], with seq.room for what decoding
        adds. units: where a row is not a token, the rows that the first so many tokens of a document have; they are with the last token's."""
        tokens, most = seq.cu_seqlens.diff().tolist(), limit(mask)
        whole = [units(n) for n in tokens]
        counts, row = [0] * len(whole), 0
        places: list[tuple[int, Tensor, Tensor, Tensor]] = []  # document, positions, slots of its cache, rows of the stream
        for document, begin, length in seq.exchange.runs(seq):
            first, count = units(begin), units(begin + length) - units(begin)
            kept = torch.arange(first, first + count)
            if mask.window:
                kept = kept[(kept < mask.anchors) | (kept >= whole[document] - mask.window)]
            if mask.chunk:
                kept = kept[kept >= (whole[document] - 1) // mask.chunk * mask.chunk]
            to = slots(kept, mask) if most else kept - first + counts[document]
            places.append((document, kept.to(k.device), to.to(k.device), (kept - first + row).to(k.device)))
            counts[document], row = counts[document] + count, row + count
        longest = max(whole if most else counts, default=0)
        room = max((units(n + seq.room) - units(n) for n in tokens), default=0)
        shape = len(whole), min(longest + room, most or longest + room)
        positions = torch.full(shape, -1, device=k.device)
        empty = k.new_zeros(*shape, *k.shape[1:]), v.new_zeros(*shape, *v.shape[1:])
        cache = cls(*empty, positions, torch.tensor(counts).to(k.device), longest, mask, max(tokens, default=0))
        for document, kept, to, rows in places:
            cache.k[document, to], cache.v[document, to], cache.positions[document, to] = k[rows], v[rows], kept
        return cache

    def append(self, k: Tensor, v: Tensor, seq: Sequence) -> None:
        """One token per document, k [N, Hk, D], v [N, Hk, Dv], in place, where it is this rank's turn to keep it."""
        most = limit(self.mask)
        here = seq.exchange.keeps(self.decoded)
        self.decoded += 1
        if most or here:
            self.longest += 1
        if not here:
            return
        self._make_room(min(self.longest, most or self.longest), most)
        rows, to = torch.arange(len(k), device=k.device), slots(seq.positions, self.mask) if most else self.lengths
        self.k[rows, to], self.v[rows, to], self.positions[rows, to] = k, v, seq.positions
        self.lengths = self.lengths + 1

    def append_blocks(self, k: Tensor, v: Tensor, numbers: Tensor, here: Tensor, every: int) -> None:
        """Of each document a block, or none: k [N, Hk, D], v [N, Hk, Dv] and numbers [N], in place, where `here` [N]. Called once for each token;
        every: tokens from one block of a document to its next."""
        self.decoded += 1
        # as many as there can be, and one to write to where there is none: without waiting for what `here` is on a device
        self._make_room(self.longest + -(-self.decoded // every) + 1, 0)
        rows = torch.arange(len(k), device=k.device)
        for kept, new in ((self.k, k), (self.v, v), (self.positions, numbers)):
            kept[rows, self.lengths] = torch.where(here.view(-1, *[1] * (new.ndim - 1)), new, kept[rows, self.lengths])
        self.lengths = self.lengths + here

    def _make_room(self, needed: int, most: int) -> None:
        """For so many rows of a document, at most `most` (0: no limit)."""
        if needed <= self.k.shape[1]:
            return
        grown = max(self.k.shape[1], 16)
        grown = max(needed - self.k.shape[1], min(grown, most - self.k.shape[1])) if most else max(grown, needed - self.k.shape[1])
        self.k = torch.cat((self.k, self.k.new_zeros(len(self.k), grown, *self.k.shape[2:])), dim=1)
        self.v = torch.cat((self.v, self.v.new_zeros(len(self.v), grown, *self.v.shape[2:])), dim=1)
        self.positions = torch.cat((self.positions, self.positions.new_full((len(self.k), grown), -1)), dim=1)

    def behind(self, positions: Tensor) -> Tensor:
        """[N, L]: how far behind a token at positions [N] each key is; -1 where it does not see it."""
        now = positions.unsqueeze(1)
        behind, hidden = now - self.positions, self.positions < 0
        if self.mask.window:
            hidden = hidden | (behind >= self.mask.window) & (self.positions >= self.mask.anchors)
        if self.mask.chunk:
            hidden = hidden | (now // self.mask.chunk != self.positions // self.mask.chunk)
        return behind.masked_fill(hidden, -1)


def limit(mask: Mask) -> int:
    """The most tokens of a document that a later one sees under the mask; 0: all."""
    return mask.chunk or (mask.window and mask.window + mask.anchors)


def slots(positions: Tensor, mask: Mask) -> Tensor:
    """Where the cache of a document keeps the tokens at these positions, under a mask that hides some."""
    if mask.chunk:
        return positions % mask.chunk
    return positions.where(positions < mask.anchors, mask.anchors + (positions - mask.anchors) % mask.window)
