"""One layer of the model: a mixer, a feed-forward or both, with their norms, beside the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.config import LayerSpec
from ltrain.model.ffn import MLP, MoE, build_ffn
from ltrain.model.layers import LocalLayers, ParamLayout, constant
from ltrain.model.mixers.base import Mixer, build_mixer
from ltrain.model.options import NO_MIXER, StreamOptions
from ltrain.model.recompute import cheap, selective
from ltrain.model.sequence import Sequence
from ltrain.model.shared import SharedUse
from ltrain.model.streams import Connection, join

_NORM_BEFORE = ("pre", "sandwich", "parallel_norms", "normed_residual")
_NORM_AFTER = ("post", "sandwich")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)), or another form that `BlockOptions` describes.

    Norms: mixer_norm and ffn_norm before, mixer_post_norm and ffn_post_norm after, or `norm`, the one of the parallel form.
    shared: adds to what the mixer's norm reads.
    recompute: none; full: the activations inside are made again in the backward, but routing and exchanges are not: they are replayed from
    a tape of this call; selective: what the parts call `cheap` is made again.
    """

    def __init__(
        self,
        hidden: int,
        spec: LayerSpec,
        layers: LocalLayers,
        recompute: str = "none",
        streams: StreamOptions | None = None,
        shared: SharedUse | None = None,
    ):
        super().__init__()
        self.shared = shared
        self.spec, self.recompute = spec, recompute
        form, mixes, feeds = spec.block.form, spec.mixer != NO_MIXER, not spec.ffn.absent

        def norm(there: bool) -> nn.Module | None:
            return layers.norm(hidden) if there else None

        self.norm = norm(form == "parallel")
        self.mixer_norm = norm(mixes and form in _NORM_BEFORE)
        self.mixer: Mixer | None = build_mixer(spec.mixer, hidden, spec.options, layers) if mixes else None
        self.mixer_post_norm = norm(mixes and form in _NORM_AFTER)
        self.ffn_norm = norm(feeds and form in _NORM_BEFORE)
        self.ffn: MLP | MoE | None = build_ffn(hidden, spec.ffn, layers) if feeds else None
        self.ffn_post_norm = norm(feeds and form in _NORM_AFTER)
        self.mixer_gate, self.ffn_gate = (
            layers.parameter(ParamLayout((1,), constant(0.0), partial_gradient=True, decay=False)) if spec.block.gated and there else None
            for there in (mixes, feeds)
        )
        several = streams if streams is not None and streams.count > 1 else None
        self.mixer_streams = Connection(hidden, several, layers) if several and mixes else None
        self.ffn_streams = Connection(hidden, several, layers) if several and feeds else None
        fusible = form != "normed_residual"  # which needs what the norm gives beside what is made of it
        self._mixer_norms = fusible and _fuse(self.mixer_norm, self.mixer, layers)
        self._ffn_norms = fusible and _fuse(self.ffn_norm, self.ffn, layers)
        self._checkpointed = layers.checkpointed

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden], streams x hidden where there are several -> the same"""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x, seq)
        if self.recompute == "selective":
            with selective():
                return self._forward(x, seq)
        # Micro-batches and blocks interleave in a pipeline, so that each call needs its own tape.
        seq = seq.with_tape()
        return self._checkpointed(self._forward, x, seq, contexts=seq.tape.contexts)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Any]:
        """As forward, and the mixer's state after each document, a pair with the shared block's where there is one; None without a mixer."""
        return self._layer(x, seq, lambda mixer, x, _: mixer.prefill(x, seq))

    def decode(self, x: Tensor, state: Any, seq: Sequence) -> tuple[Tensor, Any]:
        """One token per document: x [N, hidden]."""
        return self._layer(x, seq, lambda mixer, x, state: mixer.decode(x, state, seq), state)

    def _forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._layer(x, seq, lambda mixer, x, _: (mixer(x, seq), None))[0]

    def _layer(self, x: Tensor, seq: Sequence, mix: Callable[[Mixer, Tensor, Any], tuple[Tensor, Any]], state: Any = None) -> tuple[Tensor, Any]:
        """mix: a mixer, its input and its state before -> its output and state after. state: before, for decoding."""
        if self.shared is not None:
            return self._behind_shared(x, seq, mix, *(state or (None, None)))
        return self._own(x, None, seq, mix, state)

    def _behind_shared(
        self, x: Tensor, seq: Sequence, mix: Callable[[Mixer, Tensor, Any], tuple[Tensor, Any]], shared_state: Any, state: Any
    ) -> tuple[Tensor, Any]:
        assert self.shared is not None
        more, shared_state = self.shared(x, seq, lambda mixer, x: mix(mixer, x, shared_state))
        x, state = self._own(x, more, seq, mix, state)
        return x, (shared_state, state)

    def _own(
        self, x: Tensor, more: Tensor | None, seq: Sequence, mix: Callable[[Mixer, Tensor, Any], tuple[Tensor, Any]], state: Any
    ) -> tuple[Tensor, Any]:
        """more: what the mixer's norm reads beside x."""
        o, entered = self.spec.block, x
        if self.norm is not None:
            assert self.mixer is not None and self.ffn is not None
            normed = cheap(self.norm, x)
            y, state = mix(self.mixer, normed, state)
            x = _add(x, o.mixer_residual_scale, _gated(y, self.mixer_gate), o.mixer_scale)
            return _add(x, 1.0, _gated(self.ffn(normed, seq), self.ffn_gate), o.ffn_scale), state
        if self.mixer is not None:
            read, *ways = (x if more is None else x + more,) if self.mixer_streams is None else cheap(self.mixer_streams, x)
            normed = read if self.mixer_norm is None or self._mixer_norms else cheap(self.mixer_norm, read)
            y, state = mix(self.mixer, normed, state)
            y = y if self.mixer_post_norm is None else cheap(self.mixer_post_norm, y)
            x = _add(normed if o.form == "normed_residual" else x, o.mixer_residual_scale, _gated(y, self.mixer_gate), o.mixer_scale, *ways)
        if self.ffn is not None:
            read, *ways = (entered if o.side_by_side else x,) if self.ffn_streams is None else cheap(self.ffn_streams, x)
            normed = read if self.ffn_norm is None or self._ffn_norms else cheap(self.ffn_norm, read)
            y = self.ffn(normed, seq)
            y = y if self.ffn_post_norm is None else cheap(self.ffn_post_norm, y)
            x = _add(normed if o.form == "normed_residual" else x, o.ffn_residual_scale, _gated(y, self.ffn_gate), o.ffn_scale, *ways)
        return x, state

    def flops(self, tokens: int, context: int) -> dict[str, float]:
        """By part: forward floating-point operations for `tokens` tokens in documents of `context` tokens."""
        parts = {} if self.mixer is None else {self.spec.kind: self.mixer.flops(tokens, context)}
        if self.shared is not None:
            parts["shared"] = self.shared.flops(tokens, context)
        if self.ffn is not None:
            parts["ffn"] = self.ffn.flops(tokens)
        for connection in (self.mixer_streams, self.ffn_streams):
            if connection is not None:
                parts["streams"] = parts.get("streams", 0.0) + connection.flops(tokens)
        return parts

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """K/V caches and recurrent state of one document of `context` tokens."""
        return sum(part.state_bytes(context, bytes_per_value) for part in (self.mixer, self.shared) if part is not None)


def _gated(y: Tensor, gate: Tensor | None) -> Tensor:
    return y if gate is None else y * gate.tanh()


def _add(residual: Tensor, residual_scale: float, y: Tensor, scale: float, *ways: Tensor) -> Tensor:
    """ways: of a `Connection`, where there are several residual streams."""
    y = y if scale == 1 else y * scale
    return join(residual, y, *ways) if ways else (residual if residual_scale == 1 else residual * residual_scale) + y


def _fuse(norm: nn.Module | None, after: Mixer | MLP | MoE | None, layers: LocalLayers) -> bool:
    """Whether `after` now applies the norm before it, in its entry layer; the parameters keep their names."""
    if norm is None or after is None or not after.entry:
        return False
    linear = layers.fused(norm, getattr(after, after.entry))
    if linear is None:
        return False
    setattr(after, after.entry, linear)
    return True
