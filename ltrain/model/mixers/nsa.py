"""Native sparse attention."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import attention
from ltrain.kernels.attention import Mask
from ltrain.kernels.rope import rotate
from ltrain.kernels.sparse_attention.decoding import seen_blocks
from ltrain.kernels.sparse_attention.native import Shape, decode_importance, native_attention
from ltrain.model.layers import LocalLayers, ParamLayout, normal
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.mixers.nsa_cache import NSACache
from ltrain.model.options import NSAOptions
from ltrain.model.position import rotary_width, shared_rotary_tables
from ltrain.model.sequence import Sequence


class Compression(nn.Module):
    """phi: a block of keys or values -> one, by an MLP that knows each token's place in the block (equation 7). The same for all heads."""

    def __init__(self, width: int, options: NSAOptions, layers: LocalLayers):
        super().__init__()
        self.length, self.stride = options.compressed, options.stride

        def whole(*shape: int, std: float) -> nn.Parameter:
            return layers.parameter(ParamLayout(shape, normal(std), partial_gradient=True))

        self.place = whole(options.compressed, width, std=layers.std)
        self.up = whole(width, options.compressed * width, std=1 / math.sqrt(options.compressed * width))
        self.down = whole(width, width, std=1 / math.sqrt(width))

    def blocks(self, x: Tensor) -> Tensor:
        """x [t, Hk, D] of one document -> its blocks [blocks, Hk, D, l]"""
        return x.unfold(0, self.length, self.stride) if len(x) >= self.length else x.new_zeros(0, *x.shape[1:], self.length)

    def forward(self, blocks: Tensor) -> Tensor:
        """[blocks, Hk, D, l] -> [blocks, Hk, D]"""
        placed = blocks.transpose(-1, -2) + self.place  # [blocks, Hk, l, D]
        return F.linear(F.gelu(F.linear(placed.flatten(-2), self.up)), self.down)


