"""The real training loop on two and four ranks: the same losses on every layout, resumes, stops and errors on which all ranks agree."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain import data
from ltrain.checkpoint import Checkpoint, newest_whole
from ltrain.config import Config, ParallelConfig, to_yaml
from tests.train.runs import metrics, small

STEPS, SAVED = 6, 3  # of every run here; a checkpoint in the middle and at the end
TOLERANCE = 1e-5  # of a loss in nats; 2e-7 is usual in float32, and a gradient that is not summed over tensor ranks gives 2e-5

Layout = dict[str, int]
RunOn = Callable[..., Path]


def on_ranks(config: Config, terminated: int | None = None) -> dict[str, Any]:
    """On every rank of a pool what `ltrain.train.loop.train` does, but the pool's own process group stays.

    terminated: this rank gets SIGTERM during its first step.
    """
    from ltrain.config import validate
    from ltrain.parallel import mesh as ranks
    from ltrain.train.loop import Run
    from ltrain.train.stop import StopRequest

    validate(config, int(os.environ["WORLD_SIZE"]))
    mesh = ranks.Mesh(config.parallel, ranks.start(config.device, config.parallel.timeout))
    try:
        with StopRequest() as stop:
            run = Run(config, mesh, stop)
            if mesh.rank == terminated:
                forward_backward = run.engine.forward_backward

                def with_signal(*args: Any) -> dict[str, float]:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return forward_backward(*args)

                run.engine.forward_backward = with_signal  # type: ignore[method-assign]
            outcome = run.train()
    except Exception as error:  # noqa: BLE001 - what each rank says is what the test is about
        return {"error": str(error), "for_people": isinstance(error, ValueError)}
    finally:
        mesh.close()
    return {"step": outcome.step, "losses": outcome.losses, "stopped": outcome.stopped, "eval": outcome.eval_loss, "start": run.start}


def config_of(tmp: Path, name: str, layout: Layout, **changes: Any) -> Config:
    config = small(tmp, name, steps=STEPS, parallel=ParallelConfig(**layout), train__tokens_per_step=512, checkpoint__every=SAVED, **changes)
    config.data.shards = 4
    return config


def train(pool: Any, world: int, config: Config, **how: Any) -> list[dict[str, Any]]:
    """The ranks' outcomes, which agree on everything."""
    results: list[dict[str, Any]] = pool(world).run(on_ranks, config, *how.values(), timeout=90)
    assert not any("error" in r for r in results), results
    assert all(r == results[0] for r in results[1:]), results
    return results


@pytest.fixture(scope="module")
def run_on(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> RunOn:
    """run_on(world, layout, precision): the folder of a finished run, trained once for the tests of this file."""
    tmp = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def folder(world: int, layout: Layout, precision: str = "fp32") -> Path:
        name = "-".join([str(world), precision, *(f"{key}{n}" for key, n in layout.items())])
        if name not in done:
            config = config_of(tmp, name, layout, precision=precision)
            outcome = train(pool, world, config)[0]
            assert (outcome["step"], outcome["stopped"]) == (STEPS, False)
            done[name] = Path(config.run.dir)
            assert losses(done[name]) == list(enumerate(outcome["losses"], 1))
        return done[name]

    return folder


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in metrics(run) if "train/loss" in row]


def values(run: Path, key: str) -> list[float]:
    return [row[key] for row in metrics(run) if key in row]


def states(run: Path) -> dict[tuple[str, str], Any]:
    path, warnings = newest_whole(run / "checkpoints")
    assert path is not None and not warnings
    with Checkpoint(path) as checkpoint:
        return {(kind, name): checkpoint.read(name, kind) for kind in checkpoint.kinds for name in checkpoint.names(kind)}


def assert_same(run: Path, expected: Path) -> None:
    """Losses, weights, moments and balancing biases, bit for bit."""
    assert losses(run) == losses(expected)
    found, wanted = states(run), states(expected)
    assert found.keys() == wanted.keys()
    assert {kind for kind, _ in found} == {"param", "exp_avg", "exp_avg_sq", "buffer"}
    different = [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)]
    assert not different


