"""`ltrain launch slurm`: a folder with everything that a job needs, and one readable script in it."""

import hashlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltrain.config import Config, ConfigError, to_yaml
from ltrain.launch import snapshot
from ltrain.launch.local import checked
from ltrain.launch.ranks import STOPPED

# Slurm's forms of a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|(?P<short>\d+(?::\d+){0,2}))$")
_WAIT = 60  # seconds between the first node that ends and the killing of the others


@dataclass(frozen=True)
class Job:
    """What a job asks of Slurm. Empty and zero leave the choice to the cluster."""

    nodes: int
    ranks_per_node: int
    gpus: bool = True  # one for each rank
    time: str = ""
    partition: str = ""
    account: str = ""
    cpus_per_task: int = 0  # cores of a node, for all its ranks; 0: whole nodes
    signal_before: int = 120  # seconds before the time limit
    options: Sequence[str] = field(default_factory=list)  # other options of sbatch, as name or name=value

    def check(self) -> None:
        """Raises ConfigError for what Slurm would refuse, or understand in another way than it is meant."""
        for name, value in (("partition", self.partition), ("account", self.account)):
            if value and not re.fullmatch(r"[\w.@+,-]+", value):
                raise ConfigError(f"--{name} {value!r} is not the name of one: letters, digits and . _ - + @, several with commas")
        for option in self.options:
            if not re.fullmatch(r"[a-z][a-z-]*(=[^\s\"'\\#]+)?", option):
                raise ConfigError(f"--sbatch {option!r} is not an option of sbatch: write it as name=value without spaces, for example qos=high")
        if self.time and (limit := seconds(self.time)) is not None and limit <= self.signal_before:
            raise ConfigError(
                f"--time {self.time} is no longer than the {self.signal_before} s of --signal-before, and nothing would be trained: write more"
            )


