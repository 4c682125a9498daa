"""From a config to the ranks that run it and the micro-batches they train on: what training and benchmarks share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ltrain import data
from ltrain.config import Config, ConfigError, validate
from ltrain.data.held_out import rank_share
from ltrain.data.packing import MicroBatch
from ltrain.data.tokenizer import Tokenizer
from ltrain.parallel import fp8
from ltrain.parallel import mesh as ranks
from ltrain.validation import VOCAB_MULTIPLE


@contextmanager
def started(config: Config) -> Iterator[torch.device]:
    """This rank's device, with the ranks that torchrun started joined."""
    validate(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.precision == "fp64":
        raise ConfigError("precision=fp64 serves checks of gradients, not training: write precision=fp32 or bf16")
    try:
        yield ranks.start(config.device, config.parallel.timeout)
    finally:
        ranks.stop()


@contextmanager
def joined(config: Config) -> Iterator[ranks.Mesh]:
    """The ranks that torchrun started, in the config's one layout."""
    if config.stages:
        raise ConfigError(
            "the config has stages, each with a layout of its own: write one of them to a file with `ltrain config show --stage NAME` and give that"
        )
    with started(config) as device:
        fp8.refuse(config, device)  # before the data is read, which may take long
        mesh = ranks.Mesh(config.parallel, device)
        try:
            yield mesh
        finally:
            mesh.close()


class HeldOut(NamedTuple):
    batches: list[MicroBatch]  # of this data-parallel replica, as many for each
    labels: int  # of all replicas
    micro_batches: int
    unigram_entropy: float  # of all the labels, nats per token


class Feed:
    """The data of a run as one rank sees it. The first rank of each data-parallel replica reads; the others get it from there.

    Args:
        state: of all loaders, to go on from.
        tokenizer: folder that holds the one to use; None: the one that config.data names.

    Attributes:
        tokenizer: the run's.
        vocab: the model's: model.vocab, or the tokenizer's rounded up.
        micro_batches: of one step, over all data ranks.

    Every method is called by all ranks, and an error of one rank is raised on all.
    """

    def __init__(self, config: Config, mesh: ranks.Mesh, state: dict[str, Any] | None = None, tokenizer: Path | None = None):
        self.config, self.mesh = config, mesh
        self.reads = mesh.replica.rank() == 0

        def build() -> data.Dataset:
            return data.build(config.data, config.seed, Tokenizer.load(tokenizer) if tokenizer else None)

        # rank 0 trains and caches a tokenizer first, so that the others find it
        dataset = mesh.agree(lambda: build() if mesh.rank == 0 else None)
        self.dataset = mesh.agree(lambda: dataset or build())
        self.tokenizer = self.dataset.tokenizer
        self.vocab = config.model.vocab or -(-self.tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if self.vocab < self.tokenizer.vocab_size:
            raise ConfigError(
                f"model.vocab={self.vocab} is smaller than the tokenizer's {self.tokenizer.vocab_size}: leave it out, or write at least that"
            )
        self.micro_batches = config.train.tokens_per_step // config.data.tokens
        open_loader = lambda: self.dataset.loader(mesh.data.rank(), mesh.data.size(), state) if self.reads else None  # noqa: E731
        self.loader = mesh.agree(open_loader)

    def step(self, stop: bool = False) -> tuple[list[MicroBatch], int, bool]:
        """This replica's micro-batches of the next step, the labels of all replicas', and whether any rank says stop."""
        share = self.micro_batches // self.mesh.data.size()
        batches, failure = None, None
        if self.loader is not None:
            try:
                batches = [next(self.loader) for _ in range(share)]
            except Exception as error:  # told to all ranks below
                failure = error
        labels = sum(int((b.labels >= 0).sum()) for b in batches or [])
        counts = torch.tensor([labels, int(stop), int(failure is not None)], dtype=torch.int64, device=self.mesh.device)
        labels, stops, failures = self.mesh.sum(counts).tolist()
        if failures:
            self.mesh.agree(lambda: _raise(failure))
        return self.mesh.spread(batches), labels, stops > 0

    def held_out(self) -> HeldOut:
        """eval.tokens of held-out documents, tokenised once."""

        def read() -> tuple[list[MicroBatch], int, float] | None:
            if self.mesh.rank:
                return None
            batches = self.dataset.held_out(self.config.eval.tokens)
            return batches, sum(int((b.labels >= 0).sum()) for b in batches), data.unigram_entropy(batches)

        batches, labels, entropy = self.mesh.broadcast_object(self.mesh.agree(read))
        return HeldOut(rank_share(batches, self.mesh.data.rank(), self.mesh.data.size()), labels, len(batches), entropy)

    def state(self) -> dict[str, Any] | None:
        """On rank 0 where all loaders stand, for a checkpoint; None elsewhere."""
        states = self.mesh.gather_object(self.loader.state() if self.loader is not None else None)
        return None if states is None else data.merge_states([s for s in states if s is not None])

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
