"""`ltrain doctor`: what this machine has for training, and what each missing thing costs.

Nothing is believed that can be tried: packages are imported, ranks meet, a kernel is compiled, files are written, each in a process of its
own where it may crash or hang.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltrain.config import TokenizerConfig

LIMIT = 180.0  # seconds for a process of the examination

# Package -> (the module it installs, what is lost without it). Without those that have an empty text nothing trains.
PACKAGES: dict[str, tuple[str, str]] = {
    "torch": ("torch", ""),
    "megatron-core": ("megatron.core", ""),
    "numpy": ("numpy", ""),
    "safetensors": ("safetensors", ""),
    "omegaconf": ("omegaconf", ""),
    "triton": ("triton", ""),  # megatron-core imports it, on a CPU too
    "tokenizers": ("tokenizers", "data.tokenizer.kind=bpe and file fail; bytes runs"),
    "pyarrow": ("pyarrow", "data.source=jsonl, parquet and hub fail; stdlib and text run"),
    "datasets": ("datasets", "data.source=jsonl, parquet and hub fail; stdlib and text run"),
    "mlflow": ("mlflow", "nothing goes to MLflow; metrics.jsonl is written as it is"),
    "tqdm": ("tqdm", "training fails in a terminal, and runs where its output goes to a file"),
    "deepspeed": ("deepspeed", "engine=deepspeed fails; engine=megatron runs"),
    "flash-linear-attention": ("fla", "backend=fla of linear recurrences is refused; our own kernels run as they do with it"),
    "flash-qla": ("flash_qla", "backend=fla of Gated DeltaNet is refused; our own kernels run as they do with it"),
    "transformer-engine": ("transformer_engine", "fp8.recipe is refused; bf16 runs as it is"),
}


@dataclass(frozen=True)
class Finding:
    """One line: a thing, what was found of it, and what it costs where it is missing or short."""

    name: str
    value: str  # empty: missing
    cost: str = ""
    fatal: bool = False  # training cannot run


def examine(folder: Path) -> list[Finding]:
    """Everything there is to say about this machine, for runs under `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        # all at once: each spends seconds on its imports
        devices = _start("ltrain.parallel.probe", "devices")
        gloo = _start_pair("gloo", scratch)
        packages = list(_packages())
        seen, failure = _answer(devices)
        gpus = seen.get("devices", [])
        triton = _start("ltrain.kernels.probe") if gpus and importlib.util.find_spec("triton") else None
        nccl = _start_pair("nccl", scratch) if len(gpus) > 1 else []
        return [
            *_machine(),
            *_places(folder),
            *packages,
            _training(failure),
            *_gpus(gpus, seen),
            _exchange("gloo", gloo, "ranks without GPUs cannot meet, and checkpoints of several ranks cannot be agreed on", fatal=True),
            *_nccl(gpus, nccl, seen),
            *_triton(triton),
            *_fp8(seen),
        ]


def _machine() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("system", platform.platform())
    cores = len(os.sched_getaffinity(0))
    few = "" if cores > 1 else "ranks, tokenising workers and kernels share one core: data.workers=0 spares a process"
    yield Finding("CPU cores", str(cores), few)
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    yield Finding("memory", f"{_gib(memory['MemAvailable'])} free of {_gib(memory['MemTotal'])}")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = (
        "" if files >= 4096 or files == resource.RLIM_INFINITY else "runs of many ranks or files may end with `too many open files`: ulimit -n 65536"
    )
    yield Finding("open files", "unlimited" if files == resource.RLIM_INFINITY else str(files), few)
    if Path("/sys/class/infiniband").is_dir():
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        short = "" if locked == resource.RLIM_INFINITY else "NCCL cannot register its buffers with InfiniBand: ulimit -l unlimited"
        yield Finding("locked memory", "unlimited" if locked == resource.RLIM_INFINITY else _gib(locked), short)


def _places(folder: Path) -> Iterator[Finding]:
    yield _writable("run.dir", folder, "no run can be written there: give another with --dir, and run.dir=... to a run", fatal=True)
    cache = TokenizerConfig().cache
    yield _writable("data.tokenizer.cache", Path(cache).expanduser(), "BPE tokenizers have no place: name one with data.tokenizer.cache=...")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("/dev/shm", "", "NCCL between the GPUs of a machine does not start")
        return
    free = shutil.disk_usage(shared).free
    small = "" if free >= 2**30 else "NCCL between the GPUs of a machine may not start: give a container more, as in docker run --shm-size=8g"
    yield Finding("/dev/shm", f"{_gib(free)} free", small)


def _writable(name: str, folder: Path, cost: str, fatal: bool = False) -> Finding:
    """Tried in the nearest folder that exists, so that an examination leaves nothing behind."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(name, "", f"{folder} cannot be written ({error.strerror}): {cost}", fatal)
    return Finding(name, f"{folder}, {_gib(shutil.disk_usage(there).free)} free")


def _packages() -> Iterator[Finding]:
    for package, (module, cost) in PACKAGES.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ImportError:  # its parent is not there
            there = False
        if there:
            try:
                yield Finding(package, importlib.metadata.version(package))
            except importlib.metadata.PackageNotFoundError:
                yield Finding(package, "of no known version")
        else:
            yield Finding(package, "", cost or "training cannot start: install ltrain again", fatal=not cost)


def _training(failure: str) -> Finding:
    if failure:
        return Finding("training's imports", "", f"training cannot start: {failure}", fatal=True)
    return Finding("training's imports", "work")


def _gpus(gpus: list[dict[str, Any]], seen: dict[str, Any]) -> Iterator[Finding]:
    if not gpus:
        built = "" if seen.get("cuda") or not seen else ", and torch is a build without CUDA"
        yield Finding("GPU", "", f"training runs on the CPU{built}: enough for tests and models of a few million parameters")
        return
    yield Finding("NVIDIA driver", f"{_driver()}, CUDA {seen['cuda']} in torch")
    for i, gpu in enumerate(gpus):
        value = f"{gpu['name']}, capability {gpu['capability']}, {_gib(gpu['free'])} free of {_gib(gpu['memory'])}"
        costs = []
        if float(gpu["capability"]) < 8.0:
            costs.append("no bf16 matrix units: precision=bf16 is slow")
        if gpu["free"] < 0.8 * gpu["memory"]:
            costs.append("another process holds part of its memory")
        yield Finding(f"GPU {i}", value, "; ".join(costs))


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "of unknown version (no nvidia-smi)"


def _exchange(name: str, pair: list[subprocess.Popen[str]], cost: str, fatal: bool = False) -> Finding:
    for answer, failure in [_answer(process) for process in pair]:
        if failure or not answer["correct"]:
            return Finding(name, "", f"{cost} ({failure or 'an all-reduce gave a wrong sum'})", fatal)
    return Finding(name, "two ranks have met, their all-reduce is right")


def _nccl(gpus: list[dict[str, Any]], pair: list[subprocess.Popen[str]], seen: dict[str, Any]) -> Iterator[Finding]:
    if not gpus:
        return
    version = seen["nccl"]
    if len(gpus) == 1:
        yield Finding("NCCL", f"{version}, not tried: one GPU")
        return
    tried = _exchange("NCCL", pair, "ranks on GPUs cannot meet: one GPU trains; NCCL_DEBUG=INFO says more")
    yield Finding("NCCL", f"{version}, {tried.value}" if tried.value else "", tried.cost)


def _triton(process: subprocess.Popen[str] | None) -> Iterator[Finding]:
    if process is not None:
        answer, failure = _answer(process)
        if failure or not answer["correct"]:
            why = failure or "a kernel gave a wrong result"
            cost = f"recurrences and short convolutions fail on the GPU; Triton needs a C compiler and the folder ~/.triton ({why})"
            yield Finding("Triton's compiler", "", cost, fatal=True)
        else:
            yield Finding("Triton's compiler", "works")


def _fp8(seen: dict[str, Any]) -> Iterator[Finding]:
    recipes: dict[str, str | None] = seen.get("fp8", {})
    if recipes:
        runs = ", ".join(recipe for recipe, lack in recipes.items() if not lack)
        lacks: dict[str, list[str]] = {}  # a reason -> the recipes it keeps away
        for recipe, lack in recipes.items():
            if lack:
                lacks.setdefault(lack, []).append(recipe)
        yield Finding("FP8", runs, "; ".join(f"fp8.recipe={' and '.join(names)} {lack}" for lack, names in lacks.items()))


def _start(module: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _start_pair(backend: str, scratch: str) -> "list[subprocess.Popen[str]]":
    return [_start("ltrain.parallel.probe", "meet", backend, f"{scratch}/{backend}", str(rank)) for rank in range(2)]


def _answer(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    """What the process found, or why it found nothing."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {}, f"no answer in {LIMIT:.0f} s"
    if process.returncode:
        return {}, (err.strip().splitlines() or [f"its process ended with {process.returncode}"])[-1]
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer, ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def main(folder: str, as_json: bool) -> int:
    """Print the findings; 0 where training can run, 1 where it cannot."""
    findings = examine(Path(folder).expanduser())
    fatal = any(finding.fatal for finding in findings)
    if as_json:
        print(json.dumps({"trains": not fatal, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(fatal)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.value or '-'}")
    if costs := [finding for finding in findings if finding.cost]:
        print("\nMissing or short, and what it costs")
        for finding in costs:
            print(f"  {'' if finding.value else 'no '}{finding.name}: {finding.cost}")
    print("\nTraining cannot run here." if fatal else "\nTraining can run here.")
    return int(fatal)