def seconds(text: str) -> float | None:
    """A time limit of Slurm in seconds, None for one without end. ConfigError where Slurm would not read it."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.match(text)
    if match is None:
        raise ConfigError(f"--time {text!r} is not a time of Slurm: write minutes, hours:minutes:seconds or days-hours, for example 24:00:00")
    if match["short"] is None:
        days, hours, minutes, rest = (int(match[part] or 0) for part in ("days", "hours", "minutes", "seconds"))
    else:
        parts = [int(part) for part in match["short"].split(":")]
        days, hours, minutes, rest = 0, *{1: (0, *parts, 0), 2: (0, *parts), 3: parts}[len(parts)]
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def launch(path: str, overrides: Sequence[str], job: Job, dry_run: bool = False) -> Path:
    """Write `run.dir/launch/<time>/` (code, config.yaml, job.sbatch), submit the script unless `dry_run`, and return it."""
    job.check()
    ranks = job.nodes * job.ranks_per_node
    config, _ = checked(path, [*overrides, "run.resume=true"], ranks, job.gpus)
    run = Path(config.run.dir).expanduser()
    for path_in_script in (run.absolute(), Path.cwd()):
        if re.search(r'["\\\x00-\x1f]', str(path_in_script)):
            raise ConfigError(
                f"{str(path_in_script)!r} has a double quote, backslash or line break in it, which sbatch cannot read: use another folder"
            )
    folder = _new_folder(run / "launch")
    copied = snapshot.take(folder / "code")
    (folder / "config.yaml").write_text(to_yaml(config))
    script = folder / "job.sbatch"
    script.write_text("\n".join(_lines(config, job, folder)) + "\n")
    command = ["sbatch", str(script)]
    print(f"code:    {copied} -> {folder / 'code'}")
    print(f"config:  {path} for {ranks} ranks on {job.nodes} node(s), every key resolved -> {folder / 'config.yaml'}")
    print(f"script:  {script}")
    if dry_run:
        print(f"submit:  {shlex.join(command)}")
        return script
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no sbatch on this machine: on one of the cluster's, run {shlex.join(command)}") from error
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    print(f"submit:  {shlex.join(command)}: {done.stdout.strip()}")
    print(f"log:     {folder / 'job.log'}")
    return script


def _new_folder(parent: Path) -> Path:
    while True:
        folder = parent.absolute() / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            time.sleep(0.2)
        except OSError as error:
            raise ConfigError(f"{parent} cannot be made ({error.strerror}): name a folder that can be written with run.dir=...") from error


def _lines(config: Config, job: Job, folder: Path) -> Iterator[str]:
    run = Path(config.run.dir).expanduser().resolve()
    # the same for every submission of this run, and for no other
    name = f"{re.sub(r'[^\w.-]', '-', config.run.name or run.name)}-{hashlib.sha256(str(run).encode()).hexdigest()[:6]}"
    quote = shlex.quote
    yield "#!/bin/bash"
    yield "# Written by `ltrain launch slurm`, with the code and the config beside it. To go on with the run, submit this file again."
    yield f"#SBATCH --job-name={name}"
    yield f"#SBATCH --nodes={job.nodes}"
    yield "# one task per node, which starts the node's ranks"
    yield "#SBATCH --ntasks-per-node=1"
    if job.gpus:
        yield f"#SBATCH --gpus-per-node={job.ranks_per_node}"
    if job.cpus_per_task:
        yield f"#SBATCH --cpus-per-task={job.cpus_per_task}"
    else:
        yield "# without a number of cores a task would get one: whole nodes"
        yield "#SBATCH --exclusive"
    for key in ("time", "partition", "account"):
        if value := getattr(job, key):
            yield f"#SBATCH --{key}={value}"
    yield from (f"#SBATCH --{option}" for option in job.options)
    yield f"# SIGTERM to the ranks {job.signal_before} s before the time limit (up to a minute earlier): time for a step and a checkpoint"
    yield f"#SBATCH --signal=TERM@{job.signal_before}"
    yield "# after a preemption or the loss of a node Slurm puts the job back into the queue, and the log goes on"
    yield "#SBATCH --requeue"
    yield "#SBATCH --open-mode=append"
    yield "# one job of this name at a time: two would write the same run"
    yield "#SBATCH --dependency=singleton"
    yield "# where ltrain launch was called: the config's relative paths start there"
    yield f'#SBATCH --chdir="{Path.cwd()}"'
    yield f'#SBATCH --output="{str(folder / "job.log").replace("%", "%%")}"'
    yield ""
    yield "# the code as it was when this was written; the working folder, which may hold another ltrain, is kept out"
    yield f"export PYTHONPATH={quote(str(folder / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
    yield "# lines reach the log when they are written, and a rank that a signal ends says where it was"
    yield "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1"
    if job.gpus:
        yield "# NCCL says why it fails"
        yield "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}"
    else:
        yield "# these ranks use no GPU, even where there is one"
        yield "export CUDA_VISIBLE_DEVICES="
    yield "# the ranks meet at the first node, at a port of this job's own below those that the system gives away"
    yield 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield "export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))"
    yield ""
    yield "# a SIGTERM that reaches this shell too must not end it before the ranks have saved"
    yield "trap : TERM"
    yield f"# tasks do not inherit the job's cores; {_WAIT} s after one node has ended the others are killed"
    cores = job.cpus_per_task or "$SLURM_CPUS_ON_NODE"
    command = [sys.executable, "-m", "ltrain.launch.node", str(job.ranks_per_node), str(folder / "config.yaml")]
    yield f'srun --cpus-per-task="{cores}" --kill-on-bad-exit=0 --wait={_WAIT} \\'
    yield f"    {shlex.join(command)}"
    yield "code=$?"
    yield ""
    yield f"# {STOPPED}: stopped by a signal, saved, not finished. Back into the queue, unless Slurm is ending the job (a preempted one"
    yield "# it puts back itself, and a cancelled one should stay away)."
    yield f'if [ "$code" -eq {STOPPED} ] && scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q " JobState=RUNNING "; then'
    yield '    scontrol requeue "$SLURM_JOB_ID"'
    yield "fi"
    yield 'exit "$code"'
