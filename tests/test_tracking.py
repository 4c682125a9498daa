"""Tracking against a real MLflow store in sqlite, read back by MLflow, through kills and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ltrain import tracking
from ltrain.tracking import Tracker, environment, git_revision, truncate, without_password

SOURCE = Path(tracking.__file__).resolve().parent


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


KILLED_RUN = """
import sys, time
from ltrain.tracking import Tracker
params = {"train.lr": 0.1, "tracking.uri": "http://me:secret@host"}
tracker = Tracker(sys.argv[1], "", "exp", "mine", "model: 1\\nuri: http://me:secret@host/x\\n", params, None)
for step in range(1, 9):
    tracker.log({"train/loss": 1.0 / step, "train/lr": 0.5}, step)
while '"mlflow_run_id"' not in (tracker.run_dir / "run.json").read_text() if (tracker.run_dir / "run.json").exists() else True:
    time.sleep(0.05)
print("up", flush=True)
time.sleep(60)
"""


def test_a_killed_and_resumed_run_is_one_mlflow_run_without_repeated_points(tmp_path: Path) -> None:
    run_dir, at_start = tmp_path / "a run", git_revision(SOURCE)
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/lo')  # as if the kill had cut a row

    params = {"train.lr": 0.2, "train.steps": 12, "tracking.uri": "http://me:secret@host"}
    tracker = Tracker(run_dir, "", "exp", "mine", "model: 1\n", params, resume_step=5)
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5]
    started = time.perf_counter()
    for step in range(6, 13):
        tracker.log({"train/loss": 1.0 / step, "train/lr": float("nan") if step == 12 else 0.5}, step)
    tracker.log({"eval/loss": float("inf")}, 12)
    assert time.perf_counter() - started < 0.5  # MLflow is still being imported
    note = tmp_path / "summary.txt"
    note.write_text("learned")
    tracker.artifact(note)
    tracker.close("FINISHED")

    assert [row["step"] for row in rows(run_dir)] == [*range(1, 13), 12]
    assert rows(run_dir)[-2]["train/lr"] == "nan"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("exp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert run.info.run_id == json.loads((run_dir / "run.json").read_text())["mlflow_run_id"]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(step, 1.0 / step) for step in range(1, 13)]
    assert run.data.metrics["eval/loss"] > 1e300
    assert run.data.params == {"train.lr": "0.1", "train.steps": "12", "tracking.uri": "http://***@host"}
    assert run.data.tags["resumed.train.lr"] == "0.2"
    assert run.data.tags["env.python"] == environment()["python"] and run.data.tags["env.devices"]
    # a commit may be made in the tree while the test runs
    revisions = [revision["mlflow.source.git.commit"] for revision in (at_start, git_revision(SOURCE)) if revision]
    assert not revisions or (run.data.tags["mlflow.source.git.commit"] in revisions and run.data.tags["git.dirty"] in ("true", "false"))
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "config-from-step-5.yaml", "environment.json", "environment-from-step-5.json", "summary.txt"}
    kept = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
    assert kept.read_text() == "model: 1\nuri: http://***@host/x\n"
    assert list((run_dir / "artifacts").rglob("config.yaml"))


def test_training_goes_on_with_one_warning_when_mlflow_cannot_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, "nonsense://me:secret@nowhere", "exp", "", "", {}, None)
    for step in range(1, 4):
        tracker.log({"train/loss": 1.0}, step)
    tracker.artifact(tmp_path / "absent")
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("warning: tracking:") == 1 and "secret" not in said
    assert len(rows(tmp_path)) == 3


def test_a_dead_mlflow_process_is_told_once_and_metrics_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, "", "exp", "", "", {}, None)
    assert tracker._process is not None
    os.kill(tracker._process.pid, signal.SIGKILL)
    tracker._process.wait()
    for step in range(1, 4):
        tracker.log({"train/loss": 1.0}, step)
    tracker.close()
    assert capsys.readouterr().err.count("warning: tracking: MLflow stopped") == 1
    assert len(rows(tmp_path)) == 3


def test_a_close_that_takes_too_long_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, "", "exp", "", "", {}, None)
    assert tracker._process is not None
    process = tracker._process
    tracker.close(timeout=0.1)
    assert process.poll() is not None
    assert "after 0.1 s" in capsys.readouterr().err


def test_a_new_run_in_the_folder_sets_the_old_metrics_aside(tmp_path: Path) -> None:
    for run in range(3):
        tracker = Tracker(tmp_path, "", "exp", "", "", {}, None, enabled=False)
        tracker.log({"train/loss": run}, 1)
        tracker.close()
    assert [json.loads((tmp_path / name).read_text())["train/loss"] for name in ("metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "tracking.log").exists()


def test_truncating_keeps_an_open_readers_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 2)) + "garbage\n")
    with open(path) as reader:
        truncate(path, 2)
        assert len(reader.readlines()) == 5
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
    truncate(tmp_path / "absent.jsonl", 1)


def test_passwords_and_environment_variables_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in json.dumps(environment())
    assert without_password("a https://u:p@host/x b://c") == "a https://***@host/x b://c"


def test_no_git_is_no_revision(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == {}
