"""Multi-head latent attention."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.rope import rotate
from ltrain.kernels.sparse_attention import index_loss
from ltrain.kernels.sparse_attention.latent import latent_attention, latent_index_loss
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.mixers.indexer import SELECTION, Index, Indexer, selects_everything
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import MLAOptions
from ltrain.model.position import query_temperature, shared_rotary_tables
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Latent, Sequence


class MLA(Mixer):
    """Causal softmax attention whose keys and values come from a latent of kv_rank numbers for each token and one key with position that
    all heads share (DeepSeek-V2, Liu et al. 2024).

    Training expands the latent to keys and values of every head. Decoding, and attention over the keys that an indexer selects, keep latents
    alone: the expansion of keys is multiplied into the query, that of values into the output.
    """

    options: MLAOptions
    gather: Callable[[Tensor], Tensor]

    def __init__(self, hidden: int, options: MLAOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.heads = layers.heads(o.heads, "heads")
        self.gather = layers.gather
        # a long-context YaRN softens the softmax by more than cos and sin carry (DeepSeek-V2's code)
        soften = 0.1 * o.rope.mscale_all_dim * math.log(o.rope.factor) + 1.0 if o.rope and o.rope.mscale_all_dim else 1.0
        self.scale = (o.nope_dim + o.rope_dim) ** -0.5 * soften**2
        queries = (o.heads * o.nope_dim, o.heads * o.rope_dim)
        self.q_down = layers.whole(hidden, o.q_rank, bias=o.bias) if o.q_rank else None
        self.q_norm = layers.latent_norm(o.q_rank, o.latent_norm_eps) if o.q_rank else None
        self.q = layers.column(o.q_rank or hidden, queries)
        self.kv_down = layers.whole(hidden, o.kv_rank + o.rope_dim, bias=o.bias)
        self.kv_norm = layers.latent_norm(o.kv_rank, o.latent_norm_eps)
        self.kv = layers.column(o.kv_rank, (o.heads * o.nope_dim, o.heads * o.value_dim))
        self.gate = layers.column(hidden, (o.heads,)) if o.gate == "head" else None
        self.indexer = Indexer(hidden, o, layers) if o.select == "index" else None
        self.out = layers.output(o.heads * o.value_dim, hidden, bias=o.bias)

    def _query_latent(self, x: Tensor) -> Tensor:
        """What queries are projected from, [T / tensor, q_rank] or x itself."""
        return x if self.q_down is None or self.q_norm is None else cheap(self.q_norm, self.q_down(x))

    def _queries(self, latent: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """The parts without and with position, [T, H, nope_dim] and [T, H, rope_dim]."""
        plain, turning = self.q(latent)
        return cheap(self._place, plain, turning, seq)

    def _place(self, plain: Tensor, turning: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        plain, turning = plain.unflatten(-1, (self.heads, -1)), self._turn(turning.unflatten(-1, (self.heads, -1)), seq)
        if self.options.temperature:
            factor = query_temperature(seq.positions, self.options).to(plain.dtype)
            plain, turning = plain * factor, turning * factor
        return plain, turning

    def _turn(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, H, rope_dim]"""
        rope = self.options.rope
        if rope is None:
            return x
        cos, sin = shared_rotary_tables(seq, self.options.rope_dim, rope, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, cos, sin, rope.pairs)

    def _latents(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """This rank's latents [T / tensor, kv_rank], normed, and every token's key with position [T, 1, rope_dim]."""
        latent, key = self.kv_down(x).split((self.options.kv_rank, self.options.rope_dim), dim=-1)
        return cheap(self.kv_norm, latent), cheap(self._turn, self.gather(key).unsqueeze(1), seq)

    def _attend(self, x: Tensor, latent: Tensor, key: Tensor, seq: Sequence) -> tuple[Tensor, Tensor | None]:
        """[T, hidden], and the indexer's keys [T, Di] where there is one."""
        query = self._query_latent(x)
        plain, turning = self._queries(query, seq)
        width = self.options.kv_rank + self.options.rope_dim
        carried = Latent(width, lambda: torch.cat((self.gather(latent), key.squeeze(1)), dim=-1), self._weight, self._expand)
        if self.indexer is None:
            indices = None
            if self.options.select == "shared":
                indices = seq.tape.keep(lambda: seq.shared[SELECTION])  # a later layer's will stand there when this one is made again
            y, _ = self._over(None if selects_everything(indices, seq) else indices, plain, turning, latent, key, carried, seq)
            return self._output(y, x), None
        index = self.indexer(x, query, seq)
        indices, whole = self.indexer.select(index, seq)
        y, loss = self._over(indices, plain, turning, latent, key, carried, seq)
        return self._output(self.indexer.with_loss(y, lambda: loss(whole), seq), x), index[1]

    def _over(
        self, indices: Tensor | None, plain: Tensor, turning: Tensor, latent: Tensor, key: Tensor, carried: Latent, seq: Sequence
    ) -> tuple[Tensor, Callable[[Index], Tensor]]:
        """Attention over the selected keys, None: over all -> [T, H, value_dim] and the loss of an index that it gives the target.

        Over all, latents become keys and values of every head. Over few, it is the queries that the expansion of keys is multiplied into, and
        latents are read as they are: per query and key more products, but one row to gather instead of one for each head.
        """
        o = self.options
        if indices is None:
            q = torch.cat((plain, turning), dim=-1)
            k, v = self.kv(latent)
            k, v = self._keys_values(k, v, key.squeeze(1))

            def loss_over_all(index: Index) -> Tensor:
                with torch.no_grad():
                    seen = k if seq.exchange.whole else self._expand(seq.exchange.gather(carried.rows(), seq), self._weight)[0]
                return index_loss(q.detach(), seen.detach(), index, seq.counted_parts(), scale=self.scale, heads=o.heads)

            return seq.exchange.attention(q, k, v, seq, scale=self.scale, latent=carried), loss_over_all
        rows = seq.exchange.gather(carried.rows(), seq)
        q = self._absorbed(plain, turning)
        y, lse = latent_attention(q, rows, indices, width=o.kv_rank, scale=self.scale)

        def loss_over_few(index: Index) -> Tensor:
            n = None if seq.counted is None else seq.counted.here
            of_counted = index[0][:n], index[1], index[2][:n]
            return latent_index_loss(q.detach()[:n], rows.detach(), lse.detach()[:n], of_counted, indices[:n], scale=self.scale, heads=o.heads)

        return self._values(y), loss_over_few

    @property
    def _weight(self) -> Tensor:
        """What makes keys and values of latents, [H * (nope_dim + value_dim), kv_rank]."""
        weight = self.kv.weight
        assert isinstance(weight, Tensor)
        return weight

    def _absorbed(self, plain: Tensor, turning: Tensor) -> Tensor:
        """Queries for latents themselves, [T, H, kv_rank + rope_dim]."""
        keys = self._weight[: self.heads * self.options.nope_dim].unflatten(0, (self.heads, -1))
        return torch.cat((torch.einsum("nhd,hdr->nhr", plain, keys.to(plain.dtype)), turning), dim=-1)

    def _values(self, y: Tensor) -> Tensor:
        """Sums of latents [T, H, kv_rank] -> [T, H, value_dim]"""
        values = self._weight[self.heads * self.options.nope_dim :].unflatten(0, (self.heads, -1))
        return torch.einsum("nhr,hdr->nhd", y, values.to(y.dtype))

    def _keys_values(self, k: Tensor, v: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """k [n, H * nope_dim], v [n, H * value_dim] and the key with position [n, rope_dim] -> [n, H, nope_dim + rope_dim], [n, H, value_dim]"""
        shared = key.unsqueeze(1).expand(-1, self.heads, -1)
        return torch.cat((k.unflatten(-1, (self.heads, -1)), shared), dim=-1), v.unflatten(-1, (self.heads, -1))

    def _expand(self, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with keys [n, kv_rank + rope_dim], and the weight that makes keys and values of them."""
        latent, key = rows.split((self.options.kv_rank, self.options.rope_dim), dim=-1)
        widths = self.heads * self.options.nope_dim, self.heads * self.options.value_dim
        k, v = F.linear(latent, weight.to(latent.dtype)).split(widths, dim=-1)
        return self._keys_values(k, v, key)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """y [T, H, value_dim] -> [T, hidden]"""
        if self.gate is not None:
            (gate,) = self.gate(x)
            y = y * gate.sigmoid().unsqueeze(-1)
        return self.out(y.flatten(1))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._attend(x, *self._latents(x, seq), seq)[0]

    def _cached(self, latent: Tensor, key: Tensor, index_key: Tensor | None) -> tuple[Tensor, Tensor]:
        """As one K/V head: latent and key [T, 1, kv_rank + rope_dim], of which values are the first part; what has the values' place in the
        cache are the indexer's keys [T, 1, Di]."""
        together = torch.cat((self.gather(latent).unsqueeze(1), key), dim=-1)
        return together, together[..., :0] if index_key is None else index_key.unsqueeze(1)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, KVCache]:
        latent, key = self._latents(x, seq)
        y, index_key = self._attend(x, latent, key, seq)
        return y, KVCache.of(*self._cached(latent, key, index_key), seq)

    def decode(self, x: Tensor, state: KVCache, seq: Sequence) -> tuple[Tensor, KVCache]:
        """The cache is extended in place."""
        o, query = self.options, self._query_latent(x)
        index = None if self.indexer is None else self.indexer(x, query, seq)
        state.append(*self._cached(*self._latents(x, seq), None if index is None else index[1]), seq)
        q = self._absorbed(*self._queries(query, seq))
        cached, behind = state.k, state.behind(seq.positions)
        if o.select == "shared" or self.indexer is not None and o.index_loss != "dense":
            if self.indexer is not None and index is not None:
                self.indexer.choose(index, state, seq)
            if seq.shared[SELECTION] is not None:
                slots, chosen = seq.shared[SELECTION]
                cached = cached.gather(1, slots[..., None, None].expand(-1, -1, *cached.shape[2:]))
                behind = behind.gather(1, slots).masked_fill(~chosen, -1)
        elif self.indexer is not None:
            seq.shared[SELECTION] = None
        y = seq.exchange.decode_attention(q, cached, cached[..., : o.kv_rank], behind, scale=self.scale)
        return self._output(self._values(y), x), state

    def flops(self, tokens: int, context: int) -> float:
        """With a selection each token attends to top_k; its indexer still scores all."""
        o = self.options
        width, seen = o.nope_dim + o.rope_dim, (context + 1) / 2
        queries = (self.hidden * o.q_rank if o.q_rank else 0) + (o.q_rank or self.hidden) * o.heads * width
        latents = self.hidden * (o.kv_rank + o.rope_dim) + o.kv_rank * o.heads * (o.nope_dim + o.value_dim)
        output = self.hidden * o.heads * (o.value_dim + (o.gate == "head"))
        index = 0.0
        if o.select == "index":
            projections = (o.q_rank or self.hidden) * o.index_heads * o.index_dim + self.hidden * (o.index_dim + o.index_heads)
            index = 2 * projections + 2 * o.index_heads * (o.index_dim + 1) * seen
        attended = seen if o.select == "none" or o.index_loss == "dense" else min(seen, o.top_k)
        return tokens * (2 * (queries + latents + output) + index + 2 * o.heads * (width + o.value_dim) * attended)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        o = self.options
        return (o.kv_rank + o.rope_dim + (o.index_dim if o.select == "index" else 0)) * context * bytes_per_value

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """The ring carries latents, or where these are larger the keys and values; what is selected from is gathered, with the indexer's keys."""
        o = self.options
        latent = o.kv_rank + o.rope_dim
        ring = ExchangeNeed("ring", min(latent, o.heads * (o.nope_dim + o.rope_dim + o.value_dim)))
        if o.select == "none":
            return [ring]
        everything = context <= o.top_k or o.index_loss == "dense"
        index = [ExchangeNeed("gather", o.index_dim)] if o.select == "index" else []
        learns = o.select == "index" and o.index_loss != "none"  # from the keys that attention sees
        return [*index, *([ring] if everything else []), *([ExchangeNeed("gather", latent)] if learns or not everything else [])]


MIXER = MLA