def cut_short(run: Path, tmp: Path) -> Path:
    """A copy of a finished run as it was left after step SAVED."""
    copy = tmp / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08}")
    return copy


LAYOUTS: list[tuple[int, Layout]] = [
    (2, {}),
    (4, {}),
    (2, {"tensor": 2}),
    (2, {"context": 2}),
    (2, {"pipeline": 2}),
    (4, {"pipeline": 2}),
    (2, {"expert": 2}),
]


def named(world: int, layout: Layout) -> str:
    return "-".join([str(world), *(f"{key}{n}" for key, n in layout.items())])


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=[named(*case) for case in LAYOUTS])
def test_the_losses_of_one_rank(run_on: RunOn, world: int, layout: Layout) -> None:
    run, one = run_on(world, layout), run_on(1, {})
    for key in ("train/loss", "train/aux_loss", "train/z_loss", "eval/loss", "eval/unigram_entropy"):
        expected = values(one, key)
        assert len(expected) == (STEPS if key.startswith("train") else 1)
        assert values(run, key) == pytest.approx(expected, abs=TOLERANCE), key
    assert values(run, "train/grad_norm") == pytest.approx(values(one, "train/grad_norm"), rel=1e-5)
    assert values(one, "train/loss")[-1] < values(one, "train/loss")[0] - 0.01, "nothing was learned that could differ"
    found, expected_states = states(run), states(one)
    assert found.keys() == expected_states.keys()
    for key, tensor in expected_states.items():
        assert found[key].shape == tensor.shape, key


SAME: list[tuple[int, Layout]] = [(2, {"tensor": 2, "expert": 2}), (2, {"context": 2}), (2, {}), (4, {"pipeline": 2})]


@pytest.mark.parametrize(("world", "layout"), SAME, ids=[named(*case) for case in SAME])
def test_resumed_bit_for_bit(pool: Any, run_on: RunOn, tmp_path: Path, world: int, layout: Layout) -> None:
    whole = run_on(world, layout)
    run = cut_short(whole, tmp_path)
    outcome = train(pool, world, config_of(tmp_path, "run", layout, run__resume=True))[0]
    assert outcome["start"] == SAVED and len(outcome["losses"]) == STEPS - SAVED
    assert_same(run, whole)


OTHER: list[tuple[int, Layout, int, Layout]] = [
    (2, {"tensor": 2, "expert": 2}, 1, {}),
    (1, {}, 4, {"pipeline": 2}),
    (4, {"pipeline": 2}, 2, {"context": 2}),
    (2, {"context": 2}, 4, {"tensor": 2, "expert": 4}),
    (4, {}, 2, {"tensor": 2}),
]


@pytest.mark.parametrize(("world", "layout", "world_2", "layout_2"), OTHER, ids=[f"{named(*c[:2])}-to-{named(*c[2:])}" for c in OTHER])
def test_resumed_on_another_layout(pool: Any, run_on: RunOn, tmp_path: Path, world: int, layout: Layout, world_2: int, layout_2: Layout) -> None:
    run = cut_short(run_on(world, layout), tmp_path)
    outcome = train(pool, world_2, config_of(tmp_path, "run", layout_2, run__resume=True))[0]
    assert outcome["start"] == SAVED
    expected = run_on(1, {})
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert values(run, "train/loss") == pytest.approx(values(expected, "train/loss"), abs=TOLERANCE)
    assert values(run, "eval/loss") == pytest.approx(values(expected, "eval/loss"), abs=TOLERANCE)


def test_bfloat16_trains_and_resumes_bit_for_bit(pool: Any, run_on: RunOn, tmp_path: Path) -> None:
    layout = {"tensor": 2}  # and data
    whole = run_on(4, layout, "bf16")
    found = values(whole, "train/loss")
    assert all(torch.isfinite(torch.tensor(found))) and found[-1] < found[0] - 0.01
    assert found != values(run_on(1, {}), "train/loss")  # really in bfloat16
    assert found == pytest.approx(values(run_on(1, {}), "train/loss"), abs=0.05)
    run = cut_short(whole, tmp_path)
    train(pool, 4, config_of(tmp_path, "run", layout, precision="bf16", run__resume=True))
    assert_same(run, whole)


