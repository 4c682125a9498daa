"""One pipeline stage: this rank's layers, fed by megatron-core's schedules."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ltrain.data.packing import MicroBatch
from ltrain.model.mtp import Ahead, ahead
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.mesh import Mesh


def cut(depth: int, stages: int) -> list[tuple[int, int]]:
    """The layers [start, stop) of each stage: as even as they divide, the first stages one longer."""
    even, more = divmod(depth, stages)
    starts = [stage * even + min(stage, more) for stage in range(stages + 1)]
    return list(zip(starts, starts[1:], strict=False))


class Stage(nn.Module):
    """`Stack` under a mesh. What crosses the cut between stages is the hidden states [T / tensor, 1, hidden], of each stream where
    the model has several."""

    model_type = ModelType.encoder_or_decoder  # megatron's schedules ask

    def __init__(
        self,
        stack: Stack,
        layout: ContextLayout,
        mesh: Mesh,
        config: TransformerConfig,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        super().__init__()
        self.stack, self.layout, self.mesh, self.config, self.autocast = stack, layout, mesh, config, autocast
        self.exchange = ContextExchange(
            layout, mesh.exchange if mesh.context.size() > 1 else None, mesh.tensor_context, mesh.tensor, mesh.ulysses, mesh.nodes, mesh.fp8_wire
        )
        self._input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """What the stage before sent, or None on the first; megatron's schedules call this."""
        self._input = tensors[0] if tensors else None

    def _brought(self, batch: MicroBatch, *streams: Tensor) -> tuple[Tensor, ...]:
        """This rank's tokens of each of these streams [tokens] int64, on the device. In one copy that the host does not wait for: it is to be
        ahead of the device when a micro-batch begins."""
        layout = self.layout.of(batch.cu_seqlens)
        rows = torch.stack([layout.take(stream) for stream in streams])
        rows = rows.pin_memory() if self.mesh.device.type == "cuda" else rows
        return rows.to(self.mesh.device, non_blocking=True).unbind()

    def forward(self, batch: MicroBatch, labels: int, micro_batches: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The hidden states for the next stage, or on the last stage this rank's part of the loss.

        labels: labelled tokens of the global batch, and micro_batches: micro-batches of it; the loss is already divided
        by them, so gradients add up over micro-batches and ranks. Returns sums for the log beside it.
        """
        batch = self.layout.fill(batch)
        tokens, positions, targets = self._brought(batch, batch.tokens, batch.positions, batch.labels)
        counted = self.layout.of(batch.cu_seqlens).counted(*self.exchange.tensor)
        seq = Sequence(batch.cu_seqlens, positions, exchange=self.exchange, aux_weight=1.0 / micro_batches, counted=counted)
        if self.mesh.first_stage:
            x = tokens
        else:
            assert self._input is not None
            x = self._input.squeeze(1)
        with self.autocast():
            hidden = self.stack(x, seq)
            further = self._further_loss(hidden, batch, seq, self.stack.model.mtp.weight / labels)
        sums = {name: noted / micro_batches for name, noted in seq.metrics.items()}
        if not self.mesh.last_stage:
            return hidden.unsqueeze(1), sums
        # divided in there, not here: where megatron's buffer has the head's gradient, nothing may scale it afterwards
        loss, ce, z = self.stack.loss(hidden, targets, 1 / labels)
        # every tensor rank computes the same loss: one of them counts
        mine = float(self.mesh.tensor.rank() == 0)
        sums |= {"loss": ce * mine, "z_loss": z * mine, "labels": (targets >= 0).sum() * mine}
        if further is not None:
            sums["mtp_loss"] = further[1] * mine
            loss = loss + further[0]
        return loss, sums

    def _further_loss(self, hidden: Tensor, batch: MicroBatch, seq: Sequence, factor: float) -> tuple[Tensor, Tensor] | None:
        """Of the last stage in training, where the model predicts further ahead. Every rank has the whole stream, so that looking ahead
        crosses the cuts between context ranks without a message."""
        depth = self.stack.model.mtp.depth
        if not (self.mesh.last_stage and depth and torch.is_grad_enabled()):
            return None

        further = [Ahead(*self._brought(batch, *a)) for a in ahead(batch.tokens, batch.labels, batch.cu_seqlens, depth)]
        return self.stack.further_loss(hidden, further, seq, factor)


def add_up_tied_embeddings(grad: Tensor, mesh: Mesh) -> None:
    """The first and the last stage hold the same tied embedding: both take the sum of their gradients."""
    dist.all_reduce(grad, group=mesh.groups.embd)


def stage_config(width: int, depth: int, mesh: Mesh, dtype: torch.dtype) -> Any:
    """What megatron's schedules and data parallelism read of a model's shape. width: of what crosses the cuts, for each token."""
    return TransformerConfig(
        num_layers=max(depth, mesh.pipeline.size()),
        hidden_size=width,
        num_attention_heads=mesh.tensor.size(),
        tensor_model_parallel_size=mesh.tensor.size(),
        pipeline_model_parallel_size=mesh.pipeline.size(),
        context_parallel_size=mesh.context.size(),
        sequence_parallel=mesh.tensor.size() > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # the loss is divided by the global number of labels before the backward, so data parallelism sums
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
    )
