"""What an evaluation found, as metrics, as a table, and as the files of a folder."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltrain.evals.needles import Cell, Result
from ltrain.evals.positions import Bucket


@dataclass
class Report:
    """Of one model at one step."""

    step: int
    results: list[Result] = field(default_factory=list)  # of the needle tests
    depths: list[float] = field(default_factory=list)  # of the rows of their grid
    buckets: list[Bucket] = field(default_factory=list)  # of the loss by position
    short: tuple[int, int, float] | None = None  # short-context loss: length of the pieces, their tokens, nats per token

    def rows(self) -> dict[str, dict[int, Cell]]:
        """task -> length -> all depths together."""
        return {task: {length: Cell.of(found) for length, found in lengths.items()} for task, lengths in self._by_length().items()}

    def cells(self) -> dict[str, dict[int, list[Cell]]]:
        """task -> length -> the cell of each depth."""
        return {
            task: {
                length: [Cell.of([r for r in found if r.place.depth == depth]) for depth in range(len(self.depths))]
                for length, found in lengths.items()
            }
            for task, lengths in self._by_length().items()
        }

    def _by_length(self) -> dict[str, dict[int, list[Result]]]:
        found: dict[str, dict[int, list[Result]]] = {}
        for result in self.results:
            found.setdefault(result.place.task, {}).setdefault(result.place.length, []).append(result)
        return found

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl and MLflow: exact match and answer loss by task and length, loss by position, short-context loss."""
        found: dict[str, float] = {}
        for task, lengths in self.rows().items():
            for length, cell in lengths.items():
                found[f"eval/{task}/{length}"] = cell.accuracy
                found[f"eval/{task}_loss/{length}"] = cell.loss
        found |= {f"eval/loss_by_position/{b.name}": b.loss for b in self.buckets if b.tokens}
        if self.short:
            found["eval/short_loss"] = self.short[2]
        return found

    def table(self) -> list[str]:
        """For a terminal."""
        lines: list[str] = []
        if self.results:
            lines.append(f"{'task':12} {'tokens':>8} {'samples':>8} {'exact':>7} {'95% interval':>15} {'worst depth':>12} {'answer loss':>12}")
        cells = self.cells()
        for task, lengths in self.rows().items():
            for length, cell in lengths.items():
                low, high = cell.interval
                worst = min(c.accuracy for c in cells[task][length] if c.samples)
                interval = f"{low:.3f}..{high:.3f}"
                lines.append(f"{task:12} {length:8} {cell.samples:8} {cell.accuracy:7.3f} {interval:>15} {worst:12.2f} {cell.loss:12.3f}")
        if self.buckets:
            lines.append(f"{'positions':>15} {'tokens':>10} {'loss':>8} {'perplexity':>11}")
        for b in self.buckets:
            lines.append(f"{b.name:>15} {b.tokens:10} {b.loss:8.4f} {math.exp(b.loss):11.3f}" if b.tokens else f"{b.name:>15} {0:10}")
        if self.short:
            length, tokens, loss = self.short
            lines.append(f"held-out documents in pieces of {length} tokens: loss {loss:.4f}, perplexity {math.exp(loss):.3f} over {tokens} tokens")
        return lines

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """needles.json and needles.png, positions.json and positions.png, as far as there is something for them.

        about: how this was measured, at the top of each JSON file.
        """
        from ltrain.evals import plots

        folder.mkdir(parents=True, exist_ok=True)
        about = {"step": self.step, **about}
        title = f"step {self.step}"
        if self.results:
            cells, tasks = self.cells(), {}
            for task, lengths in self.rows().items():
                tasks[task] = {
                    str(n): {**_plain(cell), "by_depth": [{"depth": d} | _plain(c) for d, c in zip(self.depths, cells[task][n], strict=True)]}
                    for n, cell in lengths.items()
                }
            _write_json(folder / "needles.json", {**about, "tasks": tasks})
            plots.heat_map(cells, self.depths, title, folder / "needles.png")
        if self.buckets or self.short:
            short = dict(zip(("length", "tokens", "loss"), self.short, strict=True)) if self.short else None
            buckets = [{"start": b.start, "stop": b.stop, "tokens": b.tokens, "loss": _number(b.loss)} for b in self.buckets]
            _write_json(folder / "positions.json", {**about, "buckets": buckets, "short": short})
        if self.buckets:
            plots.curve(self.buckets, title, folder / "positions.png")


def _plain(cell: Cell) -> dict[str, Any]:
    return {"samples": cell.samples, "right": cell.right, "accuracy": _number(cell.accuracy), "wilson_95": cell.interval, "loss": _number(cell.loss)}


def _number(value: float) -> float | None:
    """JSON has no NaN: null."""
    return value if math.isfinite(value) else None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)
