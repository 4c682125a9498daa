"""What a person watches while a run trains: a bar in a terminal, a line now and then in a log file."""

import sys
import time
from typing import IO


class Progress:
    """Loss, tokens per second, learning rate and time left.

    Args:
        total: steps of the whole run.
        start: steps that an earlier process did.
        every: seconds between lines where `stream` is not a terminal; the first and the last step always have one.
        stream: where to, stderr by default.
    """

    def __init__(self, total: int, start: int = 0, every: float = 10.0, stream: IO[str] | None = None):
        self.total, self.step, self.every = total, start, every
        self.stream = stream if stream is not None else sys.stderr
        self._start, self._began, self._printed = start, time.monotonic(), -float("inf")
        self._bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=self.stream)

    def update(self, step: int, *, loss: float, tokens_per_second: float, lr: float) -> None:
        """After step `step` (counted from 1)."""
        values = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, lr {lr:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self.step)
        self.step = step
        now = time.monotonic()
        if self._bar is None and (now - self._printed >= self.every or step == self.total):
            left = (now - self._began) / max(step - self._start, 1) * (self.total - step)
            self._printed = now
            print(f"step {step}/{self.total}: {values}, ETA {duration(left)}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """83 -> 1:23, 3723 -> 1:02:03"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
