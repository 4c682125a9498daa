"""Multi-token prediction: what each position says about tokens beyond the next one (DeepSeek-AI 2024, section 2.2)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltrain.config import LayerSpec
from ltrain.model.block import Block
from ltrain.model.layers import LocalLayers
from ltrain.model.options import StreamOptions
from ltrain.model.sequence import Sequence
from ltrain.model.streams import Gathered, spread


class Ahead(NamedTuple):
    """Of each position, at one depth: the last token that it is given, and the one after that, which it predicts."""

    tokens: Tensor  # [T] int64; 0 where the document has ended
    labels: Tensor  # [T] int64; -100 where there is none


def ahead(tokens: Tensor, labels: Tensor, cu_seqlens: Tensor, depth: int) -> list[Ahead]:
    """For depths 1 to `depth`, of a whole stream on the host: tokens and labels [T] (the next token of each), cu_seqlens [documents + 1].

    No position is given or predicts a token of another document.
    """
    lengths = cu_seqlens.diff().long()
    ends = torch.repeat_interleave(cu_seqlens[1:].long(), lengths)  # [T], of each position's document
    found = []
    for k in range(1, depth + 1):
        place = torch.arange(len(tokens)) + k
        inside = place < ends
        place = place.where(inside, 0)
        found.append(Ahead(tokens[place].where(inside, 0), labels[place].where(inside, -100)))
    return found


class MTPHead(nn.Module):
    """h'_i = norm(layer(W [enorm(embedding of token i + k); hnorm(h_i)])): what the output head reads for token i + k + 1.

    The embedding is the model's own, scaled as for its first layer; enorm takes the place of a norm there.
    """

    def __init__(self, hidden: int, spec: LayerSpec, layers: LocalLayers, recompute: str, streams: StreamOptions):
        super().__init__()
        self.hidden, self.streams = hidden, streams
        self.enorm, self.hnorm = layers.norm(hidden), layers.norm(hidden)
        self.projection = layers.whole(2 * hidden, hidden)
        self.block = Block(hidden, spec, layers, recompute, streams)
        self.gathered = Gathered(hidden, streams, layers) if streams.count > 1 else None
        self.norm = layers.norm(hidden)

    def forward(self, x: Tensor, embedded: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] as the output head reads it at the depth before, embedded [T, hidden] -> [T, hidden]"""
        both = torch.cat((self.enorm(embedded), self.hnorm(x)), dim=-1)
        y = self.block(spread(self.projection(both), self.streams.count), seq)
        return self.norm(y if self.gathered is None else self.gathered(y))  # type: ignore[no-any-return]

    def flops(self, tokens: int, context: int) -> float:
        """Forward floating-point operations for `tokens` tokens in documents of `context` tokens."""
        return sum(self.block.flops(tokens, context).values()) + tokens * 4 * self.hidden * self.hidden
