"""The pictures of an evaluation: recall over length and depth, and loss over the position in the document."""

from pathlib import Path
from typing import TYPE_CHECKING

from ltrain.evals.needles import Cell
from ltrain.evals.positions import Bucket

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def _figure(width: float, height: float) -> "Figure":
    """Inches. Drawn by Agg, without pyplot's state or any display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(cells: dict[str, dict[int, list[Cell]]], depths: list[float], title: str, path: Path) -> None:
    """cells: task -> length -> the cells by depth; depths: from 0 to 1. One panel for each task: lengths across, depths down,
    accuracy as colour and number."""
    widest = max(len(lengths) for lengths in cells.values())
    rows = len(depths)
    figure = _figure(len(cells) * max(2.6, 0.62 * widest + 1.2) + 0.6, 0.32 * rows + 1.6)
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for axis, (task, lengths) in zip(axes, cells.items(), strict=True):
        table = [[column[row].accuracy for column in lengths.values()] for row in range(rows)]
        image = axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
        axis.set_yticks(range(rows), [f"{depth:.0%}" for depth in depths])
        axis.set(xlabel="tokens", title=task)
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if value == value:  # no sample: NaN
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(axes), label="exact match")
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def curve(buckets: list[Bucket], title: str, path: Path) -> None:
    """Mean loss of each bucket over the position, with the number of tokens behind it as bars."""
    figure = _figure(6.4, 4.0)
    axis = figure.subplots()
    kept = [b for b in buckets if b.tokens]
    counts = axis.twinx()
    left = [max(b.start, b.stop / 2) for b in kept]
    counts.bar(left, [b.tokens for b in kept], [b.stop - x for b, x in zip(kept, left, strict=True)], align="edge", color="0.88", edgecolor="white")
    counts.set(ylabel="tokens", yscale="log")
    axis.set_zorder(counts.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.plot([(max(b.start, b.stop / 2) * b.stop) ** 0.5 for b in kept], [b.loss for b in kept], marker="o", color="tab:blue")
    axis.set(xscale="log", xlabel="position in the document", ylabel="loss, nats per token", title=title)
    axis.set_xticks([b.stop for b in buckets], [_tokens(b.stop) for b in buckets], minor=False)
    axis.minorticks_off()
    _save(figure, path)


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)


def _save(figure: "Figure", path: Path) -> None:
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format="png")
    part.replace(path)
