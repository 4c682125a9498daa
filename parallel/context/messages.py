"""Messages between the context ranks, counted."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 0.01  # spread of noise: maps of states made of it do not grow


class ExchangeError(RuntimeError):
    """Another context rank did not do its part: which one, and in which exchange."""

    of_this_rank = True  # others may see another one


@contextmanager
def _named(what: str) -> Iterator[None]:
    """An error of the transport is one of `what`."""
    try:
        yield
    except RuntimeError as error:
        raise ExchangeError(f"{what}: {str(error).splitlines()[0]}") from error


@contextmanager
def _named_among(kind: str, doing: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """An error of a collective is one of this exchange, with the ranks that it is among."""
    try:
        yield
    except RuntimeError as error:  # which of them it was a collective does not know: gloo closes all connections of a group when one is lost
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        raise ExchangeError(f"{kind} exchange, {doing} ranks {ranks}: {str(error).splitlines()[0]}") from error


def summed(kind: str, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In place: x summed over the ranks of the group.

    Raises ExchangeError where one of them is gone, or silent for longer than the group's time-out.
    """
    with _named_among(kind, "summing over", group):
        dist.all_reduce(x, group=group)
    return x


class Transit:
    """Messages under way, each with whom it goes to or comes from. `wait` gives what arrived, by sender, once: who waited alone has it then."""

    def __init__(self, works: list[tuple[str, dist.Work]], sent: list[Tensor], arriving: dict[int, Tensor]):
        self._works, self._sent, self._arriving = works, sent, arriving

    def wait(self) -> dict[int, Tensor]:
        """Blocks the host (gloo) or this device stream (NCCL) until all is sent and received.

        Raises ExchangeError where another rank is gone, or silent for longer than its group's time-out.
        """
        for what, work in self._works:
            with _named(what):
                work.wait()
        self._sent.clear()  # only now may the buffers be reused
        self._works.clear()  # which hold them too, and what arrived
        arrived, self._arriving = self._arriving, {}
        return arrived


class Messages:
    """Batched sends and receives over the ranks of one group, at most one message for each pair in a batch, and small collectives.

    Every rank posts the same batches in the same order (one that neither sends nor receives in a batch has nothing to
    post), so no tag is needed: between two ranks messages arrive in the order in which they were posted.

    count: what is added to as bytes are sent. peer: what a number in this group is, for errors.
    """

    def __init__(self, group: dist.ProcessGroup | None, size: int, count: Counter[str] | None = None, peer: str = "context rank"):
        self.group, self.size, self.peer = group, size, peer
        # kind of exchange -> bytes sent by this rank, forward and backward
        self.bytes: Counter[str] = Counter() if count is None else count
        if size > 1 and dist.get_backend(group) == "nccl":
            # A batch in which only some ranks take part must not be the first call of an NCCL group.
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def post(self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, int], *, dtype: torch.dtype, device: torch.device) -> Transit:
        """Start sending `sends` (group rank -> flat tensor) and receiving `receives` (group rank -> number of elements).

        Raises ExchangeError where another rank is known to be gone already.
        """
        sent = {peer: x.contiguous() for peer, x in sends.items() if x.numel()}
        arriving = {peer: torch.empty(n, dtype=dtype, device=device) for peer, n in receives.items() if n}
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for peer, x in sent.items()]
        operations += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for peer, x in arriving.items()]
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in sent.values())
        if not operations:
            return Transit([], [], arriving)
        names = [f"{kind} exchange, sending to {self._name(peer)}" for peer in sent]
        names += [f"{kind} exchange, receiving from {self._name(peer)}" for peer in arriving]
        if dist.get_backend(self.group) == "nccl":  # makes one of them all
            names = [" and ".join(names)]
            with _named(names[0]):
                works = dist.batch_isend_irecv(operations)
        else:  # one by one, for a rank that is gone already fails its own message
            works = []
            for name, operation in zip(names, operations, strict=True):
                with _named(name):
                    works += dist.batch_isend_irecv([operation])
        return Transit(list(zip(names, works, strict=True)), list(sent.values()), arriving)

    def _name(self, peer: int) -> str:
        assert self.group is not None  # one rank has no peer
        return f"rank {dist.get_global_rank(self.group, peer)} ({self.peer} {peer})"

    def sum(self, kind: str, x: Tensor) -> Tensor:
        """In place: x summed over the ranks. Each counts x as sent once."""
        if self.size > 1:
            self.bytes[kind] += x.numel() * x.element_size()
            summed(kind, x, self.group)
        return x

    def all_gather(self, kind: str, x: Tensor) -> list[Tensor]:
        """Every rank's x, in order of rank. Each counts x as sent once."""
        if self.size == 1:
            return [x]
        self.bytes[kind] += x.numel() * x.element_size()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _named_among(kind, "gathering from", self.group):
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts


class Noise:
    """In place of what others would send, where time is measured: small numbers that are there at no cost. Products of zeros take less power, by
    which a GPU's clock goes, and so less time than those of others. (Bytes, as rows in FP8 are packed into, are zeros.)"""

    def __init__(self) -> None:
        self._of: dict[torch.dtype, Tensor] = {}

    def __call__(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count], not to be written to"""
        if not dtype.is_floating_point:
            return torch.zeros(count, dtype=dtype, device=device)
        if dtype not in self._of or len(self._of[dtype]) < count:
            self._of[dtype] = (torch.randn(count, device=device) * SMALL).to(dtype)
        return self._of[dtype][:count]


class Silence(Messages):
    """Messages that arrive at once and say nothing, between none: what is left is the time of computing."""

    def __init__(self) -> None:
        super().__init__(None, 1)
        self._noise = Noise()

    def post(self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, int], *, dtype: torch.dtype, device: torch.device) -> Transit:
        return Transit([], [], {peer: self._noise(n, dtype, device) for peer, n in receives.items() if n})
