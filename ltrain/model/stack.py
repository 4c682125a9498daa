"""The model: embedding, blocks, final norm and head, or the pipeline stage of it that one rank holds."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.config import further_layer, resolve_layers, shared_layer
from ltrain.kernels.cross_entropy import Losses
from ltrain.model.block import Block
from ltrain.model.ffn import MoE
from ltrain.model.layers import Embedding, Head, LocalLayers, layout_of
from ltrain.model.mixers.base import Mixer
from ltrain.model.mtp import Ahead, MTPHead
from ltrain.model.options import ModelConfig
from ltrain.model.router import Router
from ltrain.model.sequence import Memory, Sequence
from ltrain.model.shared import EMBEDDINGS, SharedBlock, SharedUse
from ltrain.model.streams import Gathered, spread


class Parameters(NamedTuple):
    """Counts over all ranks."""

    total: int
    active: int  # what one token reaches: top_k of the routed experts


class Stack(nn.Module):
    """Layers start..stop of `model`, named by their index in the whole model; all of them by default.

    The first stage also embeds; the last also norms and has the head, and those that predict further ahead. With tied embeddings, or
    such heads, and several stages the last stage holds a second copy of the embedding under the same name, `embed.weight`: whoever trains
    it sums the two gradients.

    Errors: ValueError where the options do not fit each other or the ranks of `layers`, ConfigError for an unknown mixer.
    """

    def __init__(self, model: ModelConfig, vocab: int, layers: LocalLayers, start: int = 0, stop: int | None = None, recompute: str = "none"):
        super().__init__()
        stop = model.depth if stop is None else stop
        if not 0 <= start <= stop <= model.depth:
            raise ValueError(f"layers {start}..{stop} are not in a model of depth {model.depth}: choose 0 <= start <= stop <= depth")
        if recompute not in ("none", "selective", "full"):
            raise ValueError(f"train.recompute={recompute!r} is not known: write none, selective or full")
        assert layers.norm_kind == model.norm, "layers were made for another kind of norm"
        self.model, self.vocab = model, vocab
        self.first, self.last = start == 0, stop == model.depth
        embeds = self.first or self.last and model.embeds_last
        self.embed: Embedding | None = layers.embedding(vocab, model.hidden) if embeds else None
        self.positions = layers.positions(model.learned_positions, model.hidden) if self.first and model.learned_positions else None
        self._mine = layers.mine
        self.embed_norm = layers.norm(model.hidden) if self.first and model.embed_norm else None
        specs = resolve_layers(model)
        uses = [i for i in range(model.depth) if specs[i].block.shared]  # of the shared blocks, in turn
        assert not uses or self.first and stop == model.depth, "shared blocks are on no stage alone"
        self.shared = nn.ModuleDict(
            {str(n): SharedBlock(model.hidden, shared_layer(model), layers.at(uses[n])) for n in range(model.shared.blocks if uses else 0)}
        )

        def block(i: int) -> Block:
            shared = None
            if i in uses:
                of = cast(SharedBlock, self.shared[str(uses.index(i) % model.shared.blocks)])
                shared = SharedUse(model.hidden, of, model.shared, layers.at(i))
            return Block(model.hidden, specs[i], layers.at(i), recompute, model.streams, shared)

        self.layers = nn.ModuleDict({str(i): block(i) for i in range(start, stop)})
        several = self.last and model.streams.count > 1
        self.gathered = Gathered(model.hidden, model.streams, layers.at(model.depth - 1)) if several else None
        self.norm = layers.norm(model.hidden) if self.last else None
        self.head: Head | None = None
        if self.last:
            weight = self.embed.weight if model.tie_embeddings and self.embed is not None else None
            self.head = layers.head(vocab, model.hidden, weight, model.logit_scale, model.logit_softcap)

        heads = (1 if model.mtp.shared else model.mtp.depth) if self.last else 0
        last = layers.at(model.depth - 1)
        self.mtp = nn.ModuleDict({str(i): MTPHead(model.hidden, further_layer(model), last, recompute, model.streams) for i in range(heads)})

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """The blocks with the index of each in the whole model."""
        for name, block in self.layers.items():
            yield name, cast(Block, block)

    def routers(self) -> dict[str, Router]:
        """The routers by global name: whoever trains the model moves their biases."""
        return {f"{name}.router": moe.router for name, moe in self._moes()}

    def _moes(self) -> Iterator[tuple[str, MoE]]:
        heads = ((f"mtp.{name}.block", cast(MTPHead, head).block) for name, head in self.mtp.items())
        for name, block in (*((f"layers.{name}", block) for name, block in self.blocks()), *heads):
            if isinstance(block.ffn, MoE):
                yield f"{name}.ffn", block.ffn

    def forward(self, x: Tensor, seq: Sequence | None = None, memory: Memory | None = None) -> Tensor:
        """Tokens [T] on the first stage, hidden states [T, hidden] on another, of each stream where there are several -> hidden states, of one
        stream and normed on the last stage.

        Without a sequence, of a whole model: tokens [T] or [batch, T], each row a document -> logits [..., T, vocab].
        memory: the sequence's, of an encoder, for cross-attention. Raises ValueError where no layer reads it.
        """
        if memory is not None and not any(isinstance(m, Mixer) and m.reads_memory for m in self.modules()):
            raise ValueError("no layer of this model reads a memory: give none, or a model with layers of cross_attention")
        if seq is None:
            self._check_whole()
            seq = Sequence.of([x.shape[-1]] * (x.shape[0] if x.ndim == 2 else 1), x.device)
            seq.memory = memory
            return self.logits(self(x.flatten(), seq)).unflatten(0, x.shape)
        seq = seq if memory is None else replace(seq, memory=memory)
        x = self._enter(x, seq)
        for _, block in self.blocks():
            x = block(x, seq)
        return x if self.norm is None else self._leave(x)

    def _enter(self, x: Tensor, seq: Sequence) -> Tensor:
        if not self.first:
            return x
        x = self._embedded(x)
        if self.positions is not None:
            x = x + F.embedding(self._mine(seq.positions), self.positions)
        x = x if self.embed_norm is None else self.embed_norm(x)
        if self.shared:
            seq.shared[EMBEDDINGS] = x
        return spread(x, self.model.streams.count)

    def _leave(self, x: Tensor) -> Tensor:
        assert self.norm is not None, "only the last stage has a final norm"
        return self.norm(x if self.gathered is None else self.gathered(x))  # type: ignore[no-any-return]

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None, "this stage does not embed"
        x = self.embed(tokens)
        return x if self.model.embed_scale == 1 else x * self.model.embed_scale

    def loss(self, hidden: Tensor, labels: Tensor, factor: float = 1.0) -> Losses:
        """Last stage: hidden [T, hidden], labels [T] (-100: none) -> sums over this rank's labelled tokens: of the cross entropy in nats, of
        the squared logsumexp, and, times `factor`, the objective of both (z-loss, Chowdhery et al. 2022).

        Under an engine that keeps gradients in buffers of its own the objective is differentiated as it is: see `Head.loss`.
        """
        assert self.head is not None, "only the last stage has a head"
        losses: Losses = self.head.loss(hidden, labels, self.model.z_loss, factor)
        return losses

    def further_loss(self, hidden: Tensor, further: list[Ahead], seq: Sequence, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Last stage: hidden [T, hidden] as `forward` gives them, and what lies ahead at each depth -> the mean over the depths of the
        sum over this rank's labelled tokens of the cross entropy in nats: times `factor`, to be differentiated as in `loss`, and as it
        is, without a gradient."""
        assert self.head is not None, "only the last stage has a head"
        objective = total = hidden.new_zeros(())
        for k, (tokens, labels) in enumerate(further):
            hidden = self.mtp["0" if self.model.mtp.shared else str(k)](hidden, self._embedded(tokens), seq)
            losses: Losses = self.head.loss(hidden, labels, factor=factor / len(further))
            objective, total = objective + losses.objective, total + losses.loss
        return objective, total / len(further)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage: normed hidden states [T, hidden] -> [T, vocab]"""
        assert self.head is not None, "only the last stage has a head"
        return self.head.logits(hidden)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, seq: Sequence, all_logits: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """Whole documents of at least one token each: tokens [T] -> logits after the last token of each document [N, vocab]
        (after every token of this context rank [T, vocab] with all_logits), and the state by layer that `decode` continues from."""
        self._check_whole()
        x, state = self._enter(tokens, seq), {}
        for name, block in self.blocks():
            x, state[name] = block.prefill(x, seq)
        return self._finish(x if all_logits else seq.exchange.last_hidden(x, seq)), state

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: dict[str, Any], seq: Sequence) -> tuple[Tensor, dict[str, Any]]:
        """One more token of each document: tokens [N], seq of `Sequence.step` -> logits [N, vocab] and the state after it.
        The state given must not be used again."""
        self._check_whole()
        x, after = self._enter(tokens, seq), {}
        for name, block in self.blocks():
            x, after[name] = block.decode(x, state[name], seq)
        return self._finish(x), after

    def _finish(self, x: Tensor) -> Tensor:
        return self.logits(self._leave(x))

    def _check_whole(self) -> None:
        if not (self.first and self.last):
            raise ValueError("decoding needs every layer on each rank: write parallel.pipeline=1")

    def flops(self, tokens: int, context: int) -> dict[str, float]:
        """Floating-point operations by part of a training forward of `tokens` tokens in documents of `context` tokens; a step takes
        three times as many."""
        parts: dict[str, float] = {}
        for _, block in self.blocks():
            for part, count in block.flops(tokens, context).items():
                parts[part] = parts.get(part, 0.0) + count
        if self.last:
            parts["head"] = 2.0 * tokens * self.model.hidden * self.vocab
            for k in range(self.model.mtp.depth):
                head = cast(MTPHead, self.mtp["0" if self.model.mtp.shared else str(k)])
                parts["mtp"] = parts.get("mtp", 0.0) + head.flops(tokens, context) + parts["head"]
        return parts

    def num_params(self) -> Parameters:
        """Parameters of this stage over all ranks; a tied embedding counts once."""
        total = active = 0
        top_k = {f"{name}.experts.": moe.options.top_k for name, moe in self._moes()}
        for name, param in self.named_parameters():
            layout = layout_of(param)
            size = torch.Size(layout.shape).numel()
            chosen = next((k for prefix, k in top_k.items() if name.startswith(prefix)), 0)
            total += size * max(layout.experts, 1)
            active += size * (chosen if layout.experts else 1)
        return Parameters(total, active)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """K/V caches and recurrent states of one document of `context` tokens."""
        return sum(block.state_bytes(context, bytes_per_value) for _, block in self.blocks())
