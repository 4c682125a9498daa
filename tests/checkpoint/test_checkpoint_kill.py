"""A save killed by SIGKILL at any instant leaves the old state or the new one."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from ltrain.checkpoint import Checkpoint, Entry, Saver, clean, newest_whole, save
from ltrain.checkpoint.folder import steps
from tests.checkpoint.thread_ranks import ThreadCollectives, on_ranks

RANKS, ROWS = 2, 3000  # 48 kB of each kind per rank: larger than the file buffer, so that writes reach the file in several calls
CALLS = {"write", "flush", "fsync", "open", "close", "mkdir", "rename", "unlink", "rmdir"}


@pytest.fixture(scope="module")
def fresh():
    """A process that has only this test's imports and no other threads, so that it can fork victims cheaply."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def fork(victim: Callable[..., None], *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # rather than hang
        torch.set_num_threads(1)
        try:
            victim(*arguments)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    """Negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def marked(rank: int, mark: int) -> list[Entry]:
    return [
        Entry("w", kind, (RANKS * ROWS, 4), (rank * ROWS, 0), torch.full((ROWS, 4), mark, dtype=torch.int32))
        for kind in ("param", "exp_avg", "exp_avg_sq")
    ]


def save_marked(root: Path, step: int, mark: int, collectives: ThreadCollectives, keep: int = 2) -> Path:
    """A checkpoint whose every part says `mark`."""
    return save(root, step, marked(collectives.rank, mark), {"mark": mark}, collectives, {"config.yaml": b"mark: %d\n" % mark}, keep)


def mark_of(path: Path) -> int:
    with Checkpoint(path, verify=True) as checkpoint:
        mark = checkpoint.meta["mark"]
        assert all((checkpoint.read("w", kind) == mark).all() for kind in ("param", "exp_avg", "exp_avg_sq"))
        assert (path / "config.yaml").read_text() == f"mark: {mark}\n"
    return mark


def dies_at_call(root: Path, number: int, background: bool) -> None:
    """Save step 2 again and then step 3 (which prunes step 1), killed before file-system call `number` of all ranks together."""
    left = itertools.count(number, -1)

    def profile(frame, event, called):
        inside = frame.f_code.co_filename.endswith(("shard.py", "folder.py", "save.py", "shutil.py", "pathlib.py", "load.py"))
        if event == "c_call" and called.__name__ in CALLS and inside and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)

    def work(c):
        if not background:
            save_marked(root, 2, 22, c)
            save_marked(root, 3, 33, c)
            return
        saver = Saver(root, c, keep=2)
        for step, mark in ((2, 22), (3, 33)):
            saver.save(step, marked(c.rank, mark), {"mark": mark}, {"config.yaml": b"mark: %d\n" % mark})
        saver.wait()

    assert on_ranks(RANKS, work) == [None] * RANKS
    os._exit(0)


def saves_for_ever(root: Path, first: int) -> None:
    def work(c):
        for step in itertools.count(first):
            save_marked(root, step, step, c)
            save_marked(root, step, step, c)  # and replaced

    on_ranks(RANKS, work)


def check_survivor(root: Path, save_again: bool = True) -> tuple[str, int]:
    path, warnings = newest_whole(root)
    assert path is not None
    assert not warnings
    mark = mark_of(path)
    step = int(path.name[-8:])
    for older in steps(root).values():  # nothing half-deleted looks whole
        mark_of(older)
    # the next process takes over: everything half-done goes and saving works
    on_ranks(RANKS, lambda c: clean(root, c))
    assert {p.name[:5] for p in root.iterdir()} <= {"step-", ".lock"}
    assert mark_of(newest_whole(root)[0]) == mark
    if save_again:
        on_ranks(RANKS, lambda c: save_marked(root, step + 1, 99, c))
        assert mark_of(root / f"step-{step + 1:08d}") == 99
    return path.name, mark


def kill_before_every_call(folder: Path, background: bool) -> dict[int, tuple[str, int]]:
    outcomes = {}
    before = folder / "before"
    on_ranks(RANKS, lambda c: [save_marked(before, step, step, c) for step in (1, 2)])
    for number in itertools.count(step=2 if background else 1):
        root = shutil.copytree(before, folder / str(number))
        code = exit_code(fork(dies_at_call, root, number, background))
        if code == 0:
            break  # more calls than two saves make
        assert code == -signal.SIGKILL
        outcomes[number] = check_survivor(root, save_again=number % 4 == 0)
    return outcomes


@pytest.mark.parametrize("background", [False, True])
def test_killed_before_every_file_system_call(fresh, tmp_path, background):
    outcomes = fresh.submit(kill_before_every_call, tmp_path, background).result()
    marks = [mark for _, mark in outcomes.values()]
    assert len(marks) > (20 if background else 40)
    assert set(marks) == {2, 22, 33}
    assert marks == sorted(marks)  # once new, never old again


def kill_at_random(root: Path) -> tuple[int, int]:
    """How many kills left half-done work, and how many checkpoints were begun."""
    delays = random.Random(0)
    began = time.monotonic()
    on_ranks(RANKS, lambda c: save_marked(root, 2, 2, c))
    one_save = time.monotonic() - began  # as slow as this machine is at the moment
    hidden = 0
    for _ in range(25):
        before = newest_whole(root)[0]
        pid = fork(saves_for_ever, root, int(before.name[-8:]) + 1)
        time.sleep((0.2 + 4 * delays.random()) * one_save)
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        hidden += any(p.name.startswith((".tmp", ".old", ".trash")) for p in root.iterdir())
        path, warnings = newest_whole(root)
        assert not warnings
        assert path.name[-8:] >= before.name[-8:]
        assert mark_of(path) == int(path.name[-8:])
    check_survivor(root)
    return hidden, int(newest_whole(root)[0].name[-8:])


def test_killed_at_random_moments(fresh, tmp_path):
    hidden, step = fresh.submit(kill_at_random, tmp_path).result()
    assert hidden >= 5  # the kills did fall inside saves
    assert step > 4
