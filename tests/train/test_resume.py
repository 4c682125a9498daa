"""A run that is killed and resumed is the run that was not killed, bit for bit."""

import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.checkpoint import Checkpoint, Entry, LocalCollectives, newest_whole, save
from ltrain.config import Config
from tests.train.runs import metrics, small, start

# each is one more part of a run to wait for: six for a quick look, LTRAIN_TEST_KILLS=20 before a release
KILLS = int(os.environ.get("LTRAIN_TEST_KILLS", "6"))


def finish(config: Config, log: Path, timeout: float = 120) -> None:
    process = start(config, log)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        pytest.fail(f"the run did not end in {timeout} s:\n{log.read_text()}")
    assert process.exitcode == 0, log.read_text()


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in metrics(run) if "train/loss" in row]


def states(run: Path) -> dict[tuple[str, str], Any]:
    path, warnings = newest_whole(run / "checkpoints")
    assert path is not None and not warnings
    with Checkpoint(path) as checkpoint:
        return {(kind, name): checkpoint.read(name, kind) for kind in checkpoint.kinds for name in checkpoint.names(kind)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody kills, and how long it takes."""
    tmp = tmp_path_factory.mktemp("whole")
    finish(small(tmp, "first", steps=2), tmp / "log")  # the fork server's imports are not the run's time
    began = time.monotonic()
    finish(small(tmp), tmp / "log")
    return tmp / "run", time.monotonic() - began


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    found, expected = states(run), states(whole)
    assert found.keys() == expected.keys()
    assert {kind for kind, _ in found} == {"param", "exp_avg", "exp_avg_sq", "buffer"}
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_killed_at_random_moments(tmp_path: Path, whole: tuple[Path, float]) -> None:
    """SIGKILL again and again, inside writes included (a checkpoint every second step), until the run gets through."""
    expected, duration = whole
    config = small(tmp_path, run__resume=True)
    moments = random.Random(1)
    killed = 0
    while killed < KILLS:
        process = start(config, tmp_path / "log")
        process.join(moments.uniform(0.3, 1.0) * duration)
        if not process.is_alive():
            assert process.exitcode == 0, (tmp_path / "log").read_text()
            assert_same(tmp_path / "run", expected)
            shutil.rmtree(tmp_path / "run")  # it came through: again from the start
            continue
        process.kill()
        process.join()
        killed += 1
    finish(config, tmp_path / "log")
    assert_same(tmp_path / "run", expected)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, whole: tuple[Path, float]) -> None:
    """The kill comes as soon as the temporary folder of a save is there."""
    expected, _ = whole
    config = small(tmp_path, run__resume=True)
    process = start(config, tmp_path / "log")
    folder = tmp_path / "run" / "checkpoints"
    while process.is_alive() and not any(folder.glob(".tmp*/*")):
        time.sleep(0.0005)
    process.kill()
    process.join()
    finish(config, tmp_path / "log")
    assert_same(tmp_path / "run", expected)


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(tmp_path: Path, whole: tuple[Path, float]) -> None:
    """The run goes on from the one before, says so, and ends where it would have ended."""
    expected, _ = whole
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    shard = run / "checkpoints" / "step-00000012" / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    finish(small(tmp_path, run__resume=True), tmp_path / "log")
    (warning,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("warning: ")]
    assert "step-00000012 is damaged" in warning and warning.endswith("; going on from step-00000010")
    assert [(row["step"], row["checkpoint/damaged"]) for row in metrics(run) if "checkpoint/damaged" in row] == [(10, 1.0)]
    assert_same(run, expected)


def test_how_long_saves_take_is_logged(whole: tuple[Path, float]) -> None:
    rows = {row["step"]: row for row in metrics(whole[0]) if "checkpoint/seconds" in row}
    assert sorted(rows) == [2, 4, 6, 8, 10, 12]
    assert all(0 < row["checkpoint/blocked_seconds"] <= row["checkpoint/seconds"] for row in rows.values())


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, whole: tuple[Path, float]) -> None:
    expected, _ = whole
    config = small(tmp_path, run__resume=True, checkpoint__every=0)
    process = start(config, tmp_path / "log")
    rows = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and (not rows.exists() or rows.read_text().count("\n") < 3):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert "stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert newest_whole(tmp_path / "run" / "checkpoints")[0] is not None
    finish(config, tmp_path / "log")
    assert_same(tmp_path / "run", expected)


def test_workers_do_not_change_the_run(tmp_path: Path, whole: tuple[Path, float]) -> None:
    expected, _ = whole
    finish(small(tmp_path, data__workers=2), tmp_path / "log")
    assert_same(tmp_path / "run", expected)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = small(tmp_path, steps=2)
    finish(config, tmp_path / "log")
    before = states(tmp_path / "run")
    process = start(config, tmp_path / "log")
    process.join(60)
    assert process.exitcode == 1
    assert "add run.resume=true" in (tmp_path / "log").read_text()
    after = states(tmp_path / "run")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """An absurd learning rate: the first step is fine, its update is not, and the last checkpoint stays."""
    config = small(tmp_path, train__lr=1e38, train__min_lr=1e38, train__clip=0.0, train__warmup_steps=0, checkpoint__every=1)
    text = failure(config, tmp_path / "log")
    assert "NonFiniteLoss: the loss is nan at step 2;" in text
    report = text[text.index("NonFiniteLoss: ") :]
    assert report.count("first non-finite output: layer 0;") == 2  # both micro-batches of the step, and their documents
    assert re.search(r"rank 0:\n  micro-batch 2 of \S+\d\d\.txt\n", report) and re.search(r"\n  micro-batch 3 of \S+\d\d\.txt", report)
    path, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert path is not None and path.name == "step-00000001"


def test_the_layer_where_a_number_stops_being_finite_is_named(tmp_path: Path) -> None:
    """A weight of layer 1 is infinite: layer 0 is not suspected."""
    finish(small(tmp_path, steps=2), tmp_path / "log")
    folder = tmp_path / "run" / "checkpoints"
    path = folder / "step-00000002"
    with Checkpoint(path) as checkpoint:
        meta = checkpoint.meta
        changed = [(kind, name, checkpoint.read(name, kind)) for kind in checkpoint.kinds for name in checkpoint.names(kind)]
    files = {name: (path / name).read_bytes() for name in ("config.yaml", "tokenizer.json") if (path / name).exists()}
    shutil.rmtree(path)
    for kind, name, tensor in changed:
        if (kind, name) == ("param", "layers.1.ffn_norm.weight"):
            tensor[3] = float("inf")
    entries = [Entry(name, kind, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for kind, name, tensor in changed]
    save(folder, 2, entries, meta, LocalCollectives(), files=files)
    text = failure(small(tmp_path, run__resume=True), tmp_path / "log")
    report = text[text.index("NonFiniteLoss: ") :]
    assert report.startswith("NonFiniteLoss: the loss is nan at step 3;")
    assert report.count("first non-finite output: layer 1; root mean squares: layer 0 ") == 2
    assert all(math.isfinite(float(norm)) for norm in re.findall(r"layer 0 ([^,\s]+)", report))
    assert newest_whole(folder)[0] == path  # nothing was saved after it


def failure(config: Config, log: Path) -> str:
    """What a run says that must fail."""
    process = start(config, log)
    process.join(60)
    assert process.exitcode == 1, log.read_text()
    return log.read_text()
