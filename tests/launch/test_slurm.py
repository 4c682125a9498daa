"""`ltrain launch slurm` on a real Slurm controller with two nodes, both this machine."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltrain.config import ConfigError, to_yaml
from ltrain.launch.slurm import Job, launch, seconds
from tests.launch.slurm import Slurm, unavailable
from tests.train.runs import metrics, small

STEPS = 200  # some seconds on an idle machine: longer than a signal takes through Slurm
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # the order of sums depends on the number of threads


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := unavailable():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as controller:
        controller.environment |= ENVIRONMENT
        yield controller


def config(tmp: Path, name: str) -> Path:
    path = tmp / f"{name}.yaml"
    path.write_text(to_yaml(small(tmp, name, steps=STEPS, checkpoint__every=0)))
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in metrics(run) if "train/loss" in row]


def trained(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def until(what: str, true: object, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def ltrain(slurm: Slurm, *words: str) -> str:
    return slurm(sys.executable, "-m", "ltrain", *words, cwd=Path(__file__).parents[2])


@pytest.mark.timeout(600)  # four times two ranks that import torch, perhaps on a busy machine
def test_a_job_is_stopped_preempted_and_finishes_with_the_losses_of_an_uninterrupted_run(
    slurm: Slurm, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = subprocess.Popen(
        [sys.executable, "-m", "ltrain", "launch", "local", str(config(tmp_path, "whole")), "--ranks", "2"],
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
    )
    request.addfinalizer(whole.terminate)  # nothing where it has ended
    said = ltrain(
        slurm, "launch", "slurm", str(config(tmp_path, "run")), "--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1", "--time", "10"
    )
    job = said.split("Submitted batch job ")[1].split()[0]
    request.addfinalizer(lambda: slurm("scancel", "--quiet", job))  # a failure leaves the nodes to the other tests
    run = tmp_path / "run"
    log = next(run.glob("launch/*/job.sbatch")).with_name("job.log")

    def shown() -> str:
        return f"{log.read_text() if log.exists() else said}\n{slurm('scontrol', 'show', 'job', job)}"

    # what --signal=TERM@120 does before the time limit: the job puts itself back
    until("the job never trained", lambda: trained(run) >= 3 or slurm.state(job) == "FAILED")
    slurm("scancel", "--signal=TERM", job)
    slurm.restart_now(job)
    first = trained(run)
    assert 3 <= first < STEPS, shown()
    assert slurm.shown(job, "Restarts") == "1"
    # preemption: Slurm puts it back
    until("the job did not go on", lambda: trained(run) >= first + 3 or slurm.state(job) == "FAILED")
    slurm("scontrol", "requeue", job)
    slurm.restart_now(job)
    second = trained(run)
    assert first + 3 <= second < STEPS, shown()
    until("the job did not finish", lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert (slurm.state(job), slurm.shown(job, "Restarts")) == ("COMPLETED", "2"), shown()
    text = log.read_text()
    assert text.count("2 rank(s) on cpu, from the start") == 1, text
    assert [f"continuing after step {n}" in text for n in (first, second)] == [True, True], text
    assert whole.wait(60) == 0, whole.communicate()
    assert losses(run) == losses(tmp_path / "whole")
    assert json.loads((log.parent / "code" / "revision.json").read_text()).keys() <= {"mlflow.source.git.commit", "git.dirty"}


STOPPABLE = """#!/bin/bash
trap 'echo stopped; exit 75' TERM
echo started with "$PYTHONPATH"
while true; do sleep 0.1; done
"""
FAILING = """#!/bin/bash
echo failed
exit 1
"""


@pytest.mark.parametrize(("python", "line", "state"), [(STOPPABLE, "stopped", "CANCELLED"), (FAILING, "failed", "FAILED")])
def test_a_cancelled_or_failed_job_stays_away(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, line: str, state: str
) -> None:
    """The job script on its own, with a stand-in for the interpreter; in a folder whose name would break a careless script."""
    stand_in = tmp_path / "python"
    stand_in.write_text(python)
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    odd = "it's $HOME; 100%j  `x`"
    script = launch(str(config(tmp_path, odd)), [], Job(2, 1, gpus=False), dry_run=True)
    job = slurm("sbatch", str(script)).split()[-1]
    log = script.with_name("job.log")
    until("nothing ran", lambda: log.exists() and log.read_text().count("started" if state == "CANCELLED" else "failed") == 2)
    if state == "CANCELLED":
        slurm("scancel", job)
    until(f"job {job} did not end", lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert (slurm.state(job), slurm.shown(job, "Restarts")) == (state, "0"), log.read_text()
    assert line in log.read_text()
    if state == "CANCELLED":
        assert log.read_text().count(f"started with {script.parent / 'code'}") == 2


def test_a_dry_run_writes_a_readable_script_and_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    path = config(tmp_path, "run")
    job = Job(2, 2, time="1-12:00", partition="big", account="lab", cpus_per_task=32, options=["qos=high", "exclusive"])
    script = launch(str(path), ["train.tokens_per_step=1024"], job, dry_run=True)
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert asked.pop("job-name").startswith("run-")
    assert asked == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "2",
        "cpus-per-task": "32",
        "time": "1-12:00",
        "partition": "big",
        "account": "lab",
        "qos": "high",
        "exclusive": "",
        "signal": "TERM@120",
        "requeue": "",
        "open-mode": "append",
        "dependency": "singleton",
        "chdir": f'"{Path.cwd()}"',
        "output": f'"{script.with_name("job.log")}"',
    }
    assert max(map(len, text.splitlines())) < 250
    resolved = (script.parent / "config.yaml").read_text()
    assert "resume: true" in resolved and "tokens_per_step: 1024" in resolved and "device: cuda" in resolved
    assert f"submit:  sbatch {script}" in capsys.readouterr().out
    # what runs later is what is here now, and nothing of the data or the runs
    code = script.parent / "code"
    here = Path(__file__).parents[2]
    for name in ("ltrain/train/loop.py", "ltrain/launch/slurm.py", "ltrain/configs/quickstart.yaml"):
        assert (code / name).read_bytes() == (here / name).read_bytes()
    assert not (code / "runs").exists() and not (code / ".venv").exists()
    found = subprocess.run(
        [sys.executable, "-m", "ltrain", "config", "show", str(script.parent / "config.yaml")],
        env={**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert found.stdout == resolved, found.stderr


@pytest.mark.parametrize(
    ("job", "overrides", "sentence"),
    [
        (Job(2, 4, time="tomorrow"), [], "is not a time of Slurm"),
        (Job(2, 4, time="2"), [], "no longer than the 120 s"),
        (Job(2, 4, partition="a b"), [], "--partition 'a b' is not the name"),
        (Job(2, 4, account='x"; rm'), [], "--account"),
        (Job(2, 4, options=["qos=high\n#SBATCH"]), [], "is not an option of sbatch"),
        (Job(2, 4, options=["--qos=high"]), [], "is not an option of sbatch"),
        (Job(2, 4), ["parallel.tensor=3"], "3"),
        (Job(2, 4), ["device=cpu"], "device=cpu, but GPUs are asked for"),
        (Job(2, 1, gpus=False), ["device=cuda"], "device=cuda, but ranks without GPUs"),
        (Job(1, 1), ["run.dir=a\\b"], "backslash"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(job: Job, overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        launch(str(config(tmp_path, "run")), overrides, job, dry_run=True)
    assert not (tmp_path / "run").exists()


def test_times_of_slurm() -> None:
    asked = {"90": 5400, "1:30": 90, "1:02:03": 3723, "2-1": 176400, "1-0:30": 88200, "1-2:3:4": 93784, "UNLIMITED": None}
    assert {text: seconds(text) for text in asked} == asked
