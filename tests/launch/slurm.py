"""A real Slurm of one machine in a folder of its own: munged, slurmctld and a slurmd for each of its nodes.

with Slurm(folder, nodes=1) as slurm:
    slurm("sbatch", "job.sbatch")
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
"""


def unavailable() -> str:
    """Why there can be no Slurm here, after an attempt to install it; empty where there can be one."""
    if all(map(shutil.which, DAEMONS)):
        return "" if os.geteuid() == 0 else "Slurm's daemons need root"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no Slurm here, and no apt-get with the rights to install it"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *words], env=quiet, capture_output=True, text=True, timeout=100)
    if done.returncode or not all(map(shutil.which, DAEMONS)):
        return f"Slurm cannot be installed here: {(done.stderr.strip().splitlines() or ['apt-get failed'])[-1]}"
    return ""


class Slurm:
    """Jobs run as root on `nodes` nodes, which are all this machine; each has two cores."""

    def __init__(self, folder: Path, nodes: int = 1):
        self.host = os.uname().nodename.partition(".")[0]
        self.dir = folder.absolute()
        self.nodes = [self.host, *(f"{self.host}-{i}" for i in range(1, nodes))]  # the first has a name with an address: the ranks meet there
        self.environment = {**os.environ, "SLURM_CONF": str(self.dir / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, *words: str, **options: str | Path) -> str:
        """What a client command of Slurm says."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}{self.logs()}"
        return str(done.stdout)

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED..."""
        return self.shown(job, "JobState")

    def shown(self, job: str, key: str) -> str:
        fields = dict(word.partition("=")[::2] for word in self("scontrol", "show", "job", "--oneliner", job).split())
        return fields[key]

    def restart_now(self, job: str) -> None:
        """A job that went back into the queue waits two minutes there; this one is taken at once, when it has left the node."""
        deadline = time.monotonic() + 60
        while self.state(job) != "PENDING":
            assert time.monotonic() < deadline, self("scontrol", "show", "job", job) + self.logs()
            time.sleep(0.1)
        time.sleep(2)  # a node takes a credential of the second in which it ended the job before for the old, revoked one
        self("scontrol", "update", f"jobid={job}", "StartTime=now")

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(self.dir.glob("*.log")))

    def _start(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "state").mkdir()
        key = self.dir / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        # ports of this process's own: another session's Slurm may run beside
        port = 20000 + os.getpid() % 10000
        lines = [CONF.format(host=self.host, port=port, dir=self.dir)]
        for i, node in enumerate(self.nodes):
            (self.dir / f"spool-{node}").mkdir()
            lines.append(f"NodeName={node} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs=2 State=UNKNOWN")
        lines.append(f"PartitionName=all Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE\n")
        (self.dir / "slurm.conf").write_text("\n".join(lines))
        names = {"--socket": "munge.sock", "--pid-file": "munged.pid", "--log-file": "munged.log", "--seed-file": "munge.seed"}
        self("munged", "--force", f"--key-file={key}", *(f"{option}={self.dir / name}" for option, name in names.items()))
        self("slurmctld", "-f", str(self.dir / "slurm.conf"))
        for node in self.nodes:
            self("slurmd", "-f", str(self.dir / "slurm.conf"), "-N", node)
        deadline = time.monotonic() + 30
        while self("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < deadline, self("sinfo") + self.logs()
            time.sleep(0.1)

    def _stop(self) -> None:
        """Jobs first, then the daemons by their pid files, whatever is left of them."""
        if (self.dir / "slurmctld.pid").exists():
            subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=self.environment, capture_output=True, timeout=30)
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30)
            time.sleep(0.5)
        for path in [*self.dir.glob("slurmd-*.pid"), self.dir / "slurmctld.pid", self.dir / "munged.pid"]:
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                continue
        deadline = time.monotonic() + 10
        while any(self.dir.glob("*.pid")) and time.monotonic() < deadline:
            time.sleep(0.1)
