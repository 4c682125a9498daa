"""The model: embedding, blocks, final norm and head, or the pipeline stage of it that one rank holds."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ltrain.config import resolve_layers
from ltrain.model.block import Block
from ltrain.model.ffn import MoE
from ltrain.model.layers import Embedding, Head, LocalLayers, layout_of
from ltrain.model.options import ModelConfig
from ltrain.model.router import Router
from ltrain.model.sequence import LocalExchange, Sequence


class Parameters(NamedTuple):
    """Counts over all ranks."""

    total: int
    active: int  # what one token reaches: top_k of the routed experts


class Stack(nn.Module):
    """Layers start..stop of `model`, named by their index in the whole model; all of them by default.

    The first stage also embeds; the last also norms and has the head. With tied embeddings and several stages the last stage
    holds a second copy of the embedding under the same name, `embed.weight`: whoever trains it sums the two gradients.

    Errors: ValueError where the options do not fit each other or the ranks of `layers`, ConfigError for an unknown mixer.
    """

    def __init__(self, model: ModelConfig, vocab: int, layers: LocalLayers, start: int = 0, stop: int | None = None, recompute: str = "none"):
        super().__init__()
        stop = model.depth if stop is None else stop
        if not 0 <= start <= stop <= model.depth:
            raise ValueError(f"layers {start}..{stop} are not in a model of depth {model.depth}: choose 0 <= start <= stop <= depth")
        if recompute not in ("none", "full"):
            raise ValueError(f"train.recompute={recompute!r} is not known: write none or full")
        self.model, self.vocab = model, vocab
        self.first, self.last = start == 0, stop == model.depth
        tied = self.last and model.tie_embeddings
        self.embed: Embedding | None = layers.embedding(vocab, model.hidden) if self.first or tied else None
        specs = resolve_layers(model)
        self.layers = nn.ModuleDict({str(i): Block(model.hidden, specs[i], layers, recompute == "full") for i in range(start, stop)})
        self.norm = layers.norm(model.hidden) if self.last else None
        self.head: Head | None = None
        if self.last:
            self.head = layers.head(vocab, model.hidden, self.embed.weight if tied and self.embed is not None else None)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """The blocks with the index of each in the whole model."""
        for name, block in self.layers.items():
            yield name, cast(Block, block)

    def routers(self) -> dict[str, Router]:
        """The routers by global name: whoever trains the model moves their biases."""
        return {f"layers.{name}.ffn.router": block.ffn.router for name, block in self.blocks() if isinstance(block.ffn, MoE)}

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """Tokens [T] on the first stage, hidden states [T, hidden] on another -> hidden states, normed on the last stage."""
        x = self._enter(x)
        for _, block in self.blocks():
            x = block(x, seq)
        return x if self.norm is None else self.norm(x)

    def _enter(self, x: Tensor) -> Tensor:
        return self.embed(x) if self.first and self.embed is not None else x

    def loss(self, hidden: Tensor, labels: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Last stage: hidden [T, hidden], labels [T] (-100: none) -> sums over this rank's labelled tokens of the cross entropy in
        nats and of the squared logsumexp (z-loss, Chowdhery et al. 2022), and how many tokens those are (int64)."""
        assert self.head is not None, "only the last stage has a head"
        loss, lse = self.head.loss(hidden, labels)
        return loss.sum(), lse.square().sum(), (labels >= 0).sum()

    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage: normed hidden states [T, hidden] -> [T, vocab]"""
        assert self.head is not None, "only the last stage has a head"
        return self.head.logits(hidden)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, seq: Sequence, all_logits: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """Whole documents of at least one token each: tokens [T] -> logits after the last token of each document [N, vocab]
        (after every token [T, vocab] with all_logits), and the state by layer that `decode` continues from."""
        self._check_whole(seq)
        x, state = self._enter(tokens), {}
        for name, block in self.blocks():
            x, state[name] = block.prefill(x, seq)
        if not all_logits:
            x = x[(seq.cu_seqlens[1:] - 1).to(x.device, torch.int64)]  # [T, hidden] -> [N, hidden]
        return self._finish(x), state

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: dict[str, Any], seq: Sequence) -> tuple[Tensor, dict[str, Any]]:
        """One more token of each document: tokens [N], seq of `Sequence.step` -> logits [N, vocab] and the state after it.
        The state given must not be used again."""
        self._check_whole(seq)
        x, after = self._enter(tokens), {}
        for name, block in self.blocks():
            x, after[name] = block.decode(x, state[name], seq)
        return self._finish(x), after

    def _finish(self, x: Tensor) -> Tensor:
        assert self.norm is not None, "only the last stage has a final norm"
        return self.logits(self.norm(x))

    def _check_whole(self, seq: Sequence) -> None:
        if not (self.first and self.last and isinstance(seq.exchange, LocalExchange)):
            raise ValueError(
                "decoding needs the whole model and stream on one rank: generate from a checkpoint, without parallel.pipeline or parallel.context"
            )

    def flops(self, tokens: int, context: int) -> dict[str, float]:
        """Floating-point operations by part of a forward of `tokens` tokens in documents of `context` tokens; a training step takes
        three times as many."""
        parts: dict[str, float] = {}
        for _, block in self.blocks():
            parts[block.spec.kind] = parts.get(block.spec.kind, 0.0) + block.mixer.flops(tokens, context)
            parts["ffn"] = parts.get("ffn", 0.0) + block.ffn.flops(tokens)
        if self.last:
            parts["head"] = 2.0 * tokens * self.model.hidden * self.vocab
        return parts

    def num_params(self) -> Parameters:
        """Parameters of this stage over all ranks; a tied embedding counts once."""
        total = active = 0
        top_k = {f"layers.{name}.ffn.experts.": block.ffn.options.top_k for name, block in self.blocks() if isinstance(block.ffn, MoE)}
        for name, param in self.named_parameters():
            layout = layout_of(param)
            size = torch.Size(layout.shape).numel()
            chosen = next((k for prefix, k in top_k.items() if name.startswith(prefix)), 0)
            total += size * max(layout.experts, 1)
            active += size * (chosen if layout.experts else 1)
        return Parameters(total, active)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """K/V caches and recurrent states of one document of `context` tokens."""
        return sum(block.mixer.state_bytes(context, bytes_per_value) for _, block in self.blocks())
