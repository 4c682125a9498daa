"""A model under a mesh as an evaluation uses it: documents in, losses and logits out, whatever the layout.

Every rank of a data-parallel replica calls with the same documents and gets the same answers. Documents are packed into one
stream, which is filled up to what the layout divides; the model sees each alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ltrain.model import sequence as model
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.pipeline import Stage


class Scores(NamedTuple):
    """Of one document of n tokens: of each token but the first, given those before it."""

    loss: Tensor  # [n - 1] float64 on the host: nats; 0 where it was not asked for
    right: Tensor  # [n - 1] bool on the host: whether it is the likeliest one


class Stream(NamedTuple):
    """Documents end to end, then what fills the stream up: documents of zeros."""

    tokens: Tensor  # [T] int64 on the host
    cu_seqlens: Tensor  # [documents + 1] int32 on the host, those that fill it included

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff().long()

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.tokens)) - torch.repeat_interleave(self.cu_seqlens[:-1].long(), self.lengths)


Documents = Sequence[ArrayLike]  # token ids of each
LOGITS = 2**24  # held at a time


def pack(documents: Documents, tokens: int, count: int) -> Stream:
    """Filled up to a multiple of `tokens` tokens, which `count` divides, and of `count` documents."""
    ids = [torch.from_numpy(np.asarray(document, dtype=np.int64)) for document in documents]
    lengths = [len(document) for document in ids]
    fillers, room = -len(documents) % count, -sum(lengths) % tokens
    if room and not fillers:
        fillers = count
    while room < fillers:
        room += tokens
    if fillers:
        lengths += [1] * (fillers - 1) + [room - fillers + 1]
    flat = torch.zeros(sum(lengths), dtype=torch.int64)
    flat[: len(flat) - room] = torch.cat(ids)
    return Stream(flat, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


class Inference:
    """stage: what an engine trains, or `ltrain.evals.command.read_stage` gives. vocab: ids from here on are padding, never the
    likeliest. Nothing here keeps a gradient; `stage.eval()` is the caller's."""

    def __init__(self, stage: Stage, vocab: int):
        self.stage, self.mesh, self.vocab = stage, stage.mesh, vocab
        self.stack, self.device = stage.stack, stage.mesh.device
        self._exchanges = {stage.layout.tokens: stage.exchange}
        self._unit = stage.layout.parts * self.mesh.tensor.size()

    @property
    def decodes(self) -> bool:
        """Whether every rank has all layers. Without that, what a greedy decoding would say has to be read from `score`."""
        return self.mesh.pipeline.size() == 1

    def exchange(self, tokens: int) -> ContextExchange:
        """For streams of so many tokens."""
        if tokens not in self._exchanges:
            self._exchanges = {tokens: self.stage.exchange.resized(tokens)}  # lengths seldom come back
        return self._exchanges[tokens]

    def _sequence(self, stream: Stream, room: int = 0) -> model.Sequence:
        exchange = self.exchange(len(stream.tokens))
        return model.Sequence(
            stream.cu_seqlens, exchange.layout.of(stream.cu_seqlens).take(stream.positions).to(self.device), exchange=exchange, room=room
        )

    # Every token of whole documents

    @torch.no_grad()
    def score(self, documents: Documents, last: list[int] | None = None) -> list[Scores]:
        """The tokens of the documents, or of each its `last` ones, by what stands before them."""
        stream = pack(documents, self._unit, 1)
        labels = torch.full_like(stream.tokens, -100)
        bounds = stream.cu_seqlens.tolist()[: len(documents) + 1]
        for i, (start, stop) in enumerate(pairwise(bounds)):
            first = start if last is None else max(stop - 1 - last[i], start)
            labels[first : stop - 1] = stream.tokens[first + 1 : stop]
        seq = self._sequence(stream)
        layout = self.exchange(len(stream.tokens)).layout.of(stream.cu_seqlens)
        mine: list[Tensor] = []  # of the last stage: loss and right [2, T / context]

        def forward(feed: Iterator[Any], stage: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            arrived = self.stage._input
            assert self.mesh.first_stage or arrived is not None
            x = layout.take(stream.tokens).to(self.device) if self.mesh.first_stage or arrived is None else arrived.squeeze(1)
            hidden = self.stack(x, seq)
            if not self.mesh.last_stage:
                return hidden.unsqueeze(1), lambda loss: (loss, {})
            mine.append(self._token_scores(hidden, layout.take(labels)))
            return hidden.new_zeros(()), lambda loss: (loss, torch.zeros((), dtype=torch.int, device=self.device), {})

        if self.mesh.pipeline.size() == 1:
            forward(iter(()), self.stage)
        else:
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([None]),
                model=[self.stage],
                num_microbatches=1,
                seq_length=len(stream.tokens),
                micro_batch_size=1,
                forward_only=True,
            )
        whole = torch.zeros(2, len(stream.tokens), dtype=torch.float64)
        if mine and self.mesh.tensor.rank() == 0:  # tensor ranks have computed the same
            done = 0
            for start, stop in layout.spans():
                whole[:, start:stop] = mine[0][:, done : done + stop - start].cpu()
                done += stop - start
        dist.all_reduce(whole, group=self.mesh.replica)
        return [Scores(whole[0, a : b - 1], whole[1, a : b - 1] > 0) for a, b in pairwise(bounds)]

    def _token_scores(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [T / tensor, hidden], labels [T] on the host -> loss and right [2, T] in float64; logits only where there are labels."""
        by_rank = labels.view(self.mesh.tensor.size(), -1)  # [tensor, T / tensor]
        out = torch.zeros(2, *by_rank.shape, dtype=torch.float64, device=self.device)
        rows = max(1, LOGITS // (self.stack.vocab * len(by_rank)))
        for a in range(0, len(hidden), rows):
            part = by_rank[:, a : a + rows]
            if not (part >= 0).any():
                continue
            logits = self.stack.logits(hidden[a : a + rows])  # [tensor * rows, vocab]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = part.flatten().to(self.device)
            loss = logits.logsumexp(-1) - logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            right = self.likeliest(logits) == target
            out[:, :, a : a + rows] = torch.stack((loss.double().where(target >= 0, 0.0), right.double())).unflatten(1, part.shape)
        return out.flatten(1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """logits [..., vocab] -> what greedy decoding chooses [...]"""
        return logits[..., : self.vocab].argmax(-1)

    # Token by token

    @torch.no_grad()
    def prefill(self, documents: Documents, room: int) -> tuple[Tensor, "Decoding"]:
        """Logits after each document [N, vocab] (float32 or wider), and what goes on from there for up to about `room` tokens."""
        stream = pack(documents, self._unit, self.mesh.tensor.size())
        layout = self.exchange(len(stream.tokens)).layout.of(stream.cu_seqlens)
        logits, state = self.stack.prefill(layout.take(stream.tokens).to(self.device), self._sequence(stream, room))
        decoding = Decoding(self, len(documents), stream.lengths.to(self.device), state, self.exchange(len(stream.tokens)))
        return decoding.of_documents(logits), decoding


class Decoding:
    """Documents under way, with their caches. Each `step` adds one token to all."""

    def __init__(self, inference: Inference, documents: int, positions: Tensor, state: dict[str, Any], exchange: ContextExchange):
        self._inference, self._documents, self._positions, self._state, self._exchange = inference, documents, positions, state, exchange

    def of_documents(self, logits: Tensor) -> Tensor:
        """Logits of the documents and of what filled the stream up -> [N, vocab]."""
        logits = logits[: self._documents]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens [N] on the device -> logits after them [N, vocab]."""
        padded = tokens.new_zeros(len(self._positions))
        padded[: self._documents] = tokens
        seq = model.Sequence.step(self._positions, self._exchange)
        logits, self._state = self._inference.stack.decode(padded, self._state, seq)
        self._positions = self._positions + 1
        return self.of_documents(logits)
