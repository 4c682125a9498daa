"""Stopping a run from outside: SIGTERM asks it to save and leave after the step in hand."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While active, `raised` tells whether SIGTERM has come."""

    def __init__(self) -> None:
        self.raised = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.raised = True

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)
