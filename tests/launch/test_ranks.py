"""Processes of ranks: their environment, how they end, and who hears of a signal.

The ranks here are a few lines of Python, so that each test is short.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def supervisor(rank: str, ranks: int = 2, **options: Any) -> subprocess.Popen[str]:
    """A process that runs the lines `rank` on so many ranks; its exit code is theirs."""
    place = f"ranks.Place({', '.join(f'{key}={value!r}' for key, value in options.items() if key != 'grace')})"
    code = f"""
import sys
from ltrain.launch import ranks
ranks.GRACE = {options.get("grace", 60.0)}
end = ranks.run([sys.executable, "-Sc", {textwrap.dedent(rank)!r}], {ranks}, {place})
print("signalled" if end.signalled else "by itself", flush=True)
sys.exit(end.code)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


WAIT = """
import os, signal, sys, time
def leave(number, frame):
    os.write(1, b"got %d\\n" % number)  # in one piece: the ranks share a pipe
    sys.exit({code})
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, leave)
os.write(1, b"pid %d\\n" % os.getpid())
while True:
    time.sleep(0.02)
"""


def pids(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(count)]


def test_ranks_have_torchruns_variables() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank = f"import os, json; os.write(1, json.dumps([os.environ[n] for n in {names}]).encode() + bytes([10]))"
    code, out, err = ended(supervisor(rank, 2, node=1, nodes=3, address="first", port=1234))
    assert (code, err) == (0, "")
    rows = sorted(json.loads(line) for line in out.splitlines() if line.startswith("["))
    assert rows == [["2", "0", "6", "2", "first", "1234"], ["3", "1", "6", "2", "first", "1234"]]


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ((0, 0), 0, ""),
        ((0, 3), 3, "ltrain: rank 1 ended with exit code 3\n"),
        ((75, 75), 75, ""),
        ((75, 3), 3, "ltrain: rank 1 ended with exit code 3\n"),
        ((2, 2), 2, ""),
        ((0, -9), 137, "ltrain: rank 1 ended with signal SIGKILL\n"),
    ],
)
def test_the_exit_code_is_that_of_the_first_failure(codes: tuple[int, int], expected: int, said: str) -> None:
    rank = f"""
    import os, sys
    code = {codes}[int(os.environ["RANK"])]
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
    """
    assert ended(supervisor(rank)) == (expected, "by itself\n", said)


def test_a_rank_that_does_not_leave_after_a_failure_is_killed() -> None:
    rank = """
    import os, sys, time
    if os.environ["RANK"] == "0":
        sys.exit(4)
    time.sleep(60)
    """
    code, _, err = ended(supervisor(rank, grace=0.5))
    assert code == 4 and "rank(s) 1 did not leave within 0 s" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_they_may_take_their_time(number: signal.Signals) -> None:
    slow = WAIT.replace("sys.exit({code})", "time.sleep(1); sys.exit(75)")
    process = supervisor(slow)
    pids(process, 2)
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, err) == (75, "")
    assert out.splitlines() == [f"got {int(number)}"] * 2 + ["signalled"]


def test_ranks_hear_when_their_supervisor_is_killed() -> None:
    process = supervisor(WAIT.format(code=75))
    started = pids(process, 2)
    process.kill()
    assert process.communicate(timeout=30)[0].splitlines() == ["got 15", "got 15"]  # the pipe closes when both have gone
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_failed_run_is_taken_up_again_and_a_refused_or_stopped_one_is_not(tmp_path: Path) -> None:
    """`launch local` with a stand-in for the interpreter that notes its arguments and fails."""
    python = tmp_path / "python"
    note = tmp_path / "notes"
    config = ROOT / "configs" / "quickstart.yaml"
    code = f"import sys; sys.executable = {str(python)!r}; from ltrain.cli import main; main(sys.argv[1:])"
    for exit_code, starts in ((3, 3), (2, 1), (75, 1), (0, 1)):
        python.write_text(f'#!/bin/sh\necho "$@" >> {note}\nexit {exit_code}\n')
        python.chmod(0o755)
        note.unlink(missing_ok=True)
        words = ["launch", "local", str(config), "--ranks", "1", "--max-restarts", "2", "train.steps=5"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
        first = f"-m ltrain train {config} train.steps=5 device=cpu"
        assert note.read_text().splitlines() == [first, *[f"{first} run.resume=true"] * (starts - 1)]
        assert done.returncode == exit_code and done.stderr.count("restart") == starts - 1, done.stderr
