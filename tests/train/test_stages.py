"""Stages trained for real: on any layouts the same, killed and resumed the same bit for bit, one MLflow run with the stages nested in it."""

import gc
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.checkpoint import Checkpoint, newest
from ltrain.config import Config, ParallelConfig
from tests.train.runs import metrics, small, start

STEPS = (4, 5)  # of the two stages
TOLERANCE = 1e-5  # of a loss in nats, between layouts
KILLS = int(os.environ.get("LTRAIN_TEST_KILLS", "4"))
FOLDERS = ("01-short", "02-long")

Layout = dict[str, int]


def staged(tmp: Path, name: str = "run", layouts: tuple[Layout, Layout] = ({}, {}), **changes: Any) -> Config:
    """Two stages: sequences of 128 tokens, then of 256 with another schedule and stretched RoPE."""
    config = small(tmp, name, train__tokens_per_step=512, **changes)
    config.stages = {
        "short": {"train": {"steps": STEPS[0], "schedule": "constant"}, "parallel": layouts[0]},
        "long": {
            "data": {"tokens": 256},
            "train": {"steps": STEPS[1], "lr": 1e-3, "schedule": "wsd", "decay_steps": 3},
            "rope": {"scaling": "yarn", "factor": 2.0, "original_length": 128},
            "parallel": layouts[1],
        },
    }
    return config


def on_ranks(config: Config, stop_in: str = "") -> dict[str, Any]:
    """On every rank of a pool what `ltrain.train.loop.train` does, but the pool's own process group stays.

    stop_in: rank 0 gets SIGTERM in the first step of the stage whose folder has this name.
    """
    from ltrain.config import validate
    from ltrain.model.stack import Stack
    from ltrain.parallel import mesh as ranks
    from ltrain.train import loop
    from ltrain.train.stop import StopRequest

    validate(config, int(os.environ["WORLD_SIZE"]))

    def stacks() -> int:
        return sum(isinstance(thing, Stack) for thing in gc.get_objects())

    alive: list[int] = []
    before = stacks()  # what an earlier test on these ranks has left
    build = loop.build_engine

    def counted(stage: Config, vocab: int, mesh: Any) -> Any:
        alive.append(stacks() - before)
        engine = build(stage, vocab, mesh)
        if mesh.rank == 0 and Path(stage.run.dir).name == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return engine

    loop.build_engine = counted
    try:
        with StopRequest() as stop:
            outcome = loop.train_stages(config, ranks.start(config.device), stop)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        loop.build_engine = build
    return {"step": outcome.step, "losses": outcome.losses, "stopped": outcome.stopped, "alive": alive}


