"""How the states of a recurrence and their gradients pass between ranks, as the kernels of one rank see it."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Map = tuple[Tensor | None, Tensor]  # M where a document comes in and leaves, and E (or dE): see `recurrence`


class Carry(Protocol):
    """The ranks that have the rest of this one's documents. Segments of its tokens are known by their numbers in cu_seqlens.

    Each method starts to send and gives what waits for the others' answer: what needs none of it is to be done in between.
    """

    @property
    def heads(self) -> tuple[int, ...]:
        """Segments that continue a document."""
        ...

    @property
    def tails(self) -> tuple[int, ...]:
        """Segments whose document goes on elsewhere."""
        ...

    def states(self, ends: Callable[[], dict[int, Map]]) -> Callable[[], tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """ends: makes the map of each tail, with an M where it is a head too; it is not called where a recomputed block has had its answer.

        Returns what gives the state before each head, and each M, which `gradients` takes.
        """
        ...

    def gradients(self, own: dict[int, Tensor], matrices: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """own: dE of each head, the gradient of the state before it where none flows into the one after it. Returns what gives the gradient of
        the state after each tail."""
        ...
