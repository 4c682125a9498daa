"""Differential attention: what one softmax sees, less what another sees (Ye et al. 2024)."""

import math

import torch
from torch import Tensor

from ltrain.model.layers import LocalLayers, ParamLayout, normal
from ltrain.model.mixers.attention import Attention
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import AttentionOptions
from ltrain.model.sequence import Sequence

STD = 0.1  # of the vectors that lambda is made of (Ye et al. 2024)


class DifferentialAttention(Attention):
    """(1 - l0) norm((softmax(q1 k1) - l softmax(q2 k2)) v) with l = exp(a1 . b1) - exp(a2 . b2) + l0 and l0 = 0.8 - 0.6 exp(-0.3 layer).

    Head j of the first half of the heads is a pair with head j of the second half; a pair's value is as wide as two heads. Here a pair
    is one head of width 2 D: q [T, H / 2, 2 D], k and v [T, Hk / 2, 2 D]. One call of attention for each of the two softmaxes.
    """

    def __init__(self, hidden: int, options: AttentionOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        self.heads, self.kv_heads = layers.heads(options.heads // 2, "heads / 2"), layers.heads(options.kv_heads // 2, "kv_heads / 2")
        self.base = 0.8 - 0.6 * math.exp(-0.3 * layers.layer)
        vector = ParamLayout((options.head_dim,), normal(STD), partial_gradient=True, decay=False)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (layers.parameter(vector) for _ in range(4))
        self.pair_norm = layers.weightless_norm()

    @property
    def _parts(self) -> tuple[int, ...]:
        """Widths of q1, q2, k1, k2, the two halves of v, and the gate, of the whole mixer."""
        o = self.options
        queries, keys = o.heads // 2 * o.head_dim, o.kv_heads // 2 * o.head_dim
        return (queries, queries, keys, keys, keys, keys, *((2 * queries,) if o.gate == "elementwise" else ()))

    def _project(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q1, q2, k1, k2, v1, v2, *gate = self.qkv(x)
        (q1, k1), (q2, k2) = self._placed(q1, k1, seq), self._placed(q2, k2, seq)
        v = torch.cat([half.unflatten(-1, (self.kv_heads, -1)) for half in (v1, v2)], dim=-1)
        v = v if self.options.value_scale == 1 else v * self.options.value_scale
        return torch.cat((q1, q2), dim=-1), torch.cat((k1, k2), dim=-1), v, gate[0] if gate else None

    def _difference(self, y1: Tensor, y2: Tensor) -> Tensor:
        """y1 and y2 [T, H / 2, 2 D] of the two softmaxes -> [T, H / 2, 2 D]"""
        wide = torch.promote_types(y1.dtype, torch.float32)
        a, b = ((q.to(wide) * k.to(wide)).sum().exp() for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)))
        y: Tensor = self.pair_norm(y1 - (a - b + self.base).to(y1.dtype) * y2)
        return y * (1 - self.base)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        pairs = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        return self._difference(*(seq.exchange.attention(a, b, v, seq, scale=self.scale, mask=self.mask, score=self.score) for a, b in pairs))

    def _decode(self, q: Tensor, state: KVCache, seq: Sequence) -> Tensor:
        pairs = zip(q.chunk(2, dim=-1), state.k.chunk(2, dim=-1), strict=True)
        behind = state.behind(seq.positions)
        found = (seq.exchange.decode_attention(a, b, state.v, behind, scale=self.scale, score=self.score) for a, b in pairs)
        return self._difference(*found)

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        projections = 2 * self.hidden * (sum(self._parts) + o.heads * o.head_dim)
        return tokens * (projections + 2 * o.heads * 3 * o.head_dim * self._seen(context))

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """Values travel with the keys of each softmax."""
        width = 3 * self.options.kv_heads // 2 * self.options.head_dim
        return [ExchangeNeed("ring", width, self.mask)] * 2
