"""The same evaluation inside training, by `ltrain eval`, and over ranks: the same numbers."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ltrain.config import Config, ConfigError, FP8Config, NeedleConfig, ParallelConfig, TrackingConfig, load, to_yaml
from tests.train.runs import metrics, small

NEEDLES = NeedleConfig(tasks=["passkey", "multi_key"], lengths=[768, 1024], depths=3, samples=4, every=2)
WORDS = ["--tasks", "passkey,multi_key", "--lengths", "768,1024", "--depths", "3", "--samples", "4"]


def ltrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ltrain", *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that is evaluated after the second and the last, with MLflow."""
    tmp = tmp_path_factory.mktemp("evaluated")
    config = small(tmp, steps=4, eval__needles=NEEDLES, eval__positions=200, eval__short_length=64, tracking=TrackingConfig())
    (tmp / "config.yaml").write_text(to_yaml(config))
    done = ltrain("train", str(tmp / "config.yaml"))
    assert done.returncode == 0, done.stderr
    return Path(config.run.dir)


def read(folder: Path) -> dict[str, Any]:
    """The numbers of both files, without how they were measured."""
    one, two = (json.loads((folder / name).read_text()) for name in ("needles.json", "positions.json"))
    return {"step": one["step"], "tasks": one["tasks"], "buckets": two["buckets"], "short": two["short"]}


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two files say something else; losses are compared within what float32 leaves of them."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{at}/{i}")]
    same = a == pytest.approx(b, rel=1e-5) if isinstance(a, float) and isinstance(b, float) else a == b
    return [] if same else [f"{at}: {a} and {b}"]


def test_training_leaves_numbers_pictures_and_artifacts(run: Path) -> None:
    files = {"needles.json", "needles.png", "positions.json", "positions.png"}
    assert {p.name for p in (run / "eval" / "step-000004").iterdir()} == files
    assert {p.name for p in (run / "eval" / "step-000002").iterdir()} == {"needles.json", "needles.png"}  # positions go by eval.every
    found = read(run / "eval" / "step-000004")
    rows = {row["step"]: row for row in metrics(run) if "eval/passkey/768" in row}
    assert set(rows) == {2, 4}
    for task in NEEDLES.tasks:
        for length in NEEDLES.lengths:
            assert rows[4][f"eval/{task}/{length}"] == found["tasks"][task][str(length)]["accuracy"]
            assert rows[4][f"eval/{task}_loss/{length}"] == found["tasks"][task][str(length)]["loss"]
            # four samples over three depths: the first depth has two
            assert [cell["samples"] for cell in found["tasks"][task][str(length)]["by_depth"]] == [2, 1, 1]
    assert rows[4]["eval/loss_by_position/128-199"] == found["buckets"][1]["loss"]
    assert rows[4]["eval/short_loss"] == found["short"]["loss"]
    kept = [p.relative_to(run / "artifacts").parts[2:] for p in (run / "artifacts").rglob("*.png")]
    assert sorted(kept) == [("step-000002", "needles.png"), ("step-000004", "needles.png"), ("step-000004", "positions.png")]


def test_the_verb_finds_the_same(run: Path, tmp_path: Path) -> None:
    done = ltrain("eval", str(run), *WORDS, "--out", str(tmp_path / "out"), "eval.positions=200")
    assert done.returncode == 0, done.stderr
    assert not differences(read(tmp_path / "out"), read(run / "eval" / "step-000004"))
    assert re.search(r"^passkey +768 +4 ", done.stdout, re.MULTILINE) and "of " in done.stderr
    about = json.loads((tmp_path / "out" / "needles.json").read_text())
    assert about["checkpoint"].endswith("step-00000004") and about["command"].startswith("ltrain eval ") and about["device"] and about["seed"] == 0


def test_the_config_of_a_damaged_checkpoint_is_not_used(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "run/checkpoints")
    older, newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-2:]
    text = (newest / "config.yaml").read_text()
    timeout = re.search(r"timeout: \d+", text)
    assert timeout and "depth: 2" in text
    for damaged, complaint in (
        (text.replace("depth: 2", "depth: 1", 1), ""),
        (text.replace(timeout[0], timeout[0][:-1] + "9", 1), f"write ltrain eval {older}"),
        ("model: [", ""),  # cut short: not even read
    ):
        (newest / "config.yaml").write_text(damaged)
        done = ltrain("eval", str(tmp_path / "run"), *WORDS, "eval.positions=200", "--out", str(tmp_path / "out"))
        assert "is damaged" in done.stderr, done.stderr
        assert (done.returncode, complaint in done.stderr) == (2 if complaint else 0, True), done.stderr
    in_training = json.loads((run / "eval" / "step-000002" / "needles.json").read_text())
    assert not differences(read(tmp_path / "out")["tasks"], in_training["tasks"])


