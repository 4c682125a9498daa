"""Damaged files, full disks, leftovers and pruning: what was whole before stays usable, and people learn what is wrong."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ltrain.checkpoint import Checkpoint, CheckpointError, DamagedError, Entry, LocalCollectives, clean, newest, newest_sized, newest_whole, save
from ltrain.checkpoint.folder import locked
from tests.checkpoint.thread_ranks import on_ranks

LOCAL = LocalCollectives()


def saved(root: Path, step: int, value: float | None = None, rows: int = 1000, keep: int = 0) -> Path:
    w = torch.full((rows, 8), float(step) if value is None else value)
    return save(root, step, [Entry("w", "param", (rows, 8), (0, 0), w)], {"tokens": step}, LOCAL, {"config.yaml": b"a: 1\n"}, keep)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name != ".lock")


def truncate(path: Path) -> None:
    with open(path / "rank-00000.safetensors", "r+b") as file:
        file.truncate(100)


def flip(path: Path, file: str, at: int) -> None:
    content = bytearray((path / file).read_bytes())
    content[at] ^= 1
    (path / file).write_bytes(content)


def edit_index(path: Path, **changes) -> None:
    content = json.loads((path / "index.json").read_bytes())
    (path / "index.json").write_text(json.dumps(content | changes))


def test_nothing_saved_yet(tmp_path):
    assert newest(tmp_path / "none") is None
    assert newest_whole(tmp_path / "none") == (None, [])
    assert newest_sized(tmp_path / "none") is None
    clean(tmp_path / "none", LOCAL)


DAMAGES = {
    "truncated": (truncate, r"rank-00000\.safetensors has 100 bytes and should have"),
    "missing": (lambda path: (path / "rank-00000.safetensors").unlink(), r"rank-00000\.safetensors is missing"),
    "one bit of a tensor": (lambda path: flip(path, "rank-00000.safetensors", -1), r"rank-00000\.safetensors does not match its checksum"),
    "one bit of a header": (lambda path: flip(path, "rank-00000.safetensors", 20), r"rank-00000\.safetensors does not match its checksum"),
    "config": (lambda path: flip(path, "config.yaml", 0), r"config\.yaml does not match its checksum"),
    "index cut": (lambda path: (path / "index.json").write_bytes((path / "index.json").read_bytes()[:50]), "is not a checkpoint index"),
    "index empty": (lambda path: (path / "index.json").write_bytes(b"[]"), "is not a checkpoint index"),
    "index changed": (lambda path: edit_index(path, step=3), "does not match its own checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, damage, ranks):
    for step in (1, 2):
        saved(tmp_path, step)
    act, words = DAMAGES[damage]
    act(newest(tmp_path))
    with pytest.raises(DamagedError, match=words):
        Checkpoint(newest(tmp_path), verify=True)
    for path, warnings in on_ranks(ranks, lambda c: newest_whole(tmp_path, c)):
        assert path == tmp_path / "step-00000001"
        assert len(warnings) == 1
        assert warnings[0].startswith("checkpoint step-00000002 is damaged")
    assert newest_sized(tmp_path) == tmp_path / f"step-0000000{2 if 'bit' in damage or damage == 'config' else 1}"
    truncate(tmp_path / "step-00000001")
    assert newest_sized(tmp_path) == tmp_path / "step-00000002"
    for error in on_ranks(ranks, lambda c: newest_whole(tmp_path, c)):
        assert isinstance(error, CheckpointError)
        assert "none of the 2 checkpoints" in str(error)


def test_damage_that_sizes_do_not_show_is_found_on_reading(tmp_path):
    path = saved(tmp_path, 1)
    flip(path, "rank-00000.safetensors", 8 + 3)  # in the key
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors (cannot be read|holds)"):
        Checkpoint(path).read("w", "param")


def test_another_version_is_an_error_and_not_damage(tmp_path):
    saved(tmp_path, 1)
    edit_index(saved(tmp_path, 2), version=2)
    for find in (newest_whole, newest_sized):
        with pytest.raises(CheckpointError, match="has checkpoint format 2 and this ltrain reads 1"):
            find(tmp_path)


def test_prune_keeps_the_newest_and_never_what_lies_ahead(tmp_path):
    for step in (10, 20, 30, 40):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    truncate(tmp_path / "step-00000040")
    saved(tmp_path, 35, keep=2)  # resumed from 30: the damaged 40 counts for nothing
    assert names(tmp_path) == ["step-00000030", "step-00000035", "step-00000040"]
    assert newest_whole(tmp_path)[0] == tmp_path / "step-00000035"
    saved(tmp_path, 40, keep=0)
    saved(tmp_path, 50, keep=0)
    assert len(names(tmp_path)) == 5 - 1
    assert newest_whole(tmp_path) == (tmp_path / "step-00000050", [])


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 5, value=1.0)
    path = saved(tmp_path, 5, value=2.0)
    assert names(tmp_path) == ["step-00000005"]
    assert Checkpoint(path, verify=True).read("w", "param").unique().tolist() == [2.0]


def test_leftovers_of_dead_saves_go_and_an_interrupted_replacement_is_undone(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000002-aaaa")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".trash-step-00000000-aaaa")
    (tmp_path / "step-00000001").rename(tmp_path / ".old-step-00000001")
    assert newest_whole(tmp_path) == (tmp_path / ".old-step-00000001", [])
    clean(tmp_path, LOCAL)
    assert names(tmp_path) == ["step-00000001"]
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".old-step-00000001")
    assert newest(tmp_path).name == "step-00000001"
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_live_save_of_another_process_is_left_alone(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-live").mkdir()
    with locked(tmp_path) as free:
        assert free
        clean(tmp_path, LOCAL)
        with pytest.raises(CheckpointError, match="another process is saving"):
            saved(tmp_path, 2)
    assert names(tmp_path) == [".tmp-step-00000002-live", "step-00000001"]
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path):
    saved(tmp_path, 1)
    huge = torch.zeros(1).expand(1 << 50)  # 4 PB that take no memory
    for error in on_ranks(2, lambda c: save(tmp_path, 2, [Entry("w", "param", (1 << 50,), (0,), huge)] if c.rank else [], {}, c)):
        assert isinstance(error, CheckpointError)
        assert "it needs 4,503,599,627.4 MB and" in str(error)
        assert "MB free: free space there, or set run.dir to another disk" in str(error)
    assert names(tmp_path) == ["step-00000001"]


def test_a_disk_that_fills_while_writing(tmp_path):
    saved(tmp_path, 1)

    def work(c):
        rows = 5000 if c.rank == 1 else 10  # only rank 1 meets the limit
        save(tmp_path, 2, [Entry(f"w{c.rank}", "param", (rows, 8), (0, 0), torch.ones(rows, 8))], {}, c)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        errors = on_ranks(3, work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len({str(e) for e in errors}) == 1, errors
    assert isinstance(errors[0], CheckpointError)
    assert str(errors[0]).startswith("rank 1: no room for the checkpoint of step 2: it needs 0.2 MB and")
    assert "(File too large)" in str(errors[0])
    assert names(tmp_path) == ["step-00000001"]
    assert newest_whole(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_full_file_system(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        saved(mount, 1, rows=10_000)  # 320 kB
        # the tensors alone would fit, their header and index do not: met while writing, not beforehand
        room = shutil.disk_usage(mount).free // (8 * 4)
        with pytest.raises(CheckpointError, match=r"no room for the checkpoint of step 2: it needs 0\.. MB .*No space left on device"):
            saved(mount, 2, rows=room - 1)
        assert names(mount) == ["step-00000001"]
        assert newest_whole(mount) == (mount / "step-00000001", [])
    finally:
        subprocess.run(["umount", mount], check=True)


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 1 into .*: check that folder"):
        saved(tmp_path / "file" / "checkpoints", 1)


def test_one_rank_failing_fails_all(tmp_path):
    def broken(rank):
        yield Entry(f"w{rank}", "param", (2,), (0,), torch.ones(2))
        if rank == 2:
            raise RuntimeError("out of memory")

    errors = on_ranks(4, lambda c: save(tmp_path, 1, broken(c.rank), {}, c))
    assert {str(e) for e in errors} == {"rank 2: RuntimeError: out of memory"}
    assert names(tmp_path) == []
