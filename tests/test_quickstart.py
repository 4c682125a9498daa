"""The quickstart as a newcomer runs it: real commands, the standard library as data, MLflow's real store read back."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

QUICKSTART = "configs/quickstart.yaml"
STEPS = 12
PROGRESS = re.compile(r"step (\d+)/(\d+): loss (\d+\.\d+), ([\d,]+) tokens/s, lr (\S+), ETA (\d+:\d\d(?::\d\d)?)$")


@dataclass
class Finished:
    code: int
    stdout: str
    stderr: str
    first_step: float | None  # seconds from the start of the command to the first step's line


def ltrain(*words: str) -> Finished:
    process = subprocess.Popen([sys.executable, "-m", "ltrain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began, first, lines = time.monotonic(), None, []
    assert process.stdout is not None and process.stderr is not None
    for line in process.stderr:  # what goes to stdout is far shorter than a pipe holds
        lines.append(line)
        if first is None and PROGRESS.match(line.rstrip()):
            first = time.monotonic() - began
    stdout = process.stdout.read()
    return Finished(process.wait(), stdout, "".join(lines), first)


def progress(stderr: str) -> dict[int, re.Match[str]]:
    return {int(match[1]): match for match in map(PROGRESS.match, stderr.splitlines()) if match}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "my run"  # a space: the commands printed at the end must be quoted


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    return [f"run.dir={folder}", f"data.tokenizer.cache={folder.parent / 'cache'}", "eval.tokens=4096", "run.sample_tokens=16"]


@pytest.fixture(scope="module")
def run(words: list[str]) -> Finished:
    done = ltrain("train", QUICKSTART, f"train.steps={STEPS}", *words)
    assert done.code == 0, done.stderr
    return done


def test_progress_is_shown(run: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress(run.stderr)
    assert {1, STEPS} <= shown.keys()
    for match in shown.values():
        assert int(match[2]) == STEPS
        assert 0 < float(match[3]) < 20 and int(match[4].replace(",", "")) > 0 and 0 < float(match[5]) < 1
    assert shown[STEPS][6] == "0:00"
    assert float(shown[STEPS][3]) < float(shown[1][3]) - 0.1  # it learns
    assert "Traceback" not in run.stderr and "warning" not in run.stderr.lower(), run.stderr
    with capsys.disabled():
        print(f"\nquickstart: {run.first_step:.1f} s from the command to the first step, its tokenizer's training included")


def test_the_closing_summary(run: Finished, folder: Path) -> None:
    held_out = re.search(r"held-out loss (\d+\.\d+), unigram entropy of the same tokens (\d+\.\d+)", run.stdout)
    assert held_out and 0 < float(held_out[1]) < 10 and 0 < float(held_out[2]) < 10
    assert f"step {STEPS}: held-out loss {held_out[1]} nats per token (unigram entropy {held_out[2]})" in run.stderr
    assert "\nA sample" in run.stdout
    sample = [line for line in run.stdout.splitlines() if line.startswith("  | ")]
    assert sample and sample[0].startswith("  | def ")
    mlflow, resume, generate = commands(run)
    assert mlflow[:2] == ["mlflow", "ui"] and mlflow[-1] == f"sqlite:///{folder / 'mlflow.db'}"
    assert resume[:2] == ["ltrain", "train"] and {"run.resume=true", f"train.steps={2 * STEPS}"} <= set(resume)
    assert generate == ["ltrain", "generate", str(folder), "--prompt", "def "]
    assert (folder / "checkpoints" / f"step-{STEPS:08}" / "index.json").is_file()
    assert str(folder / "checkpoints" / f"step-{STEPS:08}") in run.stdout


def commands(run: Finished) -> list[list[str]]:
    """The words of the commands under Next, without `uv run`."""
    lines = run.stdout[run.stdout.index("\nNext\n") :].strip().splitlines()[1:]
    split = [shlex.split(line) for line in lines]
    assert len(split) == 3 and all(words[:2] == ["uv", "run"] for words in split)
    return [words[2:] for words in split]


def test_mlflow_has_it_all(run: Finished, folder: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    stored = client.get_run(json.loads((folder / "run.json").read_text())["mlflow_run_id"])
    assert stored.info.status == "FINISHED"
    params = stored.data.params
    assert params["train.steps"] == str(STEPS) and params["data.source"] == "stdlib" and params["ranks"] == "1" and int(params["params_total"]) > 1000
    history = {m.step: m.value for m in client.get_metric_history(stored.info.run_id, "train/loss")}
    assert list(history) == list(range(1, STEPS + 1))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert history == {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    (evaluated,) = client.get_metric_history(stored.info.run_id, "eval/loss")
    assert evaluated.step == STEPS and f"held-out loss {evaluated.value:.3f}" in run.stdout
    for name in ("train/grad_norm", "train/lr", "train/tokens_per_second", "train/tokens", "eval/unigram_entropy"):
        assert name in stored.data.metrics, name
    config = next(a.path for a in client.list_artifacts(stored.info.run_id) if a.path == "config.yaml")
    kept = Path(client.download_artifacts(stored.info.run_id, config)).read_text()
    assert kept == (folder / "config.yaml").read_text() and f"steps: {STEPS}" in kept
    tags = stored.data.tags
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0:
        assert tags["mlflow.source.git.commit"] == git.stdout.strip() and tags["git.dirty"] in ("true", "false")
    assert tags["env.torch"] and tags["env.python"] == ".".join(map(str, sys.version_info[:3])) and tags["env.devices"]


def test_generate_prints_text(run: Finished, folder: Path) -> None:
    verb, *rest = commands(run)[2][1:]
    done = ltrain(verb, *rest, "--tokens", "8")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("def ") and len(done.stdout.strip()) > len("def ")


def test_a_run_is_not_overwritten_and_says_so_in_one_line(run: Finished, words: list[str], folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = ltrain("train", QUICKSTART, f"train.steps={STEPS}", *words)
    assert (done.code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("ltrain: ") and str(folder) in line and "run.resume=true" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_the_printed_command_goes_on(run: Finished, folder: Path) -> None:
    """After the others: it changes the run."""
    resume = commands(run)[1][1:]
    done = ltrain(*[f"train.steps={STEPS + 3}" if word.startswith("train.steps=") else word for word in resume])  # a shorter way than twice
    assert done.code == 0, done.stderr
    assert f"continuing after step {STEPS}" in done.stderr
    assert min(progress(done.stderr)) == STEPS + 1 and max(progress(done.stderr)) == STEPS + 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 4))
    tokens = [row["train/tokens"] for row in rows if "train/tokens" in row]
    assert tokens == [tokens[0] * step for step in range(1, STEPS + 4)]
    assert (folder / "checkpoints" / f"step-{STEPS + 3:08}" / "index.json").is_file()


def test_bytes_instead_of_a_trained_tokenizer(tmp_path: Path) -> None:
    words = ["data.tokenizer.kind=bytes", "train.steps=3", "eval.tokens=2048", f"run.dir={tmp_path / 'run'}", "tracking.enabled=false"]
    done = ltrain("train", QUICKSTART, *words, "run.sample_tokens=8")
    assert done.code == 0, done.stderr
    assert progress(done.stderr).keys() == {1, 3} and "What was learned" in done.stdout and "mlflow" not in done.stdout
    assert 5 < float(progress(done.stderr)[1][3]) < 6.5  # about ln 384 = 5.95: 257 ids, rounded up
    assert not os.path.exists(tmp_path / "run" / "mlflow.db")
