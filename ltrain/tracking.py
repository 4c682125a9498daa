"""Metrics of a run: a file that the training process appends to, and MLflow, fed from that file by a process of its own.

The file `metrics.jsonl` is the queue between the two: the training process never waits for MLflow (whose import alone takes
seconds), nothing is lost when it fails, and a resumed run first catches up with what an ended one had not sent.
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltrain.config import Config

PACKAGES = (
    *("torch", "numpy", "triton", "megatron-core", "deepspeed", "transformer-engine"),
    *("tokenizers", "datasets", "safetensors", "omegaconf", "mlflow"),
)
BATCH = 1000  # metrics in one call, MLflow's limit; of parameters and tags it takes 100
PARAM_LENGTH = 6000  # characters MLflow keeps of a parameter


class Tracker:
    """What rank 0 holds to log with. No method waits for MLflow but `close`, and none raises because of it.

    Args:
        run_dir: folder of the run; gets metrics.jsonl, run.json (the MLflow run's id), tracking.log and, without a `uri`, mlflow.db and artifacts/.
        uri: MLflow tracking URI; empty: sqlite in run_dir.
        experiment, name: of the MLflow run; an empty name is the folder's.
        config_yaml: the resolved config, kept as an artifact.
        params: dotted key -> value, MLflow's parameters.
        resume_step: the step a resumed run continues after: later rows of metrics.jsonl are dropped, since they come again, and the MLflow
            run goes on. None: a new run; the metrics.jsonl of an older one in the folder is renamed.
        enabled: False writes metrics.jsonl only.
        parent: folder of the run that this one is nested under, with its config.yaml; gets that run's run.json and, without a `uri`, the store.
    """

    def __init__(
        self,
        run_dir: str | Path,
        uri: str,
        experiment: str,
        name: str,
        config_yaml: str,
        params: dict[str, Any],
        resume_step: int | None = None,
        enabled: bool = True,
        parent: str = "",
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.uri = uri or local_store(Path(parent or run_dir))
        self._warned = False
        rows = self.run_dir / "metrics.jsonl"
        if resume_step is None:
            _set_aside(rows)
        else:
            truncate(rows, resume_step)
        self._rows = open(rows, "ab", buffering=0)  # unbuffered: a row is one write, whole or absent
        self._process: subprocess.Popen[bytes] | None = None
        if enabled:
            self._start(
                {
                    "run_dir": str(self.run_dir),
                    "uri": self.uri,
                    "local": not uri,
                    "experiment": experiment,
                    "name": name or self.run_dir.resolve().name,
                    "config_yaml": without_password(config_yaml),
                    "params": {key: without_password(_text(value)) for key, value in params.items()},
                    "resume_step": resume_step,
                    "devices": device_names(),
                    "parent": parent,
                }
            )

    @classmethod
    def start(cls, config: "Config", params: dict[str, Any], resume_step: int | None) -> "Tracker":
        """The tracker that `config` asks for; `params` (sizes, ranks...) are logged beside the config's keys."""
        from ltrain.config import flatten, to_yaml

        tracking, run = config.tracking, config.run
        every = {**flatten(config), **params}
        return cls(run.dir, tracking.uri, tracking.experiment, run.name, to_yaml(config), every, resume_step, tracking.enabled, tracking.parent)

    def log(self, metrics: dict[str, float], step: int) -> None:
        row = {"step": step, "time": time.time(), **{key: _number(value) for key, value in metrics.items()}}
        try:
            self._rows.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            self._warn(f"metrics cannot be written to {self._rows.name} ({error.strerror})")
        self._check()

    def artifact(self, path: str | Path) -> None:
        """Keep a file or a folder with the MLflow run."""
        path = Path(path).resolve()
        if not path.exists():
            self._warn(f"{path} is not there to be kept as an artifact")
        else:
            self._send({"artifact": str(path)})

    def close(self, status: str = "FINISHED", timeout: float = 120.0) -> None:
        """End the MLflow run with `status` (FINISHED, FAILED or KILLED) once it has everything; wait at most `timeout` seconds."""
        self._send({"close": status})
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
            try:
                process.wait(min(timeout, 3.0))
            except subprocess.TimeoutExpired:
                print("waiting for MLflow to store the run", file=sys.stderr, flush=True)
            try:
                process.wait(max(timeout - 3.0, 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._warn(f"MLflow had not stored everything after {timeout:g} s and was left")
            else:
                self._report(process.returncode)
        self._rows.close()

    def _start(self, task: dict[str, Any]) -> None:
        package_parent = str(Path(__file__).resolve().parent.parent)
        environment = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH", "")])),
        }
        with open(self.run_dir / "tracking.log", "ab") as log:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "from ltrain.tracking import serve; serve()"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,  # Ctrl-C in the terminal is for the training process
                )
            except OSError as error:
                self._warn(f"the MLflow process did not start ({error.strerror})")
        self._send(task)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._check()

    def _check(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            self._report(code)

    def _report(self, code: int) -> None:
        if code:
            lines = (self.run_dir / "tracking.log").read_text(errors="replace").strip().splitlines()
            self._warn(f"MLflow stopped ({without_password(lines[-1]) if lines else f'exit code {code}'}; more in {self.run_dir / 'tracking.log'})")

    def _warn(self, text: str) -> None:
        if not self._warned:
            print(f"warning: tracking: {text}; training goes on, and metrics stay in {self.run_dir / 'metrics.jsonl'}", file=sys.stderr, flush=True)
        self._warned = True


def local_store(run_dir: Path) -> str:
    return f"sqlite:///{run_dir / 'mlflow.db'}"


def store(config: "Config") -> str:
    """The MLflow tracking URI of a run."""
    return config.tracking.uri or local_store(Path(config.tracking.parent or config.run.dir))


def truncate(rows: Path, step: int) -> None:
    """Keep the whole rows of a metrics file up to `step`; a reader that has the file open keeps the old one."""
    if not rows.exists():
        return
    partial = rows.with_suffix(".partial")
    with open(rows, "rb") as old, open(partial, "wb") as new:
        for line in old:
            row = _row(line)
            if row is not None and row["step"] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(partial, rows)


def without_password(text: str) -> str:
    """The text without the user and password that a URI in it may hold."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", text)


def device_names() -> list[str]:
    """The processor's model and, where torch is loaded and sees them, the GPUs."""
    names: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return [*names, f"{os.cpu_count()} x {model[1] if model else platform.machine()}"]


def environment() -> dict[str, str]:
    """Python, the operating system and package versions. No environment variable is read."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, str]:
    """The commit that `folder` is at, and whether anything differs from it; empty where there is no git or no repository.

    A copy of the code that a job runs says in `revision.json` beside it what it is a copy of.
    """
    kept = folder.parent / "revision.json"
    if kept.is_file():
        found: dict[str, str] = json.loads(kept.read_text())
        return found

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def _set_aside(rows: Path) -> None:
    if rows.exists():
        number = next(n for n in range(1, sys.maxsize) if not rows.with_name(f"metrics-{n}.jsonl").exists())
        rows.rename(rows.with_name(f"metrics-{number}.jsonl"))


def _row(line: bytes) -> dict[str, Any] | None:
    """None for a row that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as text that float() reads."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# The MLflow process


def serve() -> None:
    """Store a run in MLflow: the task and then commands come as JSON lines on stdin, the metrics from the run's metrics.jsonl."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process says when to end, by a command or by ending
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(5)
    commands = _commands(os.getppid())
    task = next(command for command in commands if command)
    if not isinstance(task, dict):
        return
    revision = git_revision(Path(__file__).resolve().parent)  # before the import below: the tree may change while it runs
    run_dir = Path(task["run_dir"])
    with open(run_dir / "metrics.jsonl", "rb") as rows, open(run_dir / ".tracking.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of a killed run the process may still be storing the last rows
        try:
            store = _Store(task, revision)
            status = "KILLED"  # where the training process ends without a word
            for command in commands:
                store.add(rows)
                if isinstance(command, str):
                    break
                if "artifact" in command:
                    store.artifact(Path(command["artifact"]))
                if "close" in command:
                    status = command["close"]
                    break
            store.add(rows)
            store.close(status)
        except Exception as error:  # whatever MLflow, its store or the network raise: told in one line, the last of the log
            import traceback

            traceback.print_exc()
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
            sys.exit(1)


def _commands(parent: int) -> Iterator[dict[str, Any] | str]:
    """The commands on stdin; {} about every second; 'ended' when the training process is gone.

    A forked data worker may hold the pipe open after the training process died, so that the end of stdin is not enough.
    """
    buffer = b""
    while True:
        if select.select([0], [], [], 1.0)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                yield "ended"
                return
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (json.loads(line) for line in lines)
        elif os.getppid() != parent:
            yield "ended"
            return
        else:
            yield {}


class _Store:
    """One MLflow run, new or gone on with."""

    def __init__(self, task: dict[str, Any], revision: dict[str, str]):
        from mlflow import MlflowClient

        self.client: MlflowClient = MlflowClient(tracking_uri=task["uri"])
        self.sent: dict[str, int] = {}  # metric -> the last step MLflow has
        run_dir, shown_uri = Path(task["run_dir"]), without_password(task["uri"])
        resumed = task["resume_step"] is not None
        self.last = True
        self.parent_id = self._parent(Path(task["parent"]), task, shown_uri) if task["parent"] else None
        self.run_id = self._known_run(run_dir / "run.json", shown_uri) if resumed else None
        if self.run_id is None:
            self.run_id = self._new_run(run_dir, task["name"], task, shown_uri)
        if self.parent_id:
            self._tags({"mlflow.parentRunId": self.parent_id})
        suffix = f"-from-step-{task['resume_step']}" if resumed else ""
        self._parameters(task["params"])
        self._tags({**revision, **{f"env.{key}": value for key, value in environment().items()}, "env.devices": "; ".join(task["devices"])})
        self.client.log_text(self.run_id, task["config_yaml"], f"config{suffix}.yaml")
        self.client.log_dict(self.run_id, {**environment(), "devices": task["devices"], **revision}, f"environment{suffix}.json")

    def _known_run(self, path: Path, uri: str) -> str | None:
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("tracking_uri") != uri:
            return None
        run_id: str = known["mlflow_run_id"]
        self.client.update_run(run_id, status="RUNNING")
        for key in self.client.get_run(run_id).data.metrics:
            self.sent[key] = max(metric.step for metric in self.client.get_metric_history(run_id, key))
        return run_id

    def _new_run(self, folder: Path, name: str, task: dict[str, Any], shown_uri: str) -> str:
        experiment = self.client.get_experiment_by_name(task["experiment"])
        if experiment is None:
            location = (folder.resolve() / "artifacts").as_uri() if task["local"] else None
            experiment_id = self.client.create_experiment(task["experiment"], artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run_id = str(self.client.create_run(experiment_id, run_name=name).info.run_id)
        _write_json(folder / "run.json", {"mlflow_run_id": run_id, "tracking_uri": shown_uri, "experiment": task["experiment"], "name": name})
        return run_id

    def _parent(self, folder: Path, task: dict[str, Any], shown_uri: str) -> str:
        """The run that this one is nested under: made by the first that comes, running while one of them does."""
        from ltrain.config import flatten, load, stage_configs

        config = load(folder / "config.yaml")
        stages = [Path(stage.run.dir).name for _, stage in stage_configs(config)]
        self.last = not stages or Path(task["run_dir"]).name == stages[-1]  # whose end is the parent's
        known = self._known_run(folder / "run.json", shown_uri)
        self.sent.clear()
        if known:
            return known
        self.run_id = self._new_run(folder, config.run.name or folder.resolve().name, task, shown_uri)
        self._parameters({key: without_password(_text(value)) for key, value in flatten(config).items()})
        self.client.log_text(self.run_id, without_password((folder / "config.yaml").read_text()), "config.yaml")
        return self.run_id

    def _parameters(self, params: dict[str, str]) -> None:
        """MLflow's parameters never change: what a resumed run gives differently becomes a tag."""
        from mlflow.entities import Param

        assert self.run_id is not None
        known = self.client.get_run(self.run_id).data.params
        cut = {key: value[:PARAM_LENGTH] for key, value in params.items()}
        new = [Param(key, value) for key, value in cut.items() if key not in known]
        for i in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[i : i + 100])
        self._tags({f"resumed.{key}": value for key, value in cut.items() if known.get(key, value) != value})

    def _tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        assert self.run_id is not None
        every = [RunTag(key, value) for key, value in tags.items()]
        for i in range(0, len(every), 100):
            self.client.log_batch(self.run_id, tags=every[i : i + 100])

    def add(self, rows: Any) -> None:
        """Send the rows that were written since the last call."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        while True:
            start, line = rows.tell(), rows.readline()
            if not line.endswith(b"\n"):
                rows.seek(start)  # a row that is being written, or none
                break
            row = _row(line) or {"step": 0, "time": 0}
            step, when = row.pop("step"), int(row.pop("time") * 1000)
            # A resumed run repeats steps that MLflow has; its points are kept as they were first stored.
            metrics += [Metric(key, float(value), when, step) for key, value in row.items() if step > self.sent.get(key, -1)]
        for i in range(0, len(metrics), BATCH):
            assert self.run_id is not None
            self.client.log_batch(self.run_id, metrics=metrics[i : i + BATCH])

    def artifact(self, path: Path) -> None:
        assert self.run_id is not None
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self.client.log_artifact(self.run_id, str(path))

    def close(self, status: str) -> None:
        assert self.run_id is not None
        self.client.set_terminated(self.run_id, status)
        if self.parent_id and (self.last or status != "FINISHED"):
            self.client.set_terminated(self.parent_id, status)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)
