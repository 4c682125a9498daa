"""Softmax attention with grouped K/V heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltrain.kernels import attention as kernels
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import AttentionOptions
from ltrain.model.position import rotary_width, rotate, shared_rotary_tables
from ltrain.model.sequence import Sequence


@dataclass
class KVCache:
    """Keys and values of N documents, padded to a common capacity L that doubles when it is full."""

    k: Tensor  # [N, L, Hk, D]
    v: Tensor  # [N, L, Hk, D]
    lengths: Tensor  # [N] int64: tokens held
    longest: int  # max(lengths), on the host

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> "KVCache":
        """From a packed stream k, v [T, Hk, D]."""
        lengths = cu_seqlens.diff().to(torch.int64)  # on the host
        longest = int(lengths.max()) if len(lengths) else 0
        index = torch.arange(longest)
        held = (index < lengths.unsqueeze(1)).nonzero(as_tuple=True)  # document and place of every token, in stream order
        held = tuple(i.to(k.device) for i in held)
        cache = cls(k.new_zeros(len(lengths), longest, *k.shape[1:]), v.new_zeros(len(lengths), longest, *v.shape[1:]), lengths.to(k.device), longest)
        cache.k[held], cache.v[held] = k, v
        return cache

    def append(self, k: Tensor, v: Tensor) -> None:
        """One token per document: k, v [N, Hk, D]."""
        if self.longest == self.k.shape[1]:
            grown = max(self.longest, 16)
            self.k = torch.cat((self.k, self.k.new_zeros(len(k), grown, *k.shape[1:])), dim=1)
            self.v = torch.cat((self.v, self.v.new_zeros(len(v), grown, *v.shape[1:])), dim=1)
        rows = torch.arange(len(k), device=k.device)
        self.k[rows, self.lengths], self.v[rows, self.lengths] = k, v
        self.lengths = self.lengths + 1
        self.longest += 1


class Attention(Mixer):
    """Causal softmax attention inside documents (Vaswani et al. 2017; GQA: Ainslie et al. 2023).

    Query and key may pass an RMSNorm per head (Henry et al. 2020), then RoPE; the output of each head may be multiplied
    elementwise with a sigmoid of a projection of the input (Qiu et al. 2025). Scores are scaled by head_dim^-0.5.
    """

    options: AttentionOptions

    def __init__(self, hidden: int, options: AttentionOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        if o.heads % o.kv_heads:
            raise ValueError(f"heads={o.heads} is not a multiple of kv_heads={o.kv_heads}: each K/V head serves the same number of query heads")
        self.heads, self.kv_heads = (layers.heads(o.heads, "heads"), layers.heads(o.kv_heads, "kv_heads"))
        self.rotary = rotary_width(o.head_dim, o.rope) if o.rope else 0
        self.scale = o.head_dim**-0.5
        query, key = o.heads * o.head_dim, o.kv_heads * o.head_dim
        self.qkv = layers.column(hidden, (query, key, key, query) if o.gate else (query, key, key))
        self.q_norm = layers.head_norm(o.head_dim) if o.qk_norm else None
        self.k_norm = layers.head_norm(o.head_dim) if o.qk_norm else None
        self.out = layers.row(query, hidden)

    def _project(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [T, H, D], k and v [T, Hk, D], and the gate's logits [T, H * D]."""
        q, k, v, *gate = self.qkv(x)
        q = q.unflatten(-1, (self.heads, -1))
        k, v = (k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.rope:
            cos, sin = shared_rotary_tables(seq, self.rotary, self.options.rope, torch.promote_types(q.dtype, torch.float32))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v, gate[0] if gate else None

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """y [T, H, D] -> [T, hidden]"""
        y = y.flatten(1)
        return self.out(y if gate is None else y * gate.sigmoid())

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v, gate = self._project(x, seq)
        return self._output(seq.exchange.attention(q, k, v, seq, scale=self.scale), gate)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, KVCache]:
        q, k, v, gate = self._project(x, seq)
        y = seq.exchange.attention(q, k, v, seq, scale=self.scale)
        return self._output(y, gate), KVCache.of(k, v, seq.cu_seqlens)

    def decode(self, x: Tensor, state: KVCache, seq: Sequence) -> tuple[Tensor, KVCache]:
        """The cache is extended in place."""
        q, k, v, gate = self._project(x, seq)
        state.append(k, v)
        y = kernels.decode_attention(q, state.k, state.v, state.lengths, scale=self.scale)
        return self._output(y, gate), state

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        query, key = o.heads * o.head_dim, o.kv_heads * o.head_dim
        projections = 2 * self.hidden * ((3 if o.gate else 2) * query + 2 * key)
        return tokens * (projections + 4 * query * (context + 1) / 2)  # a token sees half the document on average

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        return 2 * self.options.kv_heads * self.options.head_dim * context * bytes_per_value

    def exchanges(self, tokens: int, ranks: int, bytes_per_value: int = 2) -> list[ExchangeNeed]:
        if ranks == 1:
            return []
        return [ExchangeNeed("ring", self.state_bytes(tokens, bytes_per_value) * (ranks - 1) // ranks)]


MIXER = Attention
