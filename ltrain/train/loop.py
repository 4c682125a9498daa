"""The training loop: the same on a laptop's CPU and on any parallel layout."""

import gc
import math
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltrain.checkpoint import CheckpointError, Saved, Saver
from ltrain.config import Config, to_dict, to_yaml
from ltrain.data.packing import MicroBatch
from ltrain.evals.evaluation import Evaluation
from ltrain.parallel import fp8
from ltrain.parallel import mesh as ranks
from ltrain.parallel.engines import build_engine
from ltrain.tracking import Tracker
from ltrain.train import start
from ltrain.train.feed import Feed, started
from ltrain.train.progress import Progress
from ltrain.train.schedule import learning_rate
from ltrain.train.stages import keep_config, unfinished
from ltrain.train.stop import StopRequest
from ltrain.train.summary import Summary, conclude


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
    summary: Summary | None = None


def train(config: Config) -> Outcome:
    """Train, or go on training, the run that `config` describes, all its stages. Called by every rank.

    Returns what the last stage leaves.
    """
    with started(config) as device, StopRequest() as stop:
        return train_stages(config, device, stop)


def train_stages(config: Config, device: torch.device, stop: StopRequest) -> Outcome:
    """`train` on ranks that are joined. Each stage has its own groups, and its model is gone before the next one's is built."""
    summaries: list[Summary] = []
    todo = unfinished(config, device)
    for stage in todo:
        fp8.refuse(stage, device)
    outcome = Outcome(config.train.steps, [], None, None, stopped=False)
    for stage in todo:
        mesh = ranks.Mesh(stage.parallel, device)
        try:
            if any(mesh.all_gather_object(stop.raised)):  # between two stages
                outcome = Outcome(0, [], None, None, stopped=True)
                break
            run = Run(stage, mesh, stop)
            outcome = run.train()
            run.close()
            if outcome.summary:
                summaries.append(outcome.summary)
            if mesh.rank == 0 and summaries and (outcome.stopped or stage is todo[-1]):
                conclude(config, summaries)
            mesh.barrier()
        finally:
            mesh.close()
        del run
        ranks.free_memory()
        if outcome.stopped:
            break
    return outcome


class Run:
    def __init__(self, config: Config, mesh: ranks.Mesh, stop: StopRequest):
        self.config, self.mesh, self.stop = config, mesh, stop
        self.dir = Path(config.run.dir)
        begin = start.find(config, mesh, self._say)
        self.start, self.tokens_seen, self.damaged = begin.step, begin.tokens, begin.damaged
        self.optimizer_step = begin.optimizer_step or 0
        self.checkpoint = begin.checkpoint.path if begin.checkpoint else self.dir
        self.origin, self.carried = begin.origin, begin.carried
        self.eval_loss: float | None = None
        if self.finished:
            return
        self._say(f"run {self.dir}: {mesh.size} rank(s) on {mesh.device.type}, {begin}")
        self.feed = Feed(config, mesh, begin.loader, begin.tokenizer)
        self.engine = mesh.agree(lambda: build_engine(config, self.feed.vocab, mesh))
        if begin.checkpoint:
            checkpoint = begin.checkpoint
            mesh.agree(lambda: self.engine.load(checkpoint, begin.optimizer_step))
            checkpoint.close()
        self.saver = Saver(self.dir / "checkpoints", mesh, config.checkpoint.keep, config.checkpoint.asynchronous)
        self.track: Tracker | None = None

    @property
    def finished(self) -> bool:
        return self.start >= self.config.train.steps

    def close(self) -> None:
        """Let go of the model and the data."""
        if not self.finished:
            self.feed.close()
            self.engine.close()

    def _say(self, line: str) -> None:
        if self.mesh.rank == 0:
            print(line, file=sys.stderr, flush=True)

    # Steps

    def train(self) -> Outcome:
        config, mesh = self.config, self.mesh
        if self.finished:
            self._say(f"{self.dir} has done {self.start} steps already: write train.steps={2 * self.start} to go on")
            return Outcome(self.start, [], None, None, stopped=False)
        # read before the first step: what is wrong with it must not come to light after the last one
        held_out = self.feed.held_out()
        entropy = held_out.unigram_entropy
        self.evaluation = Evaluation(config, self.feed.dataset, mesh)
        self._keep_config()
        track = self.track = Tracker.start(config, self._parameters(), self.start or None) if mesh.rank == 0 else None
        if track and self.damaged:
            track.log({"checkpoint/damaged": float(self.damaged)}, self.start)
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
                self.optimizer_step += 1
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
                else:
                    self._saved(self.saver.poll())
                if not stopped and self.evaluation.due(step, last):
                    self._evaluate(step, last, progress)
                began = time.perf_counter()
            self._saved(*self.saver.wait())
            stopped = step < config.train.steps
            status = "KILLED" if stopped else "FINISHED"
        except (NonFiniteLoss, ValueError):
            # raised on all ranks alike: the save under way is still worth its end
            with suppress(CheckpointError):
                self._saved(*self.saver.wait())
            raise
        finally:
            gc.unfreeze()
            if progress:
                progress.close()
            self.feed.close()
            if track:
                track.close(status)
        if stopped:
            self._say(f"stopped by SIGTERM after step {step}, which is saved: the same command with run.resume=true goes on from there")
        summary = Summary(config, mesh.size, step, losses[0], losses[-1], self.eval_loss, entropy, self.checkpoint)
        return Outcome(step, losses, self.eval_loss, entropy, stopped, summary)

    def _evaluate(self, step: int, last: bool, progress: Progress | None) -> None:
        """Recall and loss by position, kept in the run's folder and with the MLflow run."""
        folder = self.dir / "eval" / f"step-{step:06}"
        report = self.evaluation.run(self.engine.stage, step, last, folder, {"run": str(self.dir)})
        if self.track:
            self.track.log(report.metrics(), step)
            self.track.artifact(folder)
        if progress:
            for line in report.table():
                progress.note(line)

    def _keep_config(self) -> None:
        """Beside the checkpoints, once the run is known to work: what resumes it."""
        if self.mesh.rank == 0:
            keep_config(self.config)

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
        meta: dict[str, Any] = {"step": step, "optimizer_step": self.optimizer_step, "tokens": self.tokens_seen, "vocab": self.feed.vocab}
        meta |= {"loader": self.feed.state(), "layout": to_dict(self.config)["parallel"], "ranks": self.mesh.size}
        if self.origin:
            meta["origin"] = self.origin
        with tempfile.TemporaryDirectory() as folder:
            self.feed.tokenizer.save(folder)
            files = self.carried | {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        files["config.yaml"] = to_yaml(self.config).encode()
        self._saved(*self.saver.save(step, self.engine.state(), meta, files))

    def _saved(self, *complete: Saved | None) -> None:
        for saved in filter(None, complete):
            self.checkpoint = saved.path
            if self.track:
                self.track.log({"checkpoint/seconds": saved.seconds, "checkpoint/blocked_seconds": saved.blocked_seconds}, saved.step)

    def _parameters(self) -> dict[str, Any]:
        feed = self.feed
        total, active = self.engine.num_params
        return {"ranks": self.mesh.size, "vocab": feed.vocab, "tokenizer": feed.tokenizer.fingerprint, "params_total": total, "params_active": active}
