"""The ranks of one machine: started together, told of signals, ended together.

Not torchrun, for two reasons: it kills its ranks 30 seconds after a SIGTERM, less than a long step and its checkpoint may take,
and it leaves with exit code 1 whatever the ranks said, so that nothing outside can tell a run that was stopped from one that failed.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STOPPED = 75  # exit code of `ltrain train` that was stopped by SIGTERM, saved and is not finished: EX_TEMPFAIL of sysexits.h
GRACE = (
    60.0  # seconds that the other ranks get to leave after one has failed: long enough to print a traceback, too short for an exchange to time out
)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Place:
    """Where these ranks are among all: the machine, how many there are, and where the first rank is met."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0  # 0: any free port, for one machine


@dataclass(frozen=True)
class End:
    code: (
        int  # 0 when every rank ended with 0; otherwise as the first that failed, 128 + the signal where one killed it; STOPPED where nothing failed
    )
    signalled: bool  # a person or a scheduler asked for the end


def run(command: Sequence[str], ranks: int, place: Place | None = None, environment: Mapping[str, str] | None = None) -> End:
    """Start `command` `ranks` times with torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR...), wait, and tell how it ended.

    SIGTERM and SIGINT that come meanwhile are passed on to every rank, which may take its time over them. When a rank fails the others have
    GRACE seconds. When this process is killed the ranks get SIGTERM from the kernel. Call it in the main thread.
    """
    place = place or Place()
    base = {**os.environ, **(environment or {})}
    base.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    base |= {
        "WORLD_SIZE": str(ranks * place.nodes),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port or _free_port()),
    }
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    processes: list[subprocess.Popen[bytes]] = []
    try:
        for local in range(ranks):
            named = base | {"LOCAL_RANK": str(local), "RANK": str(place.node * ranks + local)}
            # a session of its own: Ctrl-C of the terminal reaches it once, from here
            processes.append(subprocess.Popen(command, env=named, start_new_session=True, preexec_fn=die_with_parent))
        return _wait(processes, noted, place.node * ranks)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]], noted: list[int], first_rank: int) -> End:
    signalled, failure, deadline = False, 0, float("inf")
    seen: set[int] = set()
    while len(seen) < len(processes):
        while noted:
            number, signalled = noted.pop(0), True
            for process in processes:
                process.send_signal(number)  # nothing happens where it has ended
        for local, process in enumerate(processes):
            code = process.poll()
            if code is None or local in seen:
                continue
            seen.add(local)
            if code:
                deadline = min(deadline, time.monotonic() + GRACE)
            if failure in (0, STOPPED) and code:
                failure = code if code > 0 else 128 - code
            if code and (code < 0 or code not in (2, STOPPED)):
                how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
                print(f"ltrain: rank {first_rank + local} ended with {how}", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            left = [local for local in range(len(processes)) if local not in seen]
            ranks = ", ".join(str(first_rank + local) for local in left)
            print(f"ltrain: rank(s) {ranks} did not leave within {GRACE:.0f} s after another had: killed", file=sys.stderr, flush=True)
            for local in left:
                processes[local].kill()
            deadline = float("inf")
        time.sleep(0.05)
    return End(failure, signalled)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
