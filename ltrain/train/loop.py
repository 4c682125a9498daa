"""The training loop: the same on a laptop's CPU and on any parallel layout."""

import gc
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltrain.checkpoint import Checkpoint, clean, newest_whole, save
from ltrain.config import Config, ConfigError, to_dict, to_yaml
from ltrain.data.packing import MicroBatch
from ltrain.parallel import mesh as ranks
from ltrain.parallel.engines.megatron import MegatronEngine
from ltrain.tracking import Tracker
from ltrain.train.feed import Feed, joined
from ltrain.train.progress import Progress
from ltrain.train.schedule import learning_rate
from ltrain.train.stop import StopRequest
from ltrain.train.summary import Summary, sample, text


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


def train(config: Config) -> Outcome:
    """Train, or go on training, the run that `config` describes. Called by every rank."""
    with joined(config) as mesh, StopRequest() as stop:
        return Run(config, mesh, stop).train()


class Run:
    def __init__(self, config: Config, mesh: ranks.Mesh, stop: StopRequest):
        self.config, self.mesh, self.stop = config, mesh, stop
        self.dir = Path(config.run.dir)
        checkpoint = self._open_folder()
        meta: dict[str, Any] = checkpoint.meta if checkpoint else {"step": 0, "tokens": 0, "loader": None}
        self.start: int = meta["step"]
        self.tokens_seen: int = meta["tokens"]
        self.checkpoint = checkpoint.path if checkpoint else self.dir
        self._say(
            f"run {self.dir}: {mesh.size} rank(s) on {mesh.device.type}, "
            + (f"continuing after step {self.start}" if checkpoint else "from the start")
        )
        self.feed = Feed(config, mesh, meta["loader"])
        self.engine = mesh.agree(lambda: MegatronEngine(config, self.feed.vocab, mesh))
        if checkpoint:
            mesh.agree(lambda: self.engine.load(checkpoint, self.start))
            checkpoint.close()
        self.eval_loss: float | None = None

    def _say(self, line: str) -> None:
        if self.mesh.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def _open_folder(self) -> Checkpoint | None:
        """The checkpoint to go on from, which every rank opens; a run that is there already is never overwritten."""

        def probe() -> None:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.dir):
                    pass
            except OSError as error:
                raise ConfigError(f"run.dir={self.dir} cannot be used ({error.strerror}): name a folder that can be written") from error

        self.mesh.agree(lambda: probe() if self.mesh.rank == 0 else None)
        path, warnings = newest_whole(self.dir / "checkpoints", self.mesh)
        for warning in warnings:
            self._say(f"warning: {warning}")
        if path and not self.config.run.resume:
            raise ConfigError(f"{self.dir} already holds a run: add run.resume=true to go on with it, or name another folder with run.dir=...")
        clean(self.dir / "checkpoints", self.mesh)
        return Checkpoint(path) if path else None

    # Steps

    def train(self) -> Outcome:
        config, mesh = self.config, self.mesh
        if self.start >= config.train.steps:
            self._say(f"{self.dir} has done {self.start} steps already: write train.steps={2 * self.start} to go on")
            self.feed.close()
            return Outcome(self.start, [], None, None, stopped=False)
        # read before the first step: what is wrong with it must not come to light after the last one
        held_out = self.feed.held_out()
        entropy = held_out.unigram_entropy
        self._keep_config()
        track = Tracker.start(config, self._parameters(), self.start or None) if mesh.rank == 0 else None
        progress = Progress(config.train.steps, self.start) if mesh.rank == 0 else None
        losses: list[float] = []
        step, stopped, status = self.start, False, "FAILED"
        # what was imported and built stays: without this, each pass of Python's garbage collector walks all of it
        gc.collect()
        gc.freeze()
        try:
            began = time.perf_counter()
            while step < config.train.steps and not stopped:
                batches, labels, stopped = self.feed.step(self.stop.raised)
                lr = learning_rate(step, config.train)
                result = self.engine.forward_backward(batches, labels, self.feed.micro_batches)
                self._check_finite("loss", result["loss"], step, batches)
                norm = self.engine.step(lr)
                self._check_finite("gradient norm", norm, step, batches)
                step += 1
                self.tokens_seen += config.train.tokens_per_step
                losses.append(result["loss"])
                rate = config.train.tokens_per_step / (time.perf_counter() - began)
                last = step == config.train.steps
                if track and (step % config.tracking.every == 0 or last):
                    metrics = {f"train/{name}": value for name, value in result.items()}
                    metrics |= {"train/grad_norm": norm, "train/lr": lr, "train/tokens_per_second": rate, "train/tokens": float(self.tokens_seen)}
                    track.log(metrics, step)
                if progress:
                    progress.update(step, loss=result["loss"], tokens_per_second=rate, lr=lr)
                if last or (not stopped and config.eval.every and step % config.eval.every == 0):
                    self.eval_loss = self.engine.evaluate(held_out.batches, held_out.labels, held_out.micro_batches)
                    if track:
                        track.log({"eval/loss": self.eval_loss, "eval/unigram_entropy": entropy}, step)
                    if progress:
                        progress.note(f"step {step}: held-out loss {self.eval_loss:.3f} nats per token (unigram entropy {entropy:.3f})")
                if last or stopped or (config.checkpoint.every and step % config.checkpoint.every == 0):
                    self._save(step)
                began = time.perf_counter()
            stopped = step < config.train.steps
            status = "KILLED" if stopped else "FINISHED"
        finally:
            gc.unfreeze()
            if progress:
                progress.close()
            self.feed.close()
            if track:
                track.close(status)
        if stopped:
            self._say(f"stopped by SIGTERM after step {step}, which is saved: the same command with run.resume=true goes on from there")
        if mesh.rank == 0:
            self._conclude(Summary(config, mesh.size, step, losses[0], losses[-1], self.eval_loss, entropy, self.checkpoint))
        mesh.barrier()
        return Outcome(step, losses, self.eval_loss, entropy, stopped)

    def _keep_config(self) -> None:
        """Beside the checkpoints, once the run is known to work: what resumes it."""
        if self.mesh.rank == 0:
            part = self.dir / ".config.yaml"
            part.write_text(to_yaml(self.config))
            os.replace(part, self.dir / "config.yaml")

    def _check_finite(self, what: str, value: float, step: int, batches: list[MicroBatch]) -> None:
        if math.isfinite(value):
            return
        rows = []
        for batch, norms in self.engine.layer_norms(batches):
            bad = next((layer for layer, norm in norms.items() if not math.isfinite(norm)), "none on this rank")
            shown = ", ".join(f"{layer} {norm:.3g}" for layer, norm in norms.items())
            rows.append(
                f"  micro-batch {batch.index} of {', '.join(batch.documents[:8])}\n  first non-finite output: {bad}; root mean squares: {shown}"
            )
        if what != "loss" and (names := self.engine.bad_gradients()):
            rows.append(f"  non-finite gradients, from the loss backwards: {', '.join(names[:8])}")
        mine = "\n".join(rows) if self.mesh.tensor.rank() == 0 else ""  # tensor ranks have seen the same micro-batches
        reports = [f"rank {rank}:\n{report}" for rank, report in enumerate(self.mesh.all_gather_object(mine)) if report]
        raise NonFiniteLoss(
            f"the {what} is {value} at step {step + 1}; nothing was updated in it, and the checkpoints are whole.\n" + "\n".join(reports)
        )

    def _save(self, step: int) -> None:
        meta: dict[str, Any] = {"step": step, "tokens": self.tokens_seen, "vocab": self.feed.vocab}
        meta |= {"loader": self.feed.state(), "layout": to_dict(self.config)["parallel"], "ranks": self.mesh.size}
        with tempfile.TemporaryDirectory() as folder:
            self.feed.tokenizer.save(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        files["config.yaml"] = to_yaml(self.config).encode()
        keep = self.config.checkpoint.keep
        self.checkpoint = save(self.dir / "checkpoints", step, self.engine.state(), meta, self.mesh, files=files, keep=keep)

    def _parameters(self) -> dict[str, Any]:
        feed = self.feed
        total, active = self.engine.stack.num_params()
        return {"ranks": self.mesh.size, "vocab": feed.vocab, "tokenizer": feed.tokenizer.fingerprint, "params_total": total, "params_active": active}

    def _conclude(self, summary: Summary) -> None:
        """The closing summary. The run is over and saved: a sample that fails is no failure of the run."""
        try:
            spoken = sample(summary)
        except Exception as error:
            spoken = f"(no sample: {error})"
        print(text(summary, spoken))
