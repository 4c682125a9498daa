"""The training loop: the same on a laptop's CPU and on any parallel layout."""

import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltrain import data
from ltrain.checkpoint import Checkpoint, newest_whole, save
from ltrain.config import Config, ConfigError, to_dict, to_yaml, validate
from ltrain.data.packing import MicroBatch
from ltrain.parallel import mesh as ranks
from ltrain.parallel.engines.megatron import MegatronEngine
from ltrain.tracking import Tracker
from ltrain.train.progress import Progress
from ltrain.train.schedule import learning_rate
from ltrain.train.stop import StopRequest
from ltrain.train.summary import Summary, text


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm is not a finite number; the message says where it arose."""


@dataclass
class Outcome:
    """What `train` leaves behind, for callers and tests."""

    step: int
    losses: list[float]  # train/loss of each step of this process
    eval_loss: float | None
    unigram_entropy: float | None
    stopped: bool  # by SIGTERM, before the last step


def train(config: Config, source: str = "") -> Outcome:
    """Train, or go on training, the run that `config` describes. Called by every rank.

    source: the path of the config, for the commands shown at the end.
    """
    validate(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.precision == "fp64":
        raise ConfigError("precision=fp64 serves checks of gradients, not training: write precision=fp32 or bf16")
    device = ranks.start(config.device, config.parallel.timeout)
    mesh = ranks.Mesh(config.parallel, device)
    try:
        with StopRequest() as stop:
            return Run(config, source, mesh, stop).train()
    finally:
        mesh.close()
        ranks.stop()


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Run:
    def __init__(self, config: Config, source: str, mesh: ranks.Mesh, stop: StopRequest):
        self.config, self.mesh, self.stop = config, mesh, stop
        self.dir = Path(config.run.dir)
        self.source = source or str(self.dir / "config.yaml")
        self.loads_data = mesh.replica.rank() == 0  # the first rank of each data-parallel replica reads for all of it
        checkpoint = self._open_folder()
        self.start = checkpoint.meta["step"] if checkpoint else 0
        self.checkpoint = checkpoint.path if checkpoint else self.dir
        self._say(
            f"run {self.dir}: {mesh.size} rank(s) on {mesh.device.type}, "
            + (f"continuing after step {self.start}" if checkpoint else "from the start")
        )

        # rank 0 trains and caches a tokenizer first, so that the others find it
        dataset = data.build(config.data, config.seed) if mesh.rank == 0 else None
        mesh.barrier()
        self.dataset = dataset or data.build(config.data, config.seed)
        self.tokenizer = self.dataset.tokenizer
        self.vocab = config.model.vocab or round_up(self.tokenizer.vocab_size, 128)  # 128: any tensor degree divides it
        if self.vocab < self.tokenizer.vocab_size:
            raise ConfigError(
                f"model.vocab={self.vocab} is smaller than the tokenizer's {self.tokenizer.vocab_size}: leave it out, or write at least that"
            )

        self.engine = MegatronEngine(config, self.vocab, mesh)
        self.tokens_seen = 0
        if checkpoint:
            self.engine.load(checkpoint, self.start)
            self.tokens_seen = checkpoint.meta["tokens"]
        self.micro_batches = config.train.tokens_per_step // config.data.tokens  # of one step, over all data ranks
        self.loader: Any = None
        if self.loads_data:
            self.loader = self.dataset.loader(mesh.data.rank(), mesh.data.size(), state=checkpoint.meta["loader"] if checkpoint else None)
        self.eval_loss: float | None = None
        self.entropy: float | None = None
        self._eval: tuple[list[MicroBatch], int, int] | None = None

    def _say(self, text: str) -> None:
        if self.mesh.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _open_folder(self) -> Checkpoint | None:
        """The checkpoint to go on from, which every rank opens; a run that is there already is never overwritten."""
        refusal = ""
        if self.mesh.rank == 0:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                (self.dir / ".writable").touch()
                (self.dir / ".writable").unlink()
            except OSError as error:
                refusal = f"run.dir={self.dir} cannot be used ({error.strerror}): name a folder that can be written"
        refusal = self.mesh.broadcast_object(refusal)
        if refusal:
            raise ConfigError(refusal)
        path, warnings = newest_whole(self.dir / "checkpoints", self.mesh)
        for warning in warnings:
            self._say(f"warning: {warning}")
        if path and not self.config.run.resume:
            raise ConfigError(f"{self.dir} already holds a run: add run.resume=true to go on with it, or name another folder with run.dir=...")
        if self.mesh.rank == 0:
            (self.dir / "config.yaml").write_text(to_yaml(self.config))
        return Checkpoint(path) if path else None

    # Steps

    def train(self) -> Outcome:
        config, mesh = self.config, self.mesh
        if self.start >= config.train.steps:
            self._say(f"{self.dir} has done {self.start} steps already: write train.steps={2 * self.start} to go on")
            self._close_loader()
            return Outcome(self.start, [], None, None, stopped=False)
        track = Tracker.start(config, self._parameters(), self.start or None) if mesh.rank == 0 else None
        progress = Progress(config.train.steps, self.start) if mesh.rank == 0 else None
        losses: list[float] = []
        step, stopped, status = self.start, False, "FAILED"
        try:
            began = time.perf_counter()
            while step < config.train.steps and not stopped:
                batches, labels, stopped = self._next_batches()
                lr = learning_rate(step, config.train)
                result = self.engine.forward_backward(batches, labels, self.micro_batches)
                self._check_finite("loss", result["loss"], step, batches)
                norm = self.engine.step(lr)
                self._check_finite("gradient norm", norm, step, batches)
                step += 1
                self.tokens_seen += config.train.tokens_per_step
                losses.append(result["loss"])
                now = time.perf_counter()
                rate = config.train.tokens_per_step / (now - began)
                metrics = {
                    "train/loss": result["loss"],
                    "train/aux_loss": result["aux_loss"],
                    "train/z_loss": result["z_loss"],
                    "train/grad_norm": norm,
                    "train/lr": lr,
                    "train/tokens_per_second": rate,
                    "train/tokens": float(self.tokens_seen),
                }
                if track and (step % config.tracking.every == 0 or step == config.train.steps):
                    track.log(metrics, step)
                if progress:
                    progress.update(step, loss=result["loss"], tokens_per_second=rate, lr=lr)
                last = step == config.train.steps or stopped
                if (config.eval.every and step % config.eval.every == 0) or step == config.train.steps:
                    self._evaluate(track, progress, step)
                if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                    self._save(step)
                began = time.perf_counter()
            status = "KILLED" if stopped else "FINISHED"
        finally:
            if progress:
                progress.close()
            self._close_loader()
            if track and status == "FAILED":
                track.close(status)
        if step < config.train.steps:
            self._say(f"stopped by SIGTERM after step {step}, which is saved: the same command with run.resume=true goes on from there")
        if mesh.rank == 0:
            assert track is not None
            print(self._summarise(step, losses, track.uri))
            track.close(status)
        mesh.barrier()
        return Outcome(step, losses, self.eval_loss, self.entropy, stopped and step < config.train.steps)

    def _close_loader(self) -> None:
        if self.loader is not None:
            self.loader.close()

    def _next_batches(self) -> tuple[list[MicroBatch], int, bool]:
        """This replica's micro-batches of the next step, the labels of the whole step, and whether any rank was told to stop."""
        share = self.micro_batches // self.mesh.data.size()
        batches = [next(self.loader) for _ in range(share)] if self.loads_data else None
        batches = self.mesh.spread(batches)
        mine = sum(int((b.labels >= 0).sum()) for b in batches) if self.loads_data else 0
        counts = self.mesh.sum(torch.tensor([mine, int(self.stop.raised)], dtype=torch.int64, device=self.mesh.device)).tolist()
        return batches, counts[0], counts[1] > 0

    def _check_finite(self, what: str, value: float, step: int, batches: list[MicroBatch]) -> None:
        if math.isfinite(value):
            return
        rows = []
        for batch, norms in self.engine.layer_norms(batches):
            bad = next((layer for layer, norm in norms.items() if not math.isfinite(norm)), "none on this rank")
            shown = ", ".join(f"{layer} {norm:.3g}" for layer, norm in norms.items())
            rows.append(f"  micro-batch {batch.index} of {', '.join(batch.documents[:8])}\n  first non-finite: {bad}; root mean squares: {shown}")
        ranks_ = [f"rank {rank}:\n" + "\n".join(lines) for rank, lines in enumerate(self.mesh.all_gather_object(rows))]
        raise NonFiniteLoss(f"the {what} is {value} at step {step + 1}; the checkpoints before it are whole.\n" + "\n".join(ranks_))

    # Evaluation, checkpoints, the end

    def _held_out(self) -> tuple[list[MicroBatch], int, int]:
        """This replica's held-out micro-batches, as many on every data rank; the labels and the micro-batches of all."""
        if self._eval is None:
            box: Any = None
            if self.loads_data:
                tokens, size = max(self.config.eval.tokens, self.config.data.tokens), self.mesh.data.size()
                every = self.dataset.held_out(tokens)
                labels = sum(int((b.labels >= 0).sum()) for b in every)
                box = (self.dataset.held_out(tokens, self.mesh.data.rank(), size), labels, len(every), data.unigram_entropy(every))
            mine, labels, count, self.entropy = self.mesh.spread(box)
            self._eval = (mine, labels, count)
        return self._eval

    def _evaluate(self, track: Tracker | None, progress: Progress | None, step: int) -> None:
        self.eval_loss = self.engine.evaluate(*self._held_out())
        if track:
            track.log({"eval/loss": self.eval_loss, "eval/unigram_entropy": self.entropy or 0.0}, step)
        if progress:
            progress.note(f"step {step}: held-out loss {self.eval_loss:.3f} nats per token (unigram entropy {self.entropy:.3f})")

    def _save(self, step: int) -> None:
        states = self.mesh.gather_object(self.loader.state() if self.loader is not None else None)
        meta = {"step": step, "tokens": self.tokens_seen, "vocab": self.vocab, "layout": to_dict(self.config)["parallel"], "ranks": self.mesh.size}
        files: dict[str, bytes] = {}
        if states is not None:
            meta["loader"] = data.merge_states([s for s in states if s is not None])
            with tempfile.TemporaryDirectory() as folder:
                self.tokenizer.save(folder)
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            files["config.yaml"] = to_yaml(self.config).encode()
        self.checkpoint = save(self.dir / "checkpoints", step, self.engine.state(), meta, self.mesh, files=files, keep=self.config.checkpoint.keep)

    def _parameters(self) -> dict[str, Any]:
        total, active = self.engine.stack.num_params()
        return {"ranks": self.mesh.size, "vocab": self.vocab, "tokenizer": self.tokenizer.fingerprint, "params_total": total, "params_active": active}

    def _summarise(self, step: int, losses: list[float], uri: str) -> str:
        return text(Summary(self.config, step, losses[0], losses[-1], self.eval_loss, self.entropy, self.checkpoint, self.source, uri))
