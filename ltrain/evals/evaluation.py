"""The long-context evaluation that a config's `eval` asks for: inside training at its steps, and by `ltrain eval`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltrain.config import Config
from ltrain.data import Dataset
from ltrain.data.synthetic import held_out_depths
from ltrain.evals import needles, positions
from ltrain.evals.prompts import Prompts
from ltrain.evals.report import Report
from ltrain.parallel.inference import Inference
from ltrain.parallel.mesh import Mesh
from ltrain.plan.hardware import device_name

if TYPE_CHECKING:
    from ltrain.parallel.pipeline import Stage


def silent(done: int, total: int) -> None:
    pass


class Evaluation:
    """Needle tests, loss by position and short-context loss of whatever model it is given.

    Made, and run, by all ranks. The prompts and documents depend on the config alone, not on the ranks or the step; documents and
    one prompt of each kind are made here, so that what is wrong with them does not come to light after training.

    Raises:
        ValueError: nothing is held out, or a prompt is too short for its needles.
    """

    def __init__(self, config: Config, dataset: Dataset, mesh: Mesh):
        self.config, self.dataset, self.mesh = config, dataset, mesh
        options = config.eval
        self._long, self._short = self._read() if options.positions or options.short_length else ([], [])
        self._work = needles.groups(options.needles, max(config.data.tokens, *options.needles.lengths)) if options.needles.tasks else []
        self._prompts: Prompts | None = mesh.agree(self._open) if self._work else None  # of the first rank of each data replica

    def due(self, step: int, last: bool) -> bool:
        return bool(self._parts(step, last))

    def _parts(self, step: int, last: bool) -> list[str]:
        """needles, positions: what is to be done after this step."""
        options = self.config.eval
        wanted = {"needles": bool(options.needles.tasks), "positions": bool(options.positions or options.short_length)}
        every = {"needles": options.needles.every, "positions": options.every}
        return [part for part in wanted if wanted[part] and (last or (every[part] > 0 and step % every[part] == 0))]

    def run(
        self, stage: "Stage", step: int, last: bool, folder: Path, about: dict[str, Any], progress: Callable[[int, int], None] = silent
    ) -> Report:
        """Evaluate the model; rank 0 writes the files of `Report.write` to `folder`.

        about: what the JSON files say beside seed, device and layout. progress: of the needle tests, groups done and all of them.
        """
        training = stage.training
        stage.eval()
        try:
            report = self._report(Inference(stage, self.dataset.tokenizer.vocab_size), step, self._parts(step, last), progress)
        finally:
            stage.train(training)
        mesh = self.mesh
        about = {**about, "seed": self.config.seed, "device": device_name(mesh.device), "ranks": mesh.size, "parallel": vars(self.config.parallel)}
        mesh.agree(lambda: report.write(folder, about) if mesh.rank == 0 else None)
        return report

    def _report(self, inference: Inference, step: int, parts: list[str], progress: Callable[[int, int], None]) -> Report:
        options, mesh = self.config.eval, self.mesh
        report = Report(step)
        if "positions" in parts:
            stream = max(self.config.data.tokens, options.positions)
            if options.positions:
                report.buckets = positions.loss_by_position(inference, mesh, self._long, options.positions, stream)
            if options.short_length:
                buckets = positions.loss_by_position(inference, mesh, self._short, options.short_length, self.config.data.tokens)
                report.short = options.short_length, sum(b.tokens for b in buckets), positions.mean(buckets)
        if "needles" in parts:
            report.depths = self._depths
            report.results = needles.run(inference, mesh, self._work, iter(self._prompts) if self._prompts else None, progress)
        return report

    @property
    def _depths(self) -> list[float]:
        return held_out_depths(self.config.eval.needles.depths)

    def _open(self) -> Prompts | None:
        if self.mesh.replica.rank():
            return None
        prompts = Prompts(needles.share(self._work, self.mesh.data.rank(), self.mesh.data.size()), self.config, self.dataset.tokenizer)
        for places in needles.grid(self.config.eval.needles):
            prompts.at(places[0])
        return prompts

    def _read(self) -> tuple[positions.Documents, positions.Documents]:
        """The held-out documents of both losses, read by rank 0 and known to all."""
        options, data = self.config.eval, self.dataset

        def read() -> tuple[positions.Documents, positions.Documents] | None:
            if self.mesh.rank:
                return None
            long = positions.longest_documents(data.corpus, data.tokenizer, options.positions, options.documents) if options.positions else []
            short = positions.short_pieces(data.corpus, data.tokenizer, options.short_length, options.tokens) if options.short_length else []
            if (options.positions and not long) or (options.short_length and not short):
                raise ValueError("eval.positions and eval.short_length need held-out documents and there are none: raise data.held_out")
            return long, short

        found: tuple[positions.Documents, positions.Documents] = self.mesh.broadcast_object(self.mesh.agree(read))
        return found
