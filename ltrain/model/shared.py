"""Blocks whose weights several layers share, and what each of these layers has of its own (Zamba2, Glorioso et al. 2024)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.config import LayerSpec
from ltrain.model.ffn import build_ffn
from ltrain.model.layers import LocalLayers, joined, layout_of
from ltrain.model.mixers.base import Mixer, build_mixer
from ltrain.model.options import SharedOptions
from ltrain.model.sequence import Sequence

EMBEDDINGS = "embeddings"  # in Sequence.shared: what the model's first layer reads [T, hidden]


class SharedBlock(nn.Module):
    """ffn(norm(attention(norm([x; e])))), without residuals: x the hidden states and e the embeddings, [T, hidden] each."""

    def __init__(self, hidden: int, spec: LayerSpec, layers: LocalLayers):
        super().__init__()
        self.hidden = hidden
        self.mixer_norm = layers.norm(2 * hidden)
        self.mixer: Mixer = build_mixer(spec.mixer, hidden, spec.options, layers)
        assert self.mixer.entry is not None, "validation lets only attention pass"
        narrow = getattr(self.mixer, self.mixer.entry)
        self.mixer_parts = layout_of(narrow.weight).splits
        setattr(self.mixer, self.mixer.entry, layers.column(2 * hidden, self.mixer_parts, bias=narrow.bias is not None))
        self.ffn_norm = layers.norm(hidden)
        self.ffn = build_ffn(hidden, spec.ffn, layers)
        assert self.ffn.entry is not None, "validation lets only a dense feed-forward pass"
        self.ffn_parts = layout_of(getattr(self.ffn, self.ffn.entry).weight).splits
        self._adapters: tuple[nn.Module | None, nn.Module | None] = (None, None)  # of the layer that is being computed
        for i, part in enumerate((self.mixer, self.ffn)):
            getattr(part, part.entry).register_forward_hook(self._adapt(i))  # type: ignore[arg-type]

    def _adapt(self, which: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            adapter = self._adapters[which]
            return parts if adapter is None else tuple(a + b for a, b in zip(parts, adapter(inputs[0]), strict=True))

        return hook

    @contextmanager
    def adapted(self, mixer: nn.Module | None, ffn: nn.Module | None) -> Iterator[None]:
        """Inside, the two entries also add what these adapters give."""
        self._adapters = (mixer, ffn)
        try:
            yield
        finally:
            self._adapters = (None, None)

    def forward(self, x: Tensor, seq: Sequence, mix: Callable[[Mixer, Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """x [T, hidden] -> [T, hidden], and the state that `mix` gives: of the mixer and its input, its output and state."""
        y, state = mix(self.mixer, self.mixer_norm(torch.cat((x, seq.shared[EMBEDDINGS]), dim=-1)))
        return self.ffn(self.ffn_norm(y), seq), state

    def flops(self, tokens: int, context: int) -> float:
        """Forward floating-point operations for `tokens` tokens in documents of `context` tokens."""
        wider = 2 * tokens * self.hidden * sum(self.mixer_parts)  # than the mixer knows
        return self.mixer.flops(tokens, context) + wider + self.ffn.flops(tokens)


class Adapter(nn.Module):
    """W_up W_down x of low rank, beside a projection of these parts (Hu et al. 2021): with `apart` of this rank for each of them, else joined."""

    def __init__(self, width: int, parts: tuple[int, ...], rank: int, apart: bool, layers: LocalLayers):
        super().__init__()
        self.flops_per_token = 2 * rank * (sum(parts) + width * (len(parts) if apart else 1))
        self.rank = rank
        self.down = layers.whole(width, rank * len(parts) if apart else rank)
        self.up = nn.ModuleList([layers.column(rank, (part,)) for part in parts] if apart else [joined(layers.column(rank, parts), len(parts))])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, width] -> one tensor [T, part / ranks] per part"""
        low = self.down(x).split(self.rank, dim=-1)
        return tuple(part for up, z in zip(self.up, low, strict=True) for part in up(z))


class SharedUse(nn.Module):
    """What one layer makes of a shared block: with its own adapters inside, and its own projection after it."""

    def __init__(self, hidden: int, block: SharedBlock, options: SharedOptions, layers: LocalLayers):
        super().__init__()
        self._block = [block]  # a list, for its parameters are not this layer's
        rank = options.adapter_rank
        self.mixer_adapter = Adapter(2 * hidden, block.mixer_parts, rank, True, layers) if options.adapt_mixer else None
        self.ffn_adapter = Adapter(hidden, block.ffn_parts, rank, False, layers) if rank else None
        self.projection = layers.whole(hidden, hidden)

    def forward(self, x: Tensor, seq: Sequence, mix: Callable[[Mixer, Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """As the block's: what the layer's mixer reads beside x [T, hidden], and the state."""
        (block,) = self._block
        with block.adapted(self.mixer_adapter, self.ffn_adapter):
            y, state = block(x, seq, mix)
        return self.projection(y), state

    def flops(self, tokens: int, context: int) -> float:
        adapters = sum(a.flops_per_token for a in (self.mixer_adapter, self.ffn_adapter) if a is not None)
        (block,) = self._block
        return block.flops(tokens, context) + tokens * (adapters + 2 * block.hidden**2)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Each layer has keys and values of its own."""
        return self._block[0].mixer.state_bytes(context, bytes_per_value)
