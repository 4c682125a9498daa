"""Attention over blocks that an index branch selects (MiniMax Sparse Attention, Lai et al. 2026)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltrain.kernels.rope import rotate
from ltrain.kernels.sparse_attention import block_index as kernels
from ltrain.kernels.sparse_attention.decoding import seen_blocks
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.attention import Attention
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.model.mixers.block_means import block_options, gathered
from ltrain.model.mixers.indexer import attach_index_loss
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import AttentionOptions
from ltrain.model.position import rotary_width, shared_rotary_tables
from ltrain.model.sequence import Sequence


@dataclass
class IndexedCache:
    tokens: KVCache
    index: KVCache  # keys of the index as one head, without values


class BlockIndex(nn.Module):
    """Scores every earlier token for each K/V head: a query for each head, one key for all, both normed and rotated as the attention's.

    Neither sends a gradient to the input. The branch is whole on every tensor rank, which uses the queries of its own heads.
    """

    gather: Callable[[Tensor], Tensor]

    def __init__(self, hidden: int, options: AttentionOptions, layers: LocalLayers):
        super().__init__()
        o = self.options = options
        self.gather, self.own = layers.gather, layers.of_heads(torch.arange(o.kv_heads))
        self.rotary = rotary_width(o.head_dim, o.rope) if o.rope else 0
        self.q = layers.whole(hidden, o.kv_heads * o.index_dim)
        self.k = layers.whole(hidden, o.index_dim)
        self.q_norm, self.k_norm = layers.head_norm(o.index_dim), layers.head_norm(o.index_dim)

    def forward(self, x: Tensor, seq: Sequence) -> kernels.Index:
        """x [T / tensor, hidden] -> queries [T, Hk, Di] and keys [T, Di] of all T tokens"""
        x = x.detach()
        q = self.gather(self.q_norm(self.q(x).unflatten(-1, (self.options.kv_heads, -1))))[:, self.own]
        k = self.gather(self.k_norm(self.k(x))).unsqueeze(1)
        rope = self.options.rope
        if rope is not None:
            cos, sin = shared_rotary_tables(seq, self.rotary, rope, torch.promote_types(q.dtype, torch.float32))
            q, k = rotate(q, cos, sin, rope.pairs), rotate(k, cos, sin, rope.pairs)
        return q, k.squeeze(1)


class BlockIndexAttention(Attention):
    """Each K/V head attends to the blocks of tokens whose best key suits its index query, and to the last ones."""

    entry = None  # the index reads x too

    def __init__(self, hidden: int, options: AttentionOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        self.index = BlockIndex(hidden, options, layers)
        self.dense = options.index_loss == "dense"

    def _indexed(self, q: Tensor, k: Tensor, v: Tensor, index: kernels.Index, seq: Sequence) -> Tensor:
        """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv], which carries the loss of the index."""
        o, parts, trains = self.options, seq.exchange.parts(seq), self.options.index_loss != "none" and torch.is_grad_enabled()
        y = seq.exchange.attention(q, k, v, seq, scale=self.scale) if self.dense else None
        if not seq.exchange.whole and (trains or not self.dense):
            k, v = gathered(k, v, seq)
            index = index[0], seq.exchange.gather(index[1], seq)
        indices = None
        if y is None:
            indices = seq.tape.keep(lambda: kernels.select_blocks(index, parts, **block_options(o)))
            y = kernels.selected_block_attention(q, k, v, indices, parts, scale=self.scale, block=o.block_size)
        if not trains:
            return y
        detached = q.detach(), k.detach()
        loss = kernels.index_loss(*detached, index, indices, seq.counted_parts(), scale=self.scale, block=o.block_size, kv_heads=o.kv_heads)
        return attach_index_loss(y, loss, o.index_loss_weight, seq)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v, gate = self._project(x, seq)
        return self._output(self._indexed(q, k, v, self.index(x, seq), seq), gate)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, IndexedCache]:  # type: ignore[override]
        q, k, v, gate = self._project(x, seq)
        index = self.index(x, seq)
        keys = index[1].unsqueeze(1)
        cache = IndexedCache(KVCache.of(k, v, seq), KVCache.of(keys, keys[..., :0], seq))
        return self._output(self._indexed(q, k, v, index, seq), gate), cache

    def decode(self, x: Tensor, state: IndexedCache, seq: Sequence) -> tuple[Tensor, IndexedCache]:  # type: ignore[override]
        """The caches are extended in place. A block's score is the largest of those that its parts have on the ranks."""
        o = self.options
        q, k, v, gate = self._project(x, seq)
        index_q, index_k = self.index(x, seq)
        state.tokens.append(k, v, seq)
        state.index.append(index_k.unsqueeze(1), index_k[:, None, :0], seq)
        kept = state.tokens
        if self.dense:
            y = seq.exchange.decode_attention(q, kept.k, kept.v, kept.behind(seq.positions), scale=self.scale)
            return self._output(y, gate), state
        own, numbers = seq.positions // o.block_size, kept.positions // o.block_size
        scores = kernels.block_scores(index_q, state.index.k.squeeze(2), numbers, -(-(kept.prompt + kept.decoded) // o.block_size))
        every = torch.arange(scores.shape[-1], device=x.device)
        scores.masked_fill_((every > (own - o.local_blocks).unsqueeze(1)).unsqueeze(1), -torch.inf)  # seen whatever their score
        chosen = seq.exchange.best(scores, every.expand(scores.shape), o.top_blocks - o.local_blocks)
        seen = seen_blocks(chosen, numbers, own, o.local_blocks)
        y = seq.exchange.decode_attention(q, kept.k, kept.v, kept.behind(seq.positions), scale=self.scale, seen=seen)
        return self._output(y, gate), state

    def _seen_before(self, context: int) -> float:
        return (context + 1) / 2 if self.dense else super()._seen_before(context)

    def flops(self, tokens: int, context: int) -> float:
        """The index still scores all tokens."""
        o = self.options
        index = 2 * self.hidden * (o.kv_heads + 1) * o.index_dim + o.kv_heads * o.index_dim * (context + 1)
        return super().flops(tokens, context) + tokens * index

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        return super().state_bytes(context, bytes_per_value) + self.options.index_dim * context * bytes_per_value

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """What is chosen from, with the index's keys; where the index only learns, it is asked for beside the ring."""
        width = self.options.kv_heads * (self.options.head_dim + self.value_dim)
        gathers = [ExchangeNeed("gather", width), ExchangeNeed("gather", self.options.index_dim)]
        ring = [ExchangeNeed("ring", width, self.mask)] if self.dense else []
        return ring + (gathers if not self.dense or self.options.index_loss != "none" else [])
