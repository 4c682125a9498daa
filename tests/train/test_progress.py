"""The progress display in a terminal and in a log file."""

import io

import pytest

from ltrain.train import progress
from ltrain.train.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_whole_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    shown = Progress(110, start=10, every=10, stream=out)
    for step in range(11, 111):
        clock[0] += 1
        shown.update(step, loss=2.5, tokens_per_second=1234.5, lr=1e-3)
    shown.note("a note")
    shown.close()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    assert lines[0] == "step 11/110: loss 2.5000, 1,234 tokens/s, lr 1.00e-03, ETA 1:39"
    assert len(lines) == 12 and lines[-2].startswith("step 110/110") and lines[-1] == "a note"


def test_a_terminal_gets_a_bar_that_starts_where_the_run_goes_on() -> None:
    out = Terminal()
    shown = Progress(20, start=10, stream=out)
    shown.update(15, loss=2.5, tokens_per_second=1234.5, lr=1e-3)
    shown.note("a note")
    shown.close()
    assert "10/20" in out.getvalue() and "15/20" in out.getvalue() and "loss 2.5000" in out.getvalue() and "a note\n" in out.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 83, 3723)] == ["0:00", "1:23", "1:02:03"]