def on_rank(checkpoint: Path, out: Path, words: list[str]) -> None:
    """`ltrain eval` on this rank of a pool, whose own process group stays."""
    import unittest.mock

    from ltrain.evals.command import Request, main
    from ltrain.parallel import mesh

    with unittest.mock.patch.object(mesh, "stop", lambda: None):
        main(Request(str(checkpoint), ["data.workers=0", *words], NEEDLES.tasks, NEEDLES.lengths, NEEDLES.samples, NEEDLES.depths, str(out)))


LAYOUTS = [["parallel.tensor=2", "parallel.context=2", "parallel.expert=4"], ["parallel.context=2"], ["parallel.pipeline=2", "parallel.tensor=2"]]


@pytest.mark.parametrize("words", LAYOUTS, ids=" ".join)
def test_every_layout_finds_the_same(pool: Any, run: Path, tmp_path: Path, words: list[str]) -> None:
    pool(4).run(on_rank, run, tmp_path / "out", ["eval.positions=200", *words], timeout=120)
    assert not differences(read(tmp_path / "out"), read(run / "eval" / "step-000004"))


def test_an_evaluation_has_the_runs_layout_where_it_fits_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.evals.command import Request, configure

    layout = ParallelConfig(tensor=2, context=2, ulysses=2, wire="fp8", context_layout="contiguous")
    config = small(tmp_path, parallel=layout, precision="bf16", fp8=FP8Config(recipe="delayed", bf16_first=1))
    config.model.layers["full"] |= {"heads": 4, "kv_heads": 4}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    alone = ParallelConfig(context_layout="contiguous")
    for ranks, words, expected in (
        ("1", [], alone),
        ("2", [], alone),
        ("4", [], layout),
        ("8", ["parallel.timeout=60"], dataclasses.replace(layout, timeout=60)),
        ("4", ["parallel.context=4"], dataclasses.replace(alone, context=4)),
    ):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        found = configure(Request("", words, ["passkey"], [512], 2, 2, ""), tmp_path)
        assert found.parallel == expected, (ranks, words)
        assert found.fp8 == FP8Config()  # evaluation is in bf16, on machines without FP8 too


def test_another_seed_makes_other_prompts(pool: Any, run: Path, tmp_path: Path) -> None:
    pool(1).run(on_rank, run, tmp_path / "out", ["eval.positions=0", "seed=1"])
    other, same = read(tmp_path / "out"), read(run / "eval" / "step-000004")
    assert other["tasks"]["passkey"]["768"]["loss"] != pytest.approx(same["tasks"]["passkey"]["768"]["loss"], rel=1e-5)
    assert other["short"] == same["short"] and not other["buckets"]


def test_positions_can_be_stretched_for_an_evaluation(pool: Any, run: Path, tmp_path: Path) -> None:
    yarn = "model.layers.full.rope={scaling: yarn, factor: 8.0, original_length: 128}"
    pool(1).run(on_rank, run, tmp_path / "out", ["eval.positions=0", yarn])
    stretched, same = read(tmp_path / "out"), read(run / "eval" / "step-000004")
    assert stretched["short"]["loss"] != pytest.approx(same["short"]["loss"], rel=1e-5)
    assert stretched["short"]["tokens"] == same["short"]["tokens"]
    about = json.loads((tmp_path / "out" / "needles.json").read_text())
    assert about["rope"]["full"]["scaling"] == "yarn" and about["rope"]["full"]["factor"] == 8


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    done = ltrain("eval", str(run), "--tasks", "passkeys")
    assert done.returncode == 2 and "passkeys" in done.stderr and "Traceback" not in done.stderr
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(Config()))
    for words, message in (
        (["eval.needles.samples=3"], "eval.needles.samples=3 has no effect"),
        (["eval.needles.tasks=[passkey,passkey]"], "each once"),
        (["eval.needles.tasks=[passkey]", "eval.needles.depths=12"], "from 1 to 11"),
        (["eval.needles.tasks=[passkey]", "eval.needles.lengths=[100]"], "at least 256"),
        (["eval.documents=3"], "eval.documents=3 has no effect"),
        (["engine=deepspeed", "deepspeed.zero=3", "eval.positions=4096"], "deepspeed.zero=3 does not keep"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(path, words)