def finish(config: Config, log: Path) -> None:
    process = start(config, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()


def losses(run: Path) -> list[list[float]]:
    return [[row["train/loss"] for row in metrics(run / folder) if "train/loss" in row] for folder in FOLDERS]


def states(stage: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    path = newest(stage / "checkpoints")
    assert path is not None
    with Checkpoint(path) as checkpoint:
        return checkpoint.meta, {(kind, name): checkpoint.read(name, kind) for kind in checkpoint.kinds for name in checkpoint.names(kind)}


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    for folder in FOLDERS:
        (meta, found), (wanted_meta, wanted) = states(run / folder), states(whole / folder)
        assert (meta["step"], meta["optimizer_step"], meta["loader"]) == (wanted_meta["step"], wanted_meta["optimizer_step"], wanted_meta["loader"])
        assert found.keys() == wanted.keys()
        assert not [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Both stages on one rank, which nobody kills, and how long they take."""
    tmp = tmp_path_factory.mktemp("whole")
    finish(small(tmp, "first", steps=2), tmp / "log")  # the fork server's imports are not the run's time
    began = time.monotonic()
    finish(staged(tmp), tmp / "log")
    run, seconds = tmp / "run", time.monotonic() - began
    assert [len(stage) for stage in losses(run)] == list(STEPS)
    assert losses(run)[1][0] < losses(run)[0][0] - 0.05, "the second stage does not begin where the first ended"
    return run, seconds


def test_killed_at_random_moments(tmp_path: Path, whole: tuple[Path, float]) -> None:
    """SIGKILL in the first stage, in the second, between them and in writes."""
    expected, seconds = whole
    config = staged(tmp_path, run__resume=True)
    moments = random.Random(2)
    killed = 0
    while killed < KILLS:
        process = start(config, tmp_path / "log")
        process.join(moments.uniform(0.3, 1.1) * seconds)
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


def test_a_killed_second_stage_goes_on_inside_it(tmp_path: Path, whole: tuple[Path, float]) -> None:
    config = staged(tmp_path, run__resume=True)
    process = start(config, tmp_path / "log")
    while process.is_alive() and not newest(tmp_path / "run/02-long/checkpoints"):
        time.sleep(0.002)
    process.kill()
    process.join()
    finish(config, tmp_path / "log2")
    assert "run/02-long: 1 rank(s) on cpu, continuing after step" in (tmp_path / "log2").read_text()
    assert "run/01-short: 1 rank(s)" not in (tmp_path / "log2").read_text()
    assert_same(tmp_path / "run", whole[0])


def test_a_damaged_end_of_a_stage_is_trained_again(tmp_path: Path, whole: tuple[Path, float]) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/02-long")
    (shard,) = (tmp_path / f"run/01-short/checkpoints/step-{STEPS[0]:08}").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    finish(staged(tmp_path, run__resume=True), tmp_path / "log")
    assert "is damaged" in (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", whole[0])


def test_a_stage_is_a_run_that_its_own_config_resumes(tmp_path: Path, whole: tuple[Path, float]) -> None:
    from ltrain.config import load

    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/02-long/checkpoints" / f"step-{STEPS[1]:08}")
    words = [f"run.dir={tmp_path}/run/02-long", f"run.init={tmp_path}/run/01-short", f"tracking.parent={tmp_path}/run", "run.resume=true"]
    finish(load(tmp_path / "run/02-long/config.yaml", words), tmp_path / "log")
    assert_same(tmp_path / "run", whole[0])


LAYOUTS: list[tuple[int, Layout, Layout]] = [
    (2, {"tensor": 2}, {"context": 2}),
    (4, {"pipeline": 2}, {"tensor": 2, "expert": 4}),
]


@pytest.mark.parametrize(("world", "first", "second"), LAYOUTS)
def test_each_stage_on_its_own_layout(pool: Any, tmp_path: Path, whole: tuple[Path, float], world: int, first: Layout, second: Layout) -> None:
    """The losses of one rank; the first model is gone when the second is built; SIGTERM in the second stage stops the run, which goes on there."""
    config = staged(tmp_path, layouts=(first, second), run__resume=True)
    results = pool(world).run(on_ranks, config, "02-long", timeout=90)
    assert all(r.get("stopped") for r in results), results
    assert {tuple(r["alive"]) for r in results} == {(0, 0)}
    assert newest(tmp_path / "run/02-long/checkpoints") is not None
    results = pool(world).run(on_ranks, config, timeout=90)
    assert all((r["step"], r["stopped"], len(r["losses"])) == (STEPS[1], False, STEPS[1] - 1) for r in results), results
    for found, expected in zip(losses(tmp_path / "run"), losses(whole[0]), strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    meta, _ = states(tmp_path / "run/02-long")
    assert meta["layout"] == vars(ParallelConfig(**second)) and meta["optimizer_step"] == sum(STEPS)


def test_moments_are_kept_or_new(pool: Any, tmp_path: Path) -> None:
    """One step of the second stage, against AdamW by hand (Loshchilov & Hutter 2019, algorithm 2) from the saved moments."""
    lr, eps, beta_1, beta_2 = 1e-3, 1e-8, 0.9, 0.95
    saved, first_losses = {}, []
    for optimizer in ("keep", "reset"):
        config = staged(tmp_path, optimizer, train__weight_decay=0.0, train__eps=eps, train__betas=[beta_1, beta_2])
        config.stages["long"] |= {"optimizer": optimizer, "train": {"steps": 1, "lr": lr, "schedule": "constant", "warmup_steps": 0}}
        (outcome,) = pool(1).run(on_ranks, config)
        first_losses += outcome["losses"]
        (_, before), (meta, after) = states(tmp_path / optimizer / FOLDERS[0]), states(tmp_path / optimizer / FOLDERS[1])
        t = meta["optimizer_step"]
        assert (meta["step"], t) == (1, STEPS[0] + 1 if optimizer == "keep" else 1)
        for (kind, name), weight in before.items():
            if kind == "param":
                m, v = after["exp_avg", name] / (1 - beta_1**t), after["exp_avg_sq", name] / (1 - beta_2**t)
                torch.testing.assert_close(after[kind, name], weight - lr * m / (v.sqrt() + eps), rtol=1e-5, atol=1e-7)
        saved[optimizer] = before, after
    assert first_losses[0] == first_losses[1]  # the same weights and data
    (before, kept), (_, new) = saved["keep"], saved["reset"]
    for kind, beta in (("exp_avg", beta_1), ("exp_avg_sq", beta_2)):
        for name in (name for k, name in before if k == kind):
            torch.testing.assert_close(kept[kind, name], new[kind, name] + beta * before[kind, name], rtol=1e-4, atol=1e-9)


def test_what_is_in_the_folder_must_fit(pool: Any, tmp_path: Path, whole: tuple[Path, float]) -> None:
    shutil.copytree(whole[0], tmp_path / "run")

    def refusal(config: Config) -> str:
        (result,) = pool(1).run(on_ranks, config)
        return str(result["error"])

    assert "already holds a run: add run.resume=true" in refusal(staged(tmp_path))
    config = staged(tmp_path, run__resume=True)
    config.stages = {"brief": config.stages["short"], "long": config.stages["long"]}
    assert "holds 01-short, which is none of the config's stages 01-brief, 02-long" in refusal(config)
    config = staged(tmp_path, run__resume=True)
    config.stages["short"]["train"]["steps"] = 9
    assert "stage 01-short has done 4 of 9 steps, but 02-long has begun after it" in refusal(config)
    config = staged(tmp_path, "run", run__resume=True, run__dir=str(tmp_path / "run/01-short"))
    assert "holds a run without stages" in refusal(config)
    config = small(tmp_path, "other", run__init=str(tmp_path / "texts"))
    assert "is neither a checkpoint or run of ltrain nor a Hugging Face model" in refusal(config)
    config = small(tmp_path, "other", run__init=str(tmp_path / "run/01-short"))
    config.data.tokenizer.kind, config.data.tokenizer.vocab = "bpe", 300
    assert "data.tokenizer.kind=bpe, but run.init=" in refusal(config)
    config.data.tokenizer.kind, config.data.tokenizer.vocab, config.model.hidden = "bytes", 4096, 32
    assert "give the config that it was saved with" in refusal(config)


def test_mlflow_nests_the_stages_of_a_resumed_run(tmp_path: Path) -> None:
    config = staged(tmp_path, tracking__enabled=True, run__resume=True, run__name="mine")
    process = start(config, tmp_path / "log")
    while process.is_alive() and not newest(tmp_path / "run/02-long/checkpoints"):
        time.sleep(0.005)
    process.kill()
    process.join()
    finish(config, tmp_path / "log")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run/mlflow.db'}")
    experiment = client.get_experiment_by_name("ltrain")
    assert experiment is not None and experiment.artifact_location == (tmp_path / "run/artifacts").as_uri()
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(client.search_runs([experiment.experiment_id])) == 3 and runs.keys() == {"mine", "short", "long"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "mlflow.parentRunId" not in runs["mine"].data.tags and runs["mine"].data.params["stages.long.rope.scaling"] == "yarn"
    for name, folder, steps in zip(("short", "long"), FOLDERS, STEPS, strict=True):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["mine"].info.run_id
        history = sorted(client.get_metric_history(runs[name].info.run_id, "train/loss"), key=lambda m: m.step)
        assert [m.step for m in history] == list(range(1, steps + 1))
        assert [m.value for m in history] == [row["train/loss"] for row in metrics(tmp_path / "run" / folder) if "train/loss" in row]
