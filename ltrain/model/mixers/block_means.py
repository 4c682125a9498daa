"""Attention over blocks that their mean keys select (MoBA, Lu et al. 2025)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltrain.kernels.segments import accumulator
from ltrain.kernels.sparse_attention.block_means import block_attention
from ltrain.kernels.sparse_attention.decoding import seen_blocks
from ltrain.model.mixers.attention import Attention
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import AttentionOptions
from ltrain.model.sequence import Sequence


def block_options(options: AttentionOptions) -> dict[str, Any]:
    return {"block": options.block_size, "top": options.top_blocks, "local": options.local_blocks}


def gathered(k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
    """k [T, Hk, D] and v [T, Hk, Dv] of this rank's tokens -> those of its documents up to its last part of each"""
    if seq.exchange.whole:
        return k, v
    widths, rows = (k.shape[-1], v.shape[-1]), torch.cat((k, v), dim=-1)
    k, v = seq.exchange.gather(rows.flatten(1), seq).unflatten(-1, rows.shape[1:]).split(widths, -1)
    return k, v


@dataclass
class BlockMeansCache:
    """A block belongs to the context rank of its last token, for which a prefill has gathered the others. The sum of the block that is not full yet
    is on every rank, as each computes the keys of decoded tokens; those that become full then go to the ranks in turn."""

    tokens: KVCache
    means: KVCache  # of whole blocks, as keys without values
    begun: Tensor  # [N, Hk, D], float32 or wider: the sum of the keys behind the last whole block

    @classmethod
    def of(cls, tokens: KVCache, k: Tensor, seq: Sequence, block: int) -> "BlockMeansCache":
        """k [n, Hk, D]: what `gathered` gives."""
        whole, wide, shape = seq.cu_seqlens.diff().tolist(), k.to(accumulator(k.dtype)), k.shape[1:]
        begun = wide.new_zeros(len(seq.positions), *shape)  # at the last token of each document that ends here
        means = [wide[:0]]
        for (document, first, count), part in zip(seq.exchange.runs(seq), seq.exchange.parts(seq), strict=True):
            low, high, end = first // block, (first + count) // block, first + count
            full = wide[part.begin + low * block : part.begin + high * block]
            means.append(full.view(high - low, block, *shape).mean(1))
            if count and end == whole[document]:
                begun[part.stop - 1] = wide[part.begin + high * block : part.begin + end].sum(0)
        of_blocks = torch.cat(means).to(k.dtype)
        rest = seq.exchange.last(begun.flatten(1), seq, 1).view(-1, *shape)
        return cls(tokens, KVCache.of(of_blocks, of_blocks[..., :0], seq, units=lambda n: n // block), rest)

    def append(self, k: Tensor, v: Tensor, seq: Sequence, block: int) -> None:
        self.tokens.append(k, v, seq)
        self.begun = self.begun + k
        full, number = (seq.positions + 1) % block == 0, seq.positions // block
        self.means.append_blocks((self.begun / block).to(k.dtype), v[..., :0], number, full & seq.exchange.takes(number), block)
        self.begun = self.begun.masked_fill(full[:, None, None], 0)


class BlockMeansAttention(Attention):
    """Each head attends to the blocks of tokens whose mean key suits its query, and to the last ones."""

    def _over(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        """q [T, H, D] over gathered k and v"""
        return block_attention(q, k, v, seq.exchange.parts(seq), scale=self.scale, **block_options(self.options))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        return self._over(q, *gathered(k, v, seq), seq)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, BlockMeansCache]:  # type: ignore[override]
        q, k, v, gate = self._project(x, seq)
        whole = gathered(k, v, seq)
        cache = BlockMeansCache.of(KVCache.of(k, v, seq), whole[0], seq, self.options.block_size)
        return self._output(self._over(q, *whole, seq), gate), cache

    def decode(self, x: Tensor, state: BlockMeansCache, seq: Sequence) -> tuple[Tensor, BlockMeansCache]:  # type: ignore[override]
        """The caches are extended in place."""
        o, tokens, means = self.options, state.tokens, state.means
        q, k, v, gate = self._project(x, seq)
        state.append(k, v, seq, o.block_size)
        own, group = seq.positions // o.block_size, self.heads // self.kv_heads
        scores = torch.einsum("nhd,nbhd->nhb", q, means.k.repeat_interleave(group, 2)).to(accumulator(q.dtype))
        near = (means.positions < 0) | (means.positions > (own - o.local_blocks).unsqueeze(1))  # no block, or one that is seen whatever its mean
        numbers = means.positions.unsqueeze(1).expand(scores.shape)
        chosen = seq.exchange.best(scores.masked_fill(near.unsqueeze(1), -torch.inf), numbers, o.top_blocks - o.local_blocks)
        seen = seen_blocks(chosen, tokens.positions // o.block_size, own, o.local_blocks)
        y = seq.exchange.decode_attention(q, tokens.k, tokens.v, tokens.behind(seq.positions), scale=self.scale, seen=seen)
        return self._output(y, gate), state

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """With a mean of each whole block, and the sum of the last one in at least float32."""
        o = self.options
        means = o.kv_heads * o.head_dim * (context // o.block_size * bytes_per_value + max(bytes_per_value, 4))
        return super().state_bytes(context, bytes_per_value) + means

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        return [ExchangeNeed("gather", self.options.kv_heads * (self.options.head_dim + self.value_dim))]
