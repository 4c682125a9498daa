"""Process groups: who computes what with whom, and the few collectives that the loop, the loader and checkpoints need."""

import datetime
import gc
import os
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# megatron-core decorates fusions that ltrain never calls with torch.compile, which loads the whole compiler: half of the time
# of a small run's start.
with unittest.mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)):
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

from ltrain.config import ConfigError, ParallelConfig
from ltrain.model.layers import Shard
from ltrain.parallel import cpu
from ltrain.parallel.context.ulysses import places


def start(device: str = "auto", timeout: int = 600) -> torch.device:
    """Join the ranks that torchrun started (or be the only one) and return this rank's device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: write device=cpu or device=auto")
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError("device=cpu on a machine with a GPU: megatron-core uses the GPU it sees; hide it with CUDA_VISIBLE_DEVICES=")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(f"rank {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; start as many ranks as there are GPUs")
    place = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        alone = "RANK" not in os.environ
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            rank=0 if alone else int(os.environ["RANK"]),
            world_size=1 if alone else int(os.environ["WORLD_SIZE"]),
            store=dist.HashStore() if alone else None,
            timeout=datetime.timedelta(seconds=timeout),
        )  # without a device_id, which would give each of megatron's groups of one rank a communicator and 0.4 GiB of the GPU
    cpu.install()
    return place


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_memory() -> None:
    """Give the memory of what was let go of back, before another model is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Mesh:
    """The process groups of one layout over all ranks: tensor x context x expert x data x pipeline, tensor fastest.

    Expert ranks fold over the tensor, context and data ranks of a pipeline stage.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device):
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = datetime.timedelta(seconds=parallel.timeout)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=-(-parallel.timeout // 60),  # megatron takes whole minutes
        )
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.tensor, self.context, self.expert, self.pipeline = (self.groups.tp, self.groups.cp, self.groups.ep, self.groups.pp)
        self.data: dist.ProcessGroup = self.groups.dp
        self.tensor_context: dist.ProcessGroup = parallel_state.get_tensor_and_context_parallel_group()
        self.stage: dist.ProcessGroup = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        # objects travel on the CPU
        self.control: dist.ProcessGroup = dist.new_group(timeout=self.timeout, backend="gloo")
        self._own: list[dist.ProcessGroup] = [self.control]
        # exchanges of the mixers and the spreading of micro-batches have groups of their own, so that their order of
        # issue never mixes with megatron's collectives
        exchanging = dist.get_process_group_ranks(self.context)
        self.exchange = self._new_group(exchanging)
        # who divides heads with this rank, and who has the same ones; of these who is on its node, and who has its place on each
        self.ulysses = self._divided(exchanging, parallel.ulysses)
        ring = exchanging if self.ulysses is None else dist.get_process_group_ranks(self.ulysses[1])
        self.nodes = self._divided(ring, parallel.inner_ring)
        self.fp8_wire = parallel.wire == "fp8"
        self.replica = self._new_group(self._ranks_with(self.data.rank()), backend="gloo")
        self._connect()
        self.shard = Shard(self.tensor.rank(), self.tensor.size(), self.expert.rank(), self.expert.size())

    def _ranks_with(self, data_rank: int) -> list[int]:
        return [rank for rank, other in enumerate(self.all_gather_object(data_rank)) if other == data_rank]

    def _new_group(self, ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
        """The group of `ranks`, which this rank is in; every rank calls, each with its own group's ranks."""
        mine = None
        for group_ranks in sorted({tuple(r) for r in self.all_gather_object(ranks)}):
            group = dist.new_group(list(group_ranks), timeout=self.timeout, backend=backend)
            if self.rank in group_ranks:
                mine = group
                self._own.append(group)
        assert mine is not None
        return mine

    def _divided(self, ranks: list[int], members: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
        """This rank's groups of `places`; None: members are no more than one."""
        if members == 1:
            return None
        group, line = (next(found for found in kind if self.rank in found) for kind in places(ranks, members))
        return self._new_group(group), self._new_group(line)

    def _connect(self) -> None:
        """Let NCCL connect every group of several ranks: a first message between some of them would wait for the others."""
        if self.device.type != "cuda":
            return
        groups = [self.groups.tp, self.groups.cp, self.groups.ep, self.groups.pp, self.groups.dp, self.tensor_context, self.stage, self.exchange]
        groups += [*(self.ulysses or ()), *(self.nodes or ())]
        for group in groups:
            if group.size() > 1:
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)

    @property
    def first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    def close(self) -> None:
        """Dissolve the groups, leaving the ranks joined: another layout may follow."""
        for group in self._own:
            dist.destroy_process_group(group)
        self._own.clear()
        parallel_state.destroy_model_parallel()

    # What the loop, the loader and checkpoints ask of the ranks.

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def gather_object(self, value: Any) -> list[Any] | None:
        """Every rank's value, in order of rank, on rank 0; None elsewhere."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all(self, flag: bool) -> bool:
        """Whether every rank's flag is true."""
        lowest = torch.tensor(int(flag))
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self.control)
        return bool(lowest)

    def agree[T](self, work: Callable[[], T]) -> T:
        """work() on this rank; where it fails on any rank it raises on all of them, so that none waits for one that is gone.

        Raises the rank's own error where it failed, elsewhere the first failing rank's sentence: ConfigError for what a
        person can mend, RuntimeError for the rest.
        """
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:
            failure = error
        seen = self.all_gather_object(None if failure is None else (isinstance(failure, ValueError), str(failure)))
        if failure is not None:
            raise failure
        for rank, (for_people, sentence) in ((r, f) for r, f in enumerate(seen) if f is not None):
            raise ConfigError(sentence) if for_people else RuntimeError(f"rank {rank}: {sentence}")
        return value

    def spread(self, value: Any) -> Any:
        """The value of the first rank of this data-parallel replica, on all its ranks: how a micro-batch arrives."""
        if self.replica.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.replica, 0), group=self.replica)
        return box[0]

    def sum(self, value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """In place: the sum over `group`, or over every rank."""
        dist.all_reduce(value, group=group)
        return value