@pytest.mark.parametrize("terminated", [0, 3])
def test_sigterm_on_one_rank_stops_all(pool: Any, run_on: RunOn, tmp_path: Path, terminated: int) -> None:
    layout = {"pipeline": 2}  # and data
    config = config_of(tmp_path, "run", layout, run__resume=True)
    outcome = train(pool, 4, config, terminated=terminated)[0]
    assert outcome["stopped"] and outcome["step"] == 2  # told in step 1; the ranks agree before step 2, which ends
    path, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert path is not None and path.name == "step-00000002"
    outcome = train(pool, 4, config)[0]
    assert outcome["start"] == 2 and not outcome["stopped"]
    assert_same(tmp_path / "run", run_on(4, layout))


def refusal(pool: Any, config: Config) -> str:
    """The one sentence that every rank ends with."""
    results = pool(4).run(on_ranks, config, timeout=60)
    assert all("error" in r for r in results), results
    sentences = {r["error"] for r in results}
    assert len(sentences) == 1, sentences
    assert all(r["for_people"] for r in results)
    (sentence,) = sentences
    assert sentence and "\n" not in sentence and "Traceback" not in sentence
    return str(sentence)


DATA_AND_TENSOR = {"tensor": 2}  # of four ranks: one of each pair reads the data


def test_too_little_held_out_ends_every_rank(pool: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", DATA_AND_TENSOR, data__tokens=2048, eval__tokens=2048)
    config.train.tokens_per_step = 4096
    assert "the held-out documents hold less than one micro-batch" in refusal(pool, config)


def test_another_seed_on_resume_ends_every_rank(pool: Any, run_on: RunOn, tmp_path: Path) -> None:
    cut_short(run_on(4, DATA_AND_TENSOR), tmp_path)
    assert "seed" in refusal(pool, config_of(tmp_path, "run", DATA_AND_TENSOR, run__resume=True, seed=7))


def test_an_unreadable_document_ends_every_rank(pool: Any, tmp_path: Path) -> None:
    """One data rank alone comes upon it, after steps that went well; the last checkpoint stays."""
    config = config_of(tmp_path, "run", DATA_AND_TENSOR)
    config.checkpoint.every = 1
    bad = only_of_second_rank(config)
    text = bad.read_bytes()
    bad.write_bytes(b"\xff" + text[1:])  # of the same length: only reading it tells
    sentence = refusal(pool, config)
    assert str(bad) in sentence and "is not UTF-8 at byte 0" in sentence
    path, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert path is not None


def only_of_second_rank(config: Config) -> Path:
    """A document that data rank 1 of 2 reads first, after its second step and not for its first checkpoints."""
    with data.build(config.data, config.seed).loader(1, 2) as loader:
        seen: set[str] = set()
        for number, batch in zip(range(40), loader, strict=False):
            new = set(batch.documents) - seen
            seen |= new
            if number >= 4 and new and batch.documents[0] not in new:  # it begins inside this micro-batch, two of which make a step
                return Path(next(d for d in batch.documents if d in new))
    raise AssertionError("no document begins late enough: change the texts")


def test_the_command_line_under_torchrun(pool: Any, run_on: RunOn, tmp_path: Path) -> None:
    """Everything together as a user starts it: four processes, tensor and context parallelism, a tokenising process."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config_of(tmp_path, "run", {})))
    words = [str(file), "parallel.tensor=2", "parallel.context=2", "data.workers=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "ltrain", "train", *words]
    done = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "4 rank(s) on cpu" in done.stderr and done.stdout.count("What was learned") == 1
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    for key in ("train/loss", "eval/loss"):
        assert values(tmp_path / "run", key) == pytest.approx(values(run_on(1, {}), key), abs=TOLERANCE)
    assert newest_whole(tmp_path / "run" / "checkpoints")[0] is not None
