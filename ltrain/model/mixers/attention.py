"""Softmax attention with grouped K/V heads."""

from typing import Any

import torch
from torch import Tensor, nn

from ltrain.kernels.attention import Mask, Score
from ltrain.kernels.rope import rotate
from ltrain.kernels.sparse_attention.block_means import block_attention, decode_block_attention
from ltrain.model.layers import LocalLayers, ParamLayout, normal
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.mixers.kv_cache import KVCache, limit
from ltrain.model.options import AttentionOptions
from ltrain.model.position import alibi_slopes, query_temperature, rotary_width, shared_rotary_tables
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Sequence
from ltrain.schema import ConfigError


def _gated(y: Tensor, gate: Tensor) -> Tensor:
    """y [T, H, D], gate [T, H * D] or [T, H] -> [T, H * D]"""
    return (y * gate.sigmoid().unflatten(-1, (y.shape[1], -1))).flatten(1)


class Attention(Mixer):
    """Softmax attention inside documents (Vaswani et al. 2017; GQA: Ainslie et al. 2023).

    Queries and keys may pass a norm (Henry et al. 2020), then RoPE; the output of each head may be multiplied with a sigmoid of a
    projection of the input (Qiu et al. 2025). What a token sees, and what becomes of scores, are `Mask` and `Score`.
    """

    options: AttentionOptions
    entry: str | None = "qkv"

    def __init__(self, hidden: int, options: AttentionOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        if o.heads % o.kv_heads:
            raise ValueError(f"heads={o.heads} is not a multiple of kv_heads={o.kv_heads}: each K/V head serves the same number of query heads")
        self.heads, self.kv_heads = (layers.heads(o.heads, "heads"), layers.heads(o.kv_heads, "kv_heads"))
        self.value_dim = o.value_dim or o.head_dim
        self.rotary = rotary_width(o.head_dim, o.rope) if o.rope else 0
        self.scale = o.head_dim**-0.5 if o.scale is None else o.scale
        self.mask = Mask(o.window, o.chunk, o.anchors, o.causal, o.globals)
        self.slopes = layers.of_heads(alibi_slopes(o.heads)) if o.alibi else None
        table = ParamLayout((o.heads, o.relative_buckets), normal(layers.std), axis=0, decay=False)
        self.relative_bias = layers.parameter(table) if o.relative_buckets else None
        self.qkv = layers.column(hidden, self._parts, bias=o.qkv_bias)
        self.q_norm, self.k_norm = self._qk_norm(o.heads, layers), None if o.kv == "shared" else self._qk_norm(o.kv_heads, layers)
        self.sinks = layers.per_head(o.heads, normal(layers.std)) if o.sinks else None
        self.out = layers.output(o.heads * self.value_dim, hidden, bias=o.out_bias)

    @property
    def score(self) -> Score:
        o = self.options
        return Score(o.softcap, self.slopes, self.relative_bias, o.relative_distance, not o.causal)

    def _qk_norm(self, heads: int, layers: LocalLayers) -> nn.Module | None:
        o = self.options
        if o.qk_norm == "head":
            return layers.head_norm(o.head_dim)
        if o.qk_norm == "full":
            return layers.full_norm(heads * o.head_dim)
        return layers.weightless_norm() if o.qk_norm == "weightless" else None

    @property
    def _parts(self) -> tuple[int, ...]:
        """Widths of q, k, v and the gate, of the whole mixer."""
        o = self.options
        value = o.value_dim or o.head_dim
        gate = {"none": (), "elementwise": (o.heads * value,), "head": (o.heads,)}[o.gate]
        keys_values = () if o.kv == "shared" else (o.kv_heads * o.head_dim, o.kv_heads * value)
        return (o.heads * o.head_dim, *keys_values, *gate)

    def _project(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], and the gate's logits [T, H * Dv] or [T, H]."""
        if self.options.kv == "shared":
            q, gate_logits = self._queries(x, seq)
            # a later source's will stand there when this layer is made again
            return q, *seq.tape.keep(lambda: seq.shared[self._source]), gate_logits
        q, k, v, *gate = self.qkv(x)
        if self.options.qk_norm == "full":  # which may ask other ranks, and is thus not made again
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        q, k = self._placed(q, k, seq)
        v = v.unflatten(-1, (self.kv_heads, -1))
        v = v if self.options.value_scale == 1 else v * self.options.value_scale
        if self.options.kv == "source":
            seq.shared[self._source] = k, v
        return q, k, v, gate[0] if gate else None

    def _queries(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor | None]:
        """q [T, H, D] and the gate's logits, where keys and values are another layer's."""
        q, *gate = self.qkv(x)
        q = self.q_norm(q) if self.options.qk_norm == "full" else q  # type: ignore[misc]
        return cheap(self._placed_queries, q, seq), gate[0] if gate else None

    @property
    def _source(self) -> str:
        """In Sequence.shared: keys and values of the last source that sees the same tokens; in decoding its cache."""
        return f"kv {self.mask}"

    def _placed(self, q: Tensor, k: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        q, k = cheap(self._place, q, k, seq)
        return q, k

    def _place(self, q: Tensor, k: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """q [T, H * D] and k [T, Hk * D] -> q [T, H, D] and k [T, Hk, D], normed and rotated."""
        return self._placed_queries(q, seq), self._turn(k, self.kv_heads, self.k_norm, seq)

    def _placed_queries(self, q: Tensor, seq: Sequence) -> Tensor:
        q = self._turn(q, self.heads, self.q_norm, seq)
        return q * query_temperature(seq.positions, self.options).to(q.dtype) if self.options.temperature else q

    def _turn(self, x: Tensor, heads: int, norm: nn.Module | None, seq: Sequence) -> Tensor:
        """x [T, H * D] -> [T, H, D]"""
        o = self.options
        x = x.unflatten(-1, (heads, -1))
        inside = norm if o.qk_norm in ("head", "weightless") else None
        if inside is not None and not o.qk_norm_after_rope:
            x = inside(x)
        if o.rope:
            cos, sin = shared_rotary_tables(seq, self.rotary, o.rope, torch.promote_types(x.dtype, torch.float32))
            x = rotate(x, cos, sin, o.rope.pairs)
        return inside(x) if inside is not None and o.qk_norm_after_rope else x

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """y [T, H, Dv] -> [T, hidden]"""
        return self.out(y.flatten(1) if gate is None else cheap(_gated, y, gate))

    @property
    def _blocks(self) -> dict[str, Any]:
        return {"block": self.options.block_size, "top": self.options.top_blocks, "local": self.options.local_blocks}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        if self.options.block_size:
            if not seq.exchange.whole:
                widths, rows = (k.shape[-1], v.shape[-1]), torch.cat((k, v), dim=-1)
                k, v = seq.exchange.gather(rows.flatten(1), seq).unflatten(-1, rows.shape[1:]).split(widths, -1)
            parts = seq.exchange.parts(seq)
            return block_attention(q, k, v, parts, scale=self.scale, **self._blocks)
        return seq.exchange.attention(q, k, v, seq, scale=self.scale, mask=self.mask, score=self.score, sinks=self.sinks)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v, gate = self._project(x, seq)
        return self._output(self._attend(q, k, v, seq), gate)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, KVCache | None]:
        self._refuse_decoding()
        q, k, v, gate = self._project(x, seq)
        return self._output(self._attend(q, k, v, seq), gate), None if self.options.kv == "shared" else KVCache.of(k, v, seq, self.mask)

    def decode(self, x: Tensor, state: KVCache | None, seq: Sequence) -> tuple[Tensor, KVCache | None]:
        """The cache is extended in place; with kv: shared it is the source's, whose layer has extended it."""
        self._refuse_decoding()
        if state is None:
            q, gate = self._queries(x, seq)
            return self._output(self._decode(q, seq.shared[self._source], seq), gate), None
        q, k, v, gate = self._project(x, seq)
        state.append(k, v, seq)
        if self.options.kv == "source":
            seq.shared[self._source] = state
        return self._output(self._decode(q, state, seq), gate), state

    def _refuse_decoding(self) -> None:
        why = self.options.refuses().get("decode")
        if why:
            raise ConfigError(f"attention with causal=false does not decode, for {why}: use the model's forward, or write causal: true")

    def _decode(self, q: Tensor, state: KVCache, seq: Sequence) -> Tensor:
        if self.options.block_size:
            return decode_block_attention(q, state.k, state.v, state.lengths, scale=self.scale, **self._blocks)
        behind = state.behind(seq.positions)
        return seq.exchange.decode_attention(q, state.k, state.v, behind, scale=self.scale, score=self.score, sinks=self.sinks)

    def _seen(self, context: int) -> float:
        """Tokens that one of a document of `context` tokens sees, on average."""
        o = self.options
        if o.causal:
            return self._seen_before(context)
        first = min(o.globals, context)
        others = context - first  # which see as many after them as before them, themselves, and the first ones
        return (first * context + others * (first + 2 * self._seen_before(others) - 1)) / context

    def _seen_before(self, context: int) -> float:
        """Itself included."""
        o = self.options
        if o.chunk and o.chunk < context:
            return (o.chunk + 1) / 2
        if o.block_size and o.block_size * o.top_blocks < context:
            return o.block_size * (o.top_blocks - 0.5)
        if o.window and o.window < context:
            w = min(o.window + o.anchors, context)
            return w - w * (w - 1) / 2 / context
        return (context + 1) / 2

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        projections = 2 * self.hidden * (sum(self._parts) + o.heads * self.value_dim)
        return tokens * (projections + 2 * o.heads * (o.head_dim + self.value_dim) * self._seen(context))

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        if self.options.kv == "shared" or not self.options.causal:
            return 0
        kept = min(context, limit(self.mask) or context)
        return self.options.kv_heads * (self.options.head_dim + self.value_dim) * kept * bytes_per_value

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        width = self.options.kv_heads * (self.options.head_dim + self.value_dim)
        return [ExchangeNeed("gather", width) if self.options.block_size else ExchangeNeed("ring", width, self.mask)]


def MIXER(hidden: int, options: AttentionOptions, layers: LocalLayers) -> Attention:
    from ltrain.model.mixers.block_index import BlockIndexAttention
    from ltrain.model.mixers.differential import DifferentialAttention

    if options.block_score == "index":
        return BlockIndexAttention(hidden, options, layers)
    return (DifferentialAttention if options.differential else Attention)(hidden, options, layers)
