"""Attention to what an encoder gave for each document."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ltrain.kernels.attention import Pair, decode_attention, pair_attention
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import CrossAttentionOptions
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Memory, Sequence


@dataclass
class MemoryCache:
    """Keys and values of the memories of N documents, of which decoding adds none."""

    k: Tensor  # [N, L, Hk, D]
    v: Tensor  # [N, L, Hk, D]
    behind: Tensor  # [N, L] int64: 0 where there is a row, -1 behind a document's last


class CrossAttention(Mixer):
    """Softmax attention whose queries are the tokens of a document and whose keys and values are the rows of its memory, all of which each
    token sees (Vaswani et al. 2017, section 3.2.3; Flamingo, Alayrac et al. 2022; with norms of queries and keys: Llama 3.2 Vision, Meta 2024).

    Tokens of a document without memory get zeros; a feed-forward behind serves them all the same, as in Flamingo, where Llama 3.2 Vision leaves
    the whole layer out. There are no positions: those of the memory are the encoder's. Every tensor and context rank has the whole memory, so
    that nothing is exchanged.
    """

    options: CrossAttentionOptions
    entry = "q"
    reads_memory = True

    def __init__(self, hidden: int, options: CrossAttentionOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        if o.heads % o.kv_heads:
            raise ValueError(f"heads={o.heads} is not a multiple of kv_heads={o.kv_heads}: each K/V head serves the same number of query heads")
        self.heads, self.kv_heads = layers.heads(o.heads, "heads"), layers.heads(o.kv_heads, "kv_heads")
        self.memory_width, self.scale = o.memory_width or hidden, o.head_dim**-0.5
        self.q = layers.column(hidden, (o.heads * o.head_dim,))
        self.kv = layers.column_of_all(self.memory_width, (o.kv_heads * o.head_dim, o.kv_heads * o.head_dim))
        self.q_norm, self.k_norm = (layers.head_norm(o.head_dim) if o.qk_norm == "head" else None for _ in range(2))
        self.out = layers.output(o.heads * o.head_dim, hidden)

    @staticmethod
    def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
        return x if norm is None else cheap(norm, x)

    def _queries(self, x: Tensor) -> Tensor:
        """x [T / tensor, hidden] -> [T, H, D]"""
        (q,) = self.q(x)
        return self._normed(q.unflatten(-1, (self.heads, -1)), self.q_norm)

    def _keys_values(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, list[int]]:
        """k and v [M, Hk, D] of the whole memory, and its boundaries between documents. x: for its type and device."""
        documents = len(seq.cu_seqlens) - 1
        # without a memory there are no rows, so that every parameter has a gradient all the same
        memory = seq.memory or Memory.of(x.new_zeros(0, self.memory_width), [0] * documents)
        bounds, states = memory.cu_seqlens.tolist(), memory.states
        if len(bounds) - 1 != documents or bounds[-1] != len(states):
            raise ValueError(
                f"the memory has {len(states)} rows and boundaries {bounds} for a stream of {documents} documents: "
                "give one length for each document, 0 where it has none, which sum to the rows"
            )
        if states.shape[1] != self.memory_width:
            raise ValueError(f"rows of the memory are {states.shape[1]} wide and memory_width is {self.memory_width}: they must be equal")
        k, v = self.kv(states.to(x.dtype))
        k, v = k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1))
        return self._normed(k, self.k_norm), v, bounds

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, bounds: list[int], seq: Sequence) -> Tensor:
        """[T / tensor, hidden]"""
        pairs, row = [], 0
        for document, _, count in seq.exchange.runs(seq):
            pairs.append(Pair(row, count, bounds[document], bounds[document + 1] - bounds[document], False))
            row += count
        return self.out(pair_attention(self._queries(x), k, v, pairs, scale=self.scale).flatten(1))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._attend(x, *self._keys_values(x, seq), seq)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, MemoryCache]:
        k, v, bounds = self._keys_values(x, seq)
        lengths = [b - a for a, b in pairwise(bounds)]
        padded = [pad_sequence(t.split(lengths), batch_first=True) for t in (k, v)]  # [N, L, Hk, D]
        behind = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
        return self._attend(x, k, v, bounds, seq), MemoryCache(padded[0], padded[1], (behind.long() - 1).to(k.device))

    def decode(self, x: Tensor, state: MemoryCache, seq: Sequence) -> tuple[Tensor, MemoryCache]:
        """The memory is that of the prefill."""
        q = self._queries(x)
        y, _ = decode_attention(q, state.k, state.v, state.behind, scale=self.scale)
        return self.out(y.to(q.dtype).flatten(1)), state

    def flops(self, tokens: int, context: int) -> float:
        """With memories of `memory_length` rows, which are projected once for each document."""
        o = self.options
        each = 4 * self.hidden * o.heads * o.head_dim + 4 * o.heads * o.head_dim * o.memory_length
        return tokens * each + tokens / context * o.memory_length * 4 * self.memory_width * o.kv_heads * o.head_dim

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Of a memory of `memory_length` rows, whatever the context."""
        o = self.options
        return 2 * o.memory_length * o.kv_heads * o.head_dim * bytes_per_value

    def read_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Decoding projects no memory."""
        o = self.options
        return super().read_bytes(context, bytes_per_value) - 2 * self.memory_width * o.kv_heads * o.head_dim * bytes_per_value

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        return []


MIXER = CrossAttention
