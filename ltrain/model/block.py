"""One layer of the model: a mixer and a feed-forward, each behind a norm and beside the residual stream."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltrain.config import LayerSpec
from ltrain.model.ffn import build_ffn
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import build_mixer
from ltrain.model.sequence import Sequence


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)). With `recompute` the activations inside are made again in the backward,
    but routing and exchanges are not: they are replayed from a tape of this call."""

    def __init__(self, hidden: int, spec: LayerSpec, layers: LocalLayers, recompute: bool = False):
        super().__init__()
        self.spec, self.recompute = spec, recompute
        self.mixer_norm = layers.norm(hidden)
        self.mixer = build_mixer(spec.mixer, hidden, spec.options, layers)
        self.ffn_norm = layers.norm(hidden)
        self.ffn = build_ffn(hidden, spec.ffn, layers)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._layer(x, seq)
        # Micro-batches and blocks interleave in a pipeline, so that each call needs its own tape.
        seq = seq.with_tape()
        return checkpoint(self._layer, x, seq, use_reentrant=False, preserve_rng_state=False, context_fn=seq.tape.contexts)

    def _layer(self, x: Tensor, seq: Sequence) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), seq)
        return x + self.ffn(self.ffn_norm(x), seq)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Any]:
        """As forward, and the mixer's state after each document."""
        y, state = self.mixer.prefill(self.mixer_norm(x), seq)
        x = x + y
        return x + self.ffn(self.ffn_norm(x), seq), state

    def decode(self, x: Tensor, state: Any, seq: Sequence) -> tuple[Tensor, Any]:
        """One token per document: x [N, hidden]."""
        y, state = self.mixer.decode(self.mixer_norm(x), state, seq)
        x = x + y
        return x + self.ffn(self.ffn_norm(x), seq), state
