"""`ltrain bench fp8` where there is no FP8: the run in bf16 for real, and the comparison on numbers that are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.cli import main
from ltrain.config import ConfigError, to_yaml
from ltrain.plan import fp8
from tests.train.runs import small


def test_the_run_in_bf16_is_written_with_its_curve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small(tmp_path, steps=50, precision="bf16")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    main(["bench", "fp8", str(tmp_path / "config.yaml"), "--steps", "3", "--recipes", "none", "--seeds", "2"])
    folder = Path(config.run.dir)
    result, other = json.loads((folder / "bench-fp8.json").read_text())["none"]
    assert 0 < abs(result["losses"][0] - other["losses"][0]) < 1  # another seed
    assert len(result["losses"]) == 3 and result["losses"][2] < result["losses"][0] < 8
    assert result["final_loss"] == pytest.approx(sum(result["losses"]) / 3)
    assert result["seconds_per_step"] > 0 and result["peak_memory_bytes"] > 2**20
    assert (folder / "bench-fp8.png").read_bytes().startswith(b"\x89PNG")
    assert f"{(result['final_loss'] + other['final_loss']) / 2:.4f}" in capfd.readouterr().out


def test_every_run_differs_in_the_recipe_alone(tmp_path: Path) -> None:
    config = small(tmp_path, precision="bf16", device="auto")
    config.fp8.recipe, config.fp8.bf16_first, config.fp8.amax_history = "delayed", 1, 16
    made = {recipe: fp8.variant(config, recipe, 7) for recipe in ("none", "delayed", "current")}
    assert [(c.fp8.recipe, c.fp8.bf16_first, c.fp8.amax_history) for c in made.values()] == [
        ("none", 0, 1024),
        ("delayed", 1, 16),
        ("current", 1, 1024),
    ]
    for c in made.values():
        c.fp8 = made["none"].fp8
        assert c == made["none"] and c.train.steps == 7


def test_the_table_compares_with_bf16(tmp_path: Path) -> None:
    def result(loss: float, seconds: float, gigabytes: float) -> dict[str, Any]:
        return {"final_loss": loss, "seconds_per_step": seconds, "peak_memory_bytes": gigabytes * 2**30, "losses": [4.0, loss]}

    results = {"none": [result(2.0, 0.1, 8)], "current": [result(2.01, 0.075, 6)]}
    half, current = fp8.table(results).splitlines()[1:]
    assert half.split() == ["bf16", "2.0000", "+0.00%", "100.0", "+0.00%", "8.00", "+0.00%"]
    assert current.split() == ["current", "2.0100", "+0.50%", "75.0", "-25.00%", "6.00", "-25.00%"]
    results["none"].append(result(3.0, 0.1, 8))
    results["current"].append(result(2.991, 0.075, 6))  # 0.3% below its own bf16
    assert fp8.table(results).splitlines()[2].split()[:5] == ["current", "2.5005", "+0.10%", "+-", "0.40%"]
    fp8.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("recipes", [["current"], ["none", "none"]])
def test_recipes_that_compare_nothing_are_refused(tmp_path: Path, recipes: list[str]) -> None:
    with pytest.raises(ConfigError, match="none among them"):
        fp8.compare(small(tmp_path, precision="bf16"), recipes, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = small(tmp_path, precision="bf16")
    with pytest.raises(ConfigError, match=r"fp8.recipe=blockwise needs an NVIDIA GPU"):
        fp8.compare(config, ["none", "blockwise"], 3)
    assert not Path(config.run.dir).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_settings_of_fp8_need_no_recipe_beside_the_recipes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(small(tmp_path, precision="bf16")))
    with pytest.raises(SystemExit):
        main(["bench", "fp8", str(tmp_path / "config.yaml"), "--recipes", "none,blockwise", "fp8.bf16_first=1"])
    assert "fp8.recipe=blockwise needs" in capfd.readouterr().err
