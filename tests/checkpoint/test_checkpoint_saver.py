"""Checkpoints that are written while training goes on."""

import pickle
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrain.checkpoint import Checkpoint, CheckpointError, DamagedError, Entry, LocalCollectives, Saver, newest, newest_whole, save
from ltrain.checkpoint.index import FileRecord, Index
from ltrain.checkpoint.shard import read_crc
from tests.checkpoint.thread_ranks import ThreadCollectives, on_ranks


class Disk:
    """A disk on which writing a shard takes until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from ltrain.checkpoint.save import write_shard

        self.free, self.writing = threading.Event(), threading.Semaphore(0)

        def slow(path: Path, tensors: Any) -> Any:
            self.writing.release()
            assert self.free.wait(10)
            return write_shard(path, tensors)

        monkeypatch.setattr(sys.modules["ltrain.checkpoint.save"], "write_shard", slow)


def rows(rank: int, size: int, value: float, count: int = 4) -> list[Entry]:
    return [Entry("w", "param", (size * count, 2), (rank * count, 0), torch.full((count, 2), value))]


def poll_until_saved(saver: Saver) -> Any:
    while (saved := saver.poll()) is None:
        time.sleep(0.001)
    return saved


@pytest.mark.parametrize("ranks", [1, 3])
def test_training_goes_on_and_changes_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    disk = Disk(monkeypatch)

    def work(c: ThreadCollectives) -> Any:
        saver, entries = Saver(tmp_path, c, keep=1), rows(c.rank, ranks, 1.0)
        assert saver.save(1, entries, {"step": 1}) == []
        entries[0].tensor.fill_(-1.0)  # the next step
        assert disk.writing.acquire(timeout=5)
        for _ in range(3):
            assert saver.poll() is None
            assert newest(tmp_path) is None
        if c.rank == 0:
            disk.free.set()
        first = poll_until_saved(saver)
        assert newest_whole(tmp_path)[0] == first.path == tmp_path / "step-00000001"
        complete = saver.save(2, rows(c.rank, ranks, 2.0), {"step": 2}) + saver.wait()
        assert saver.poll() is None
        return first, complete

    for first, complete in on_ranks(ranks, work):
        assert [saved.step for saved in complete] == [2]
        assert 0 < first.blocked_seconds < first.seconds
    assert [p.name for p in sorted(tmp_path.glob("*step-*"))] == ["step-00000002"]  # keep=1, and nothing is left over
    with Checkpoint(tmp_path / "step-00000002", verify=True) as checkpoint:
        assert checkpoint.read("w", "param").unique().tolist() == [2.0]


def test_what_was_saved_is_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    saver, entries = Saver(tmp_path, LocalCollectives()), rows(0, 1, 1.0)
    saver.save(1, entries, {})
    entries[0].tensor.fill_(-1.0)
    disk.free.set()
    (saved,) = saver.wait()
    assert Checkpoint(saved.path, verify=True).read("w", "param").unique().tolist() == [1.0]


def test_one_save_at_a_time_in_one_copy_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    saver, homes = Saver(tmp_path, LocalCollectives()), []
    threading.Timer(0.1, disk.free.set).start()
    for step in range(1, 4):
        complete = saver.save(step, rows(0, 1, float(step)), {})
        assert [saved.step for saved in complete] == ([step - 1] if step > 1 else [])
        homes.append([x.data_ptr() for x in saver._copies._memory])
    assert homes[0] == homes[1] == homes[2] and len(homes[0]) == 1
    saver.save(4, rows(0, 1, 4.0, count=8), {})  # another model: its memory takes the place
    assert len(saver._copies._memory) == 1 and saver._copies._memory[0].shape == (8, 2)
    assert [saved.step for saved in saver.wait()] == [4]


def test_synchronous_saves_are_complete_at_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path, LocalCollectives(), asynchronous=False)
    (saved,) = saver.save(1, rows(0, 1, 1.0), {})
    assert newest_whole(tmp_path)[0] == saved.path and saver.poll() is None


def test_a_disk_that_fills_in_the_background(tmp_path: Path) -> None:
    """One rank meets it; every rank hears of it at a later step, the older checkpoint stays, and the next save works."""

    def work(c: ThreadCollectives) -> Any:
        saver = Saver(tmp_path, c)
        saver.save(1, rows(c.rank, 3, 1.0), {})
        saver.wait()
        mine = [Entry(f"w{c.rank}", "param", (n := 5000 if c.rank == 1 else 10, 8), (0, 0), torch.ones(n, 8))]
        saver.save(2, mine, {})
        try:
            poll_until_saved(saver)
        except CheckpointError as error:
            saver.save(3, rows(c.rank, 3, 3.0), {})
            return str(error), saver.wait()[0].path
        return "no error"

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        outcomes = on_ranks(3, work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(set(outcomes)) == 1, outcomes
    sentence, path = outcomes[0]
    assert sentence.startswith("rank 1: no room for the checkpoint of step 2: it needs") and "\n" not in sentence
    assert [p.name for p in sorted(tmp_path.glob("*step-*"))] == ["step-00000001", "step-00000003"]
    assert newest_whole(tmp_path) == (path, [])


def test_a_copy_that_fails_on_one_rank_leaves_none_waiting(tmp_path: Path) -> None:
    """The ranks meet in a collective between any two tensors, as an engine's do."""

    def state(c: ThreadCollectives) -> Any:
        for i in range(4):
            c.all(True)
            broken = c.rank == 2 and i == 1
            yield Entry(f"w{c.rank}.{i}", "param", (2,), (0,), torch.ones(2, device="meta" if broken else "cpu"))

    for make in (lambda c: Saver(tmp_path, c).save(1, state(c), {}), lambda c: save(tmp_path, 1, state(c), {}, c)):
        errors = on_ranks(4, make)
        assert all(isinstance(e, CheckpointError) for e in errors), errors
        assert len({str(e) for e in errors}) == 1 and str(errors[0]).startswith("rank 2: ")
    assert not list(tmp_path.iterdir())


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    """Beside the shards, in the place of one with its checksum put right, and as the index."""
    mark, trap = tmp_path / "mark", pickle.dumps(Trap(tmp_path / "mark"))
    pickle.loads(trap)
    assert mark.exists()  # the trap works
    mark.unlink()
    path = save(tmp_path / "checkpoints", 1, rows(0, 1, 1.0), {}, LocalCollectives())
    for name in ("rank-00001.pt", "model.pkl", ".metadata", "rank-00000.safetensors.pt"):
        (path / name).write_bytes(trap)
    opened: list[str] = []
    listening = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if listening and event in ("open", "pickle.find_class") else None)
    assert newest_whole(tmp_path / "checkpoints") == (path, [])
    assert Checkpoint(path, verify=True).read("w", "param").unique().tolist() == [1.0]
    shard = path / "rank-00000.safetensors"
    assert str(shard) in opened and not [name for name in opened if name.endswith((".pt", ".pkl", ".metadata")) or "builtins" in name]

    shard.write_bytes(trap)
    index = Index.decode((path / "index.json").read_bytes(), "index")
    files = {shard.name: FileRecord(shard.stat().st_size, read_crc(shard))}
    (path / "index.json").write_bytes(Index(1, {}, index.tensors, files).encode())
    with pytest.raises(DamagedError, match="cannot be read"):
        Checkpoint(path, verify=True).read("w", "param")
    (path / "index.json").write_bytes(trap)
    with pytest.raises(DamagedError, match="not a checkpoint index"):
        Checkpoint(path)
    listening = False
    assert not mark.exists()
