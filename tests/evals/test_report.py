"""What an evaluation leaves: numbers by hand, JSON read back, pictures opened."""

import json
import math
from pathlib import Path

import pytest

from ltrain.evals import plots
from ltrain.evals.needles import Place, Result
from ltrain.evals.positions import Bucket
from ltrain.evals.report import Report


def report() -> Report:
    """At 512 tokens all right, at 1024 only the needles at the end; two depths, two samples in each cell but one."""
    results = [Result(Place("passkey", 512, n % 2, n), True, 0.25) for n in range(4)]
    results += [Result(Place("passkey", 1024, n % 2, n), n % 2 == 1, 2.0 - n) for n in range(3)]
    buckets = [Bucket(0, 128, 100, 2.0), Bucket(128, 256, 50, 1.5), Bucket(256, 512, 0, math.nan)]
    return Report(7, results, [0.0, 1.0], buckets, (64, 1000, math.log(8)))


def test_metrics_have_a_name_for_each_number() -> None:
    metrics = report().metrics()
    assert metrics == {
        "eval/passkey/512": 1.0,
        "eval/passkey_loss/512": 0.25,
        "eval/passkey/1024": pytest.approx(1 / 3),
        "eval/passkey_loss/1024": 1.0,
        "eval/loss_by_position/0-127": 2.0,
        "eval/loss_by_position/128-255": 1.5,
        "eval/short_loss": math.log(8),
    }


def test_the_table_shows_them() -> None:
    table = report().table()
    assert table[1].split() == ["passkey", "512", "4", "1.000", "0.510..1.000", "1.00", "0.250"]
    assert table[2].split() == ["passkey", "1024", "3", "0.333", "0.061..0.792", "0.00", "1.000"]
    assert table[4].split() == ["0-127", "100", "2.0000", "7.389"] and table[6].split() == ["256-511", "0"]
    assert "perplexity 8.000 over 1000 tokens" in table[7]


def test_files_are_written_and_pictures_open(tmp_path: Path) -> None:
    from PIL import Image

    report().write(tmp_path / "eval", {"seed": 3})
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"needles.json", "needles.png", "positions.json", "positions.png"}
    found = json.loads((tmp_path / "eval" / "needles.json").read_text())
    assert (found["step"], found["seed"]) == (7, 3)
    row = found["tasks"]["passkey"]["1024"]
    assert (row["samples"], row["right"], [cell["depth"] for cell in row["by_depth"]]) == (3, 1, [0.0, 1.0])
    assert [(cell["samples"], cell["right"]) for cell in row["by_depth"]] == [(2, 0), (1, 1)]
    found = json.loads((tmp_path / "eval" / "positions.json").read_text())
    assert found["buckets"][2] == {"start": 256, "stop": 512, "tokens": 0, "loss": None}
    assert found["short"] == {"length": 64, "tokens": 1000, "loss": math.log(8)}
    with Image.open(tmp_path / "eval" / "positions.png") as image:
        image.load()
        assert image.size == (round(6.4 * plots.DPI), 4 * plots.DPI)
    with Image.open(tmp_path / "eval" / "needles.png") as image:
        pixels = image.convert("RGB")
        colours = pixels.getcolors(pixels.width * pixels.height) or []
    # three cells of the four are all right and one all wrong, beside the colour bar
    areas = {colour: count for count, colour in colours}
    green, red = areas[(0, 104, 55)], areas[(165, 0, 38)]
    assert 2.5 < green / red < 3.5


def test_what_was_not_asked_for_leaves_no_file(tmp_path: Path) -> None:
    Report(1).write(tmp_path / "eval", {})
    assert not list((tmp_path / "eval").iterdir()) and Report(1).table() == [] and Report(1).metrics() == {}