class NSA(Mixer):
    """o = sum of sigmoid(gate) times attention over compressed blocks, selected blocks and a window (Yuan et al. 2025, equation 5).

    Each branch has keys and values of its own; the gates are numbers of each head that the input gives.
    """

    options: NSAOptions
    entry = "qkv"

    def __init__(self, hidden: int, options: NSAOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.heads, self.kv_heads = layers.heads(o.heads, "heads"), layers.heads(o.kv_heads, "kv_heads")
        self.rotary = rotary_width(o.head_dim, o.rope) if o.rope else 0
        self.scale = o.head_dim**-0.5
        self.shape = Shape(o.compressed, o.stride, o.block_size, o.top_blocks)
        self.mask = Mask(window=o.window)
        self.qkv = layers.column(hidden, self._parts)
        self.compress_k, self.compress_v = Compression(o.head_dim, o, layers), Compression(o.head_dim, o, layers)
        self.out = layers.output(o.heads * o.head_dim, hidden)

    @property
    def _parts(self) -> tuple[int, ...]:
        """Widths of the queries, of keys and values compressed, selected and of the window, and of the three gates."""
        o = self.options
        return (o.heads * o.head_dim, *(o.kv_heads * o.head_dim,) * 6, *(o.heads,) * 3)

    def _turn(self, x: Tensor, seq: Sequence) -> Tensor:
        rope = self.options.rope
        if rope is None:
            return x
        cos, sin = shared_rotary_tables(seq, self.rotary, rope, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, cos, sin, rope.pairs)

    def _project(self, x: Tensor, seq: Sequence) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Queries [T, H, D]; k, v to be compressed, selected and of the window, [T, Hk, D] each; and the gates [T, H]."""
        q, *rest = self.qkv(x)
        kv = [part.unflatten(-1, (self.kv_heads, -1)) for part in rest[:6]]
        kv[2], kv[4] = self._turn(kv[2], seq), self._turn(kv[4], seq)
        return q.unflatten(-1, (self.heads, -1)), kv, rest[6:]

    def _output(self, branches: tuple[Tensor, Tensor, Tensor], gates: list[Tensor]) -> Tensor:
        return self.out(sum(y * gate.sigmoid().unsqueeze(-1) for y, gate in zip(branches, gates, strict=True)).flatten(1))  # type: ignore[union-attr]

    def _compressed(self, k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """The compressed blocks that end among these tokens, [n, Hk, D] each."""
        reach, together = self.shape.length - 1, torch.cat((k, v), 1)
        rows, before = seq.exchange.halo(together.flatten(1), seq, reach)
        together = rows.view_as(together)
        # nothing of the rows too: a rank on which no block ends has a part in the backward of the exchange, in which gradients of its rows arrive
        blocks = [together[:0].unsqueeze(-1).expand(-1, -1, -1, self.shape.length)]
        for n, part in enumerate(seq.exchange.parts(seq)):
            x, place = together[part.start : part.stop], part.first - part.begin
            if place and before is not None:
                x, place = torch.cat((before[n].unflatten(-1, x.shape[1:]), x)), place - reach
            first = self.shape.compressed(part.first - part.begin) * self.shape.stride - place
            blocks.append(self.compress_k.blocks(x[first:]))
        return self._compress(torch.cat(blocks))  # once, however many documents there are

    def _compress(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values beside each other, [m, 2 Hk, D, l] -> [m, Hk, D] each"""
        kb, vb = blocks.chunk(2, dim=1)
        return self.compress_k(kb), self.compress_v(vb)

    def _gathered(self, k: Tensor, v: Tensor, seq: Sequence, units: Callable[[int], int] = int) -> tuple[Tensor, Tensor]:
        """k and v [n, Hk, D] of tokens, or of blocks -> those of this rank's documents up to its last part of each"""
        if seq.exchange.whole:
            return k, v
        k, v = seq.exchange.gather(torch.cat((k, v), 1).flatten(1), seq, units).unflatten(-1, (2 * self.kv_heads, -1)).chunk(2, dim=1)
        return k, v

    def _mix(self, q: Tensor, kv: list[Tensor], gates: list[Tensor], kc: Tensor, vc: Tensor, seq: Sequence) -> Tensor:
        """kc, vc: gathered compressed blocks"""
        turned, parts = self._turn(q, seq), seq.exchange.parts(seq)
        compressed, selected = native_attention(q, turned, kc, vc, *self._gathered(kv[2], kv[3], seq), parts, scale=self.scale, shape=self.shape)
        window = seq.exchange.attention(turned, kv[4], kv[5], seq, scale=self.scale, mask=self.mask)
        return self._output((compressed, selected, window), gates)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, kv, gates = self._project(x, seq)
        return self._mix(q, kv, gates, *self._gathered(*self._compressed(kv[0], kv[1], seq), seq, self.shape.compressed), seq)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, NSACache]:
        q, kv, gates = self._project(x, seq)
        own = self._compressed(kv[0], kv[1], seq)
        kc, vc = self._gathered(*own, seq, self.shape.compressed)
        caches = KVCache.of(kv[2], kv[3], seq), KVCache.of(kv[4], kv[5], seq, self.mask)
        state = NSACache.of(*caches, torch.cat(kv[:2], 1), own, kc, seq, self.shape, self._compress)
        return self._mix(q, kv, gates, kc, vc, seq), state

    def decode(self, x: Tensor, state: NSACache, seq: Sequence) -> tuple[Tensor, NSACache]:
        """The caches are extended in place."""
        q, kv, gates = self._project(x, seq)
        turned = self._turn(q, seq)
        state.append(kv, seq, self.shape, self._compress)
        blocks, tokens = state.blocks, state.tokens
        compressed, lse = seq.exchange.merged(*attention.decode_attention(q, blocks.k, blocks.v, blocks.behind(seq.positions), scale=self.scale))
        numbers = tokens.positions // self.shape.block
        seen = seen_blocks(self._choice(q, lse, state, seq), numbers, seq.positions // self.shape.block, 2) | (numbers == 0).unsqueeze(1)
        selected = seq.exchange.decode_attention(turned, tokens.k, tokens.v, tokens.behind(seq.positions), scale=self.scale, seen=seen)
        window = seq.exchange.decode_attention(turned, state.window.k, state.window.v, state.window.behind(seq.positions), scale=self.scale)
        return self._output((compressed.to(q.dtype), selected, window), gates), state

    def _choice(self, q: Tensor, lse: Tensor, state: NSACache, seq: Sequence) -> Tensor:
        """q [N, H, D] and lse [N, H] over compressed blocks -> the selected blocks [N, Hk, top - 3] beside the first and the two nearest"""
        k = torch.cat((state.blocks.k, state.copies.k), 1)
        numbers = torch.cat((state.blocks.positions, state.copies.positions), 1)
        count = -(-(state.tokens.prompt + state.tokens.decoded) // self.shape.block)
        groups = (t.unflatten(1, (self.kv_heads, -1)) for t in (q, lse))
        queries, of_all = groups
        scores = (queries @ k.permute(0, 2, 3, 1)).to(lse.dtype) * self.scale  # [N, Hk, G, B]
        importance = decode_importance(scores, of_all, numbers, count, self.shape)
        every = torch.arange(count, device=q.device)
        others = (every > 0) & (every < (seq.positions // self.shape.block - 1).unsqueeze(1))
        return seq.exchange.best(importance.masked_fill(~others.unsqueeze(1), -torch.inf), every.expand(importance.shape), self.shape.top - 3)

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        projections = self.hidden * (sum(self._parts) + o.heads * o.head_dim)
        compression = 2 * o.kv_heads * (o.compressed + 1) * o.head_dim**2 / o.stride
        seen = self.shape.compressed(context) / 2 + min(context / 2, o.block_size * o.top_blocks) + min(context / 2, o.window)
        return tokens * (2 * (projections + compression) + 4 * o.heads * o.head_dim * seen)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        o = self.options
        rows = context + self.shape.compressed(context) + self.shape.length - 1 + min(context, o.window)
        return 2 * o.kv_heads * o.head_dim * rows * bytes_per_value

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """The tokens before a cut that blocks across it are made of, compressed blocks, what may be selected, and the window's rows."""
        width = 2 * self.options.kv_heads * self.options.head_dim
        made = ExchangeNeed("halo", width, reach=self.shape.length - 1)
        chosen = ExchangeNeed("gather", width, units=self.shape.compressed), ExchangeNeed("gather", width)
        return [made, *chosen, ExchangeNeed("ring", width, self.mask)]


MIXER = NSA
