"""Ranks that stay alive for a whole test session: one pool of gloo processes for each world size.

`pool(4).run(function, *args)` calls function(*args) on every rank and gives the results by rank. The function is
imported by name on the ranks, so it stands at the top of a module; inside it `torch.distributed` is initialised and the
default group holds the pool's ranks. What it imports, it imports there; what many of them
import and is slow stands in the preload list, read once for all ranks of all pools.
"""

import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START = 120.0  # seconds for the ranks to import torch and meet
TIMEOUT = {"cpu": 60.0, "cuda": 300.0}  # seconds for a function, by device: kernels are compiled on a GPU
GRACE = 2.0  # seconds the others get to answer after one rank failed
THREADS = 200  # of a rank, most of them polling for groups that autograd or DeepSpeed kept alive: with more it is replaced


def fork_server() -> Any:
    """Processes of the session's fork server, which has imported once what they need: a rank starts in a moment."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.utils.checkpoint", "ltrain.parallel.engines.megatron", "ltrain.train.loop"])
    return context


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


def _serve(rank: int, size: int, folder: str, connection: Connection, device: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session's own process ends the pool
    stacks = open(Path(folder, f"stack{rank}"), "w")  # noqa: SIM115 - open as long as the process
    faulthandler.register(signal.SIGUSR1, stacks)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    gc.collect()
    gc.freeze()  # what was imported stays: collecting after each function need not walk it
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            break
        try:
            sys.path[:], payload = pickle.loads(request)
            function, args = pickle.loads(payload)
            reply = True, function(*args)
        except BaseException:
            reply = False, traceback.format_exc()
        function = args = None
        _dissolve_groups()
        try:
            answer = pickle.dumps((*reply, _threads()))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc(), 0))
        reply = None
        connection.send_bytes(answer)
    os._exit(0)  # no farewell over a network whose other ends may be gone


def _threads() -> int:
    """Of this process, those of C++ libraries included."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def _dissolve_groups() -> None:
    """The groups that a function leaves, megatron's among them: each keeps threads that poll, hundreds after some layouts."""
    import torch.distributed as dist

    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    # Its threads end with the last reference to a group, and megatron's data parallelism hangs on hooks of autograd in a
    # circle that Python's collector cannot see: it stays, emptied.
    for left in gc.get_objects():
        if type(left).__name__ == "DistributedDataParallel":
            vars(left).clear()
    gc.collect()


class Pool:
    """`size` ranks with gloo, or on a GPU each with NCCL. After a failure the ranks are replaced, as their groups may be out of step."""

    def __init__(self, size: int, device: str = "cpu"):
        self.size, self.device = size, device
        self._ranks: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = mp.get_context("spawn") if self.device == "cuda" else fork_server()  # a process that forks cannot hand its CUDA on
        self._folder = tempfile.mkdtemp(prefix="ranks")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, self._folder, theirs, self.device), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for rank, (_, connection) in enumerate(self._ranks):
            if not connection.poll(START):
                self.close()
                raise RankError(f"rank {rank} of {self.size} did not start in {START:.0f} s")
            connection.recv_bytes()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """function(*args) on every rank -> results by rank. RankError with the traceback of a rank that fails or hangs."""
        if not self._ranks:
            self._start()
        request = pickle.dumps((list(sys.path), pickle.dumps((function, args))))
        for _, connection in self._ranks:
            connection.send_bytes(request)
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        threads = 0
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        timeout = TIMEOUT[self.device] if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    fine, value, held = pickle.loads(ready.recv_bytes())
                except (EOFError, ConnectionResetError):
                    fine, value, held = False, "its process ended", 0
                threads = max(threads, held)
                if fine:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting and not failures:
            stacks = "\n".join(f"rank {rank} hangs in\n{self._stack(rank)}" for rank in waiting.values())
            self.close()
            raise RankError(f"no answer from rank(s) {sorted(waiting.values())} of {self.size} after {timeout:.0f} s\n{stacks}")
        if failures:
            self.close()
            raise RankError("\n".join(f"rank {rank} of {self.size}: {text}" for rank, text in sorted(failures.items())))
        if threads > THREADS:
            self.close()
        return results

    def _stack(self, rank: int) -> str:
        process = self._ranks[rank][0]
        if not process.is_alive():
            return "(its process ended)"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return Path(self._folder, f"stack{rank}").read_text()

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        if self._ranks:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._ranks = []


class Pools:
    """pools(size): the session's pool of that many ranks."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        return self._pools.setdefault(size, Pool(size, self.device))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
