"""What one rank of many would do and send, found on a single device: its computing is run, its messages are only written down.

`replay` sets such traces on a network of stated speed. What overlaps with what is thereby what the exchanges do: a message is under way
from the line of the program that posts it to the one that waits for it.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.parallel.context.messages import Messages, Noise, Transit


def moment(device: torch.device) -> Any:
    """Now, on the device's own clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, stop: Any) -> float:
    """Between two moments, which have passed."""
    return float(start.elapsed_time(stop) / 1e3 if isinstance(start, torch.cuda.Event) else stop - start)


class Batch(NamedTuple):
    """Messages that one rank posts together."""

    line: str  # the group that they go over: batches of one line follow each other
    kind: str
    number: int  # among those of its kind and line, empty ones too, so that all ranks give one exchange the same
    sent: Mapping[int, int]  # context rank -> bytes
    received: Mapping[int, int]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.line, self.kind, self.number


class Event(NamedTuple):
    computed: float  # seconds of computing since the event before
    batch: int | None  # which of the trace's batches; None: the end
    posted: bool  # else waited for


class Trace(NamedTuple):
    """One rank's forward and backward."""

    rank: int
    batches: list[Batch]
    events: list[Event]
    bytes: dict[str, int]  # sent, by kind of exchange

    @property
    def computing(self) -> float:
        return sum(event.computed for event in self.events)


class Recorder:
    """Takes down the posts and waits of one rank. now: gives a moment (`moment`)."""

    def __init__(self, rank: int, now: Callable[[], Any]):
        self.rank, self.now = rank, now
        self.bytes: Counter[str] = Counter()
        self.noise = Noise()
        self.begin()

    def begin(self) -> None:
        """Forget what was; the clock starts."""
        self.bytes.clear()
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._batches: list[Batch] = []
        self._moments: list[tuple[int | None, bool, Any]] = [(None, False, self.now())]

    def end(self) -> None:
        self._moments.append((None, False, self.now()))

    def trace(self) -> Trace:
        """Of what was between `begin` and `end`, when the device has finished it."""
        moments = self._moments
        events = [Event(seconds(a[2], b[2]), b[0], b[1]) for a, b in zip(moments, moments[1:], strict=False)]
        return Trace(self.rank, self._batches, events, dict(self.bytes))

    def messages(self, line: str, ranks: list[int]) -> "Messages":
        """Those of a group of these context ranks."""
        return _Recorded(self, line, ranks)

    def post(self, line: str, kind: str, sent: dict[int, int], received: dict[int, int]) -> int | None:
        """The number of the batch; None: it is empty, and nothing is posted."""
        number = self._numbers[line, kind]
        self._numbers[line, kind] += 1
        if not sent and not received:
            return None
        self.bytes[kind] += sum(sent.values())
        self._batches.append(Batch(line, kind, number, sent, received))
        self._moments.append((len(self._batches) - 1, True, self.now()))
        return len(self._batches) - 1

    def wait(self, batch: int) -> None:
        self._moments.append((batch, False, self.now()))


class _Recorded(Messages):
    def __init__(self, recorder: Recorder, line: str, ranks: list[int]):
        super().__init__(None, 1, recorder.bytes)
        self.recorder, self.line, self.ranks = recorder, line, ranks

    def post(self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, int], *, dtype: torch.dtype, device: torch.device) -> Transit:
        sent = {self.ranks[peer]: x.numel() * x.element_size() for peer, x in sends.items() if x.numel()}
        received = {self.ranks[peer]: n * dtype.itemsize for peer, n in receives.items() if n}
        batch = self.recorder.post(self.line, kind, sent, received)
        arriving = {peer: self.recorder.noise(n, dtype, device) for peer, n in receives.items() if n}
        return Transit([], [], arriving) if batch is None else _Awaited(self.recorder, batch, arriving)


class _Awaited(Transit):
    def __init__(self, recorder: Recorder, batch: int, arriving: dict[int, Tensor]):
        super().__init__([], [], arriving)
        self.recorder, self.batch = recorder, batch

    def wait(self) -> dict[int, Tensor]:
        self.recorder.wait(self.batch)
        return super().wait()


class Network(NamedTuple):
    """Links of one device, in bytes per second each way, and seconds that a batch takes beside its bytes."""

    inside: float  # to other devices of its node, together
    across: float  # to other nodes
    per_node: int  # neighbouring context ranks of a node
    latency: float

    def seconds(self, batch: Batch, rank: int) -> float:
        """Both ways, and both kinds of links, at once."""
        times = []
        for rate, near in ((self.inside, True), (self.across, False)):
            for way in (batch.sent, batch.received):
                times.append(sum(n for peer, n in way.items() if (peer // self.per_node == rank // self.per_node) == near) / rate)
        return self.latency + max(times)


FREE = Network(float("inf"), float("inf"), 1, 0.0)


def replay(traces: list[Trace], network: Network) -> list[float]:
    """When each rank is through, in seconds from a common start.

    A batch begins when all its ranks have posted it and those before it on its line are done, and takes as long as its busiest rank
    needs. Its ranks are those it goes to or comes from; where one of them was not traced, all that were traced and have such a batch.
    """
    known = {trace.rank for trace in traces}
    holders: dict[tuple[str, str, int], dict[int, tuple[Trace, Batch]]] = {}
    for i, trace in enumerate(traces):
        for batch in trace.batches:
            holders.setdefault(batch.key, {})[i] = trace, batch
    posted: dict[tuple[int, tuple[str, str, int]], float] = {}
    clocks, at = [0.0] * len(traces), [0] * len(traces)
    done: list[dict[int, float]] = [{} for _ in traces]
    free: defaultdict[tuple[int, str], float] = defaultdict(float)  # when the last batch on a line is done

    queues: list[dict[str, list[int]]] = [{} for _ in traces]  # of each line the batches that are not done, in order
    for queue, trace in zip(queues, traces, strict=True):
        for n, batch in enumerate(trace.batches):
            queue.setdefault(batch.line, []).append(n)
        for waiting in queue.values():
            waiting.reverse()

    def finish(i: int, number: int) -> bool:
        """Whether it is known when this batch of the i-th trace is done; those before it on its line are found first."""
        line = traces[i].batches[number].line
        while number not in done[i]:
            batch = traces[i].batches[queues[i][line][-1]]
            peers = {*batch.sent, *batch.received}
            with_it = {j: held for j, held in holders[batch.key].items() if j == i or not peers <= known or held[0].rank in peers}
            if any((j, batch.key) not in posted for j in with_it):
                return False
            begins = max(free[i, line], *(posted[j, batch.key] for j in with_it))
            free[i, line] = done[i][queues[i][line].pop()] = begins + max(network.seconds(held, of.rank) for of, held in with_it.values())
        return True

    while any(at[i] < len(trace.events) for i, trace in enumerate(traces)):
        before = list(at)
        for i, trace in enumerate(traces):
            while at[i] < len(trace.events):
                event = trace.events[at[i]]
                if event.batch is not None and not event.posted and not finish(i, event.batch):
                    break
                clocks[i] += event.computed
                if event.batch is not None and event.posted:
                    posted[i, trace.batches[event.batch].key] = clocks[i]
                elif event.batch is not None:
                    clocks[i] = max(clocks[i], done[i][event.batch])
                at[i] += 1
        assert at != before, "a rank waits for what no rank posts"
    return clocks
