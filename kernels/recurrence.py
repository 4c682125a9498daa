"""Recurrences along a packed stream, as what carries them from rank to rank sees them, whatever their states are.

A token turns the state before it into the one after it, S_t = M_t S_{t-1} + E_t, and so does a run of tokens, with M the product of theirs and E what
zeros end with. Here is for each kind of recurrence how it is run, what M is made of and how it is applied; `ltrain.parallel.context.scan`
composes the maps of the ranks and knows no kind.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ltrain.kernels import elementwise_recurrence
from ltrain.kernels.carry import Carry
from ltrain.kernels.linear_recurrence import linear_recurrence, over_ranks, segment_map
from ltrain.kernels.linear_recurrence.generalised import generalised_delta
from ltrain.kernels.segments import accumulator

__all__ = ["Elementwise", "GeneralisedDelta", "Linear", "Recurrence", "Selective"]


@dataclass(frozen=True)
class Recurrence(ABC):
    """The inputs of one: tensors [T, ...] of T tokens, or None, except those in WHOLE, which all tokens have in common, and numbers."""

    WHOLE: ClassVar[tuple[str, ...]] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def given(self, tensors: dict[str, Tensor | None]) -> Self:
        """The same kind, and the same numbers, of other tensors."""
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]

    def rows(self, begin: int, end: int) -> Self:
        return self.given({name: x if name in self.WHOLE else x[begin:end] for name, x in self.tensors.items()})

    @property
    def tokens(self) -> int:
        return len(next(x for name, x in self.tensors.items() if name not in self.WHOLE))

    @property
    def alone(self) -> Tensor:
        """cu_seqlens of all tokens as one segment."""
        return torch.tensor([0, self.tokens], dtype=torch.int32)

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The input whose type and device the state follows."""

    @property
    def wide(self) -> torch.dtype:
        """Of states and maps: float32, or float64 where the inputs are."""
        return accumulator(self.values.dtype)

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of one segment's state."""

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of M: the state's or its first axes', where M multiplies number by number; (0,) where it is the identity."""
        return self.state_shape

    @abstractmethod
    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """The outputs [T, ...], and where asked for the state after each segment [N, *state_shape]. Differentiable in everything.

        cu_seqlens: [N + 1] int32 boundaries, on the CPU. initial: [N, *state_shape], the state before each segment; None: zeros.
        """

    def over_ranks(self, cu_seqlens: Tensor, carry: Carry, *, final: bool) -> tuple[Tensor, Tensor | None] | None:
        """As `run`, the final states without gradient, where carry has the states before and after; None where no kernel has its phases: then `run`,
        `ends` and `state_gradient` serve."""
        return None

    def ends(self, begun: bool) -> tuple[Tensor | None, Tensor]:
        """Of all tokens as one segment: M, where a document has `begun` before them, and E. Without gradient."""
        final = self.run(self.alone, final=True)[1]
        assert final is not None
        return self.product() if begun else None, final[0].to(self.wide)

    def state_gradient(self, dout: Tensor) -> Tensor:
        """Of all tokens as one segment: the gradient of the state before them, from dout [T, ...] of the outputs alone."""
        with torch.enable_grad():
            state = self.values.new_zeros(1, *self.state_shape, dtype=self.wide).requires_grad_()
            out, _ = self.run(self.alone, state)
        return torch.autograd.grad(out, state, dout)[0][0]

    def product(self) -> Tensor:
        """M of all tokens, where it multiplies number by number."""
        return self.values.new_empty(0, dtype=self.wide)

    @property
    def steady(self) -> bool:
        """Whether any so many tokens have the same M, whatever they are, which `power` gives: then it need not travel."""
        return False

    def power(self, tokens: int) -> Tensor:
        """M of so many tokens, of a steady one."""
        raise AssertionError(f"M of {type(self).__name__} is not told by the number of tokens")

    def join(self, m: Tensor, state: Tensor, e: Tensor, *, transpose: bool = False) -> Tensor:
        """M S + E, or M^T S + E."""
        return (state if m.numel() == 0 else m.reshape(*m.shape, *[1] * (state.dim() - m.dim())) * state) + e

    def compose(self, after: Tensor, before: Tensor, *, transpose: bool = False) -> Tensor:
        """M of two runs of tokens: what `join` with `before` and then with `after` (transposed both) multiplies with."""
        return after * before


class _Matrices(Recurrence, ABC):
    """States [H, K, V], which a dense M [H, K, K] multiplies from the left."""

    def join(self, m: Tensor, state: Tensor, e: Tensor, *, transpose: bool = False) -> Tensor:
        if m.dim() < 3:
            return super().join(m, state, e)
        wide = m.double()  # so that no TF32 product wears a state down over many ranks
        return ((wide.mT if transpose else wide) @ state.double()).to(state.dtype) + e

    def compose(self, after: Tensor, before: Tensor, *, transpose: bool = False) -> Tensor:
        if after.dim() < 3:
            return super().compose(after, before)
        first, second = (after, before) if transpose else (before, after)  # M^T of both is that of the first after the second
        return (second.double() @ first.double()).to(after.dtype)


@dataclass(frozen=True)
class Linear(_Matrices):
    """`linear_recurrence`: q, k [T, Hk, K], v [T, H, V], decay None, [T, H] or [T, H, K] (logs), beta None (additive) or [T, H] (delta rule).

    M is dense with beta; without it as the decay is, or the identity. constant [H]: the decay of each token, where it is the same for all.
    recompute: as for `linear_recurrence`.
    """

    WHOLE = ("constant",)

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    scale: float
    constant: Tensor | None = None
    recompute: bool = False

    @property
    def values(self) -> Tensor:
        return self.v

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]

    @property
    def map_shape(self) -> tuple[int, ...]:
        heads, width, _ = self.state_shape
        if self.beta is not None:
            return heads, width, width
        return (0,) if self.decay is None else tuple(self.decay.shape[1:])

    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        args = self.q, self.k, self.v, self.decay, self.beta, cu_seqlens
        return linear_recurrence(*args, scale=self.scale, initial_state=initial, return_final_state=final, recompute=self.recompute)[:2]

    def over_ranks(self, cu_seqlens: Tensor, carry: Carry, *, final: bool) -> tuple[Tensor, Tensor | None] | None:
        args = self.q, self.k, self.v, self.decay, self.beta, cu_seqlens, carry
        return over_ranks(*args, scale=self.scale, return_final_state=final, recompute=self.recompute)

    def ends(self, begun: bool) -> tuple[Tensor | None, Tensor]:
        dense = begun and self.beta is not None
        m, e = segment_map(self.k, self.v, self.decay, self.beta, with_map=dense)
        return m if dense or not begun else self.product(), e

    def product(self) -> Tensor:
        if self.steady:
            return self.power(self.tokens)
        return self.v.new_empty(0, dtype=self.wide) if self.decay is None else self.decay.sum(0, dtype=self.wide).exp()

    @property
    def steady(self) -> bool:
        return self.constant is not None and self.beta is None

    def power(self, tokens: int) -> Tensor:
        assert self.constant is not None  # it is steady
        return (tokens * self.constant.to(self.wide)).exp()


@dataclass(frozen=True)
class GeneralisedDelta(_Matrices):
    """`generalised_delta`: r, w, k, b, c [T, H, K], v [T, H, V]."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    c: Tensor

    @property
    def values(self) -> Tensor:
        return self.v

    @property
    def state_shape(self) -> tuple[int, ...]:
        return *self.k.shape[1:], self.v.shape[2]

    @property
    def map_shape(self) -> tuple[int, ...]:
        heads, width = self.k.shape[1:]
        return heads, width, width

    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        y, after = generalised_delta(self.r, self.w, self.k, self.v, self.b, self.c, cu_seqlens, initial_state=initial)
        return y, after if final else None

    def ends(self, begun: bool) -> tuple[Tensor | None, Tensor]:
        """M is where the identity ends with nothing to store: further columns of the state, from one pass."""
        if not begun:
            return super().ends(begun)
        (heads, width, values), wide = self.state_shape, self.wide
        identity = torch.eye(width, dtype=wide, device=self.v.device).expand(heads, width, width)
        columns = dataclasses.replace(self, v=torch.cat((self.v.to(wide), self.v.new_zeros(self.tokens, heads, width, dtype=wide)), -1))
        final = columns.run(self.alone, torch.cat((identity.new_zeros(heads, width, values), identity), -1).unsqueeze(0), final=True)[1]
        assert final is not None
        e, m = final[0].split((values, width), -1)
        return m.contiguous(), e.contiguous()


@dataclass(frozen=True)
class Elementwise(Recurrence):
    """`elementwise_recurrence.scan`: a, b [T, ...] -> the states themselves."""

    a: Tensor
    b: Tensor

    @property
    def values(self) -> Tensor:
        return self.b

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.b.shape[1:])

    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        h, after = elementwise_recurrence.scan(self.a, self.b, cu_seqlens, initial_state=initial)
        return h, after if final else None

    def product(self) -> Tensor:
        return self.a.prod(0)


@dataclass(frozen=True)
class Selective(Recurrence):
    """`elementwise_recurrence.selective_scan`: x, step [T, D], rate [D, S], B, C [T, S]."""

    WHOLE = ("rate",)

    x: Tensor
    step: Tensor
    rate: Tensor
    B: Tensor
    C: Tensor

    @property
    def values(self) -> Tensor:
        return self.x

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.rate.shape)

    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        args = self.x, self.step, self.rate, self.B, self.C, cu_seqlens
        return elementwise_recurrence.selective_scan(*args, initial_state=initial, return_final_state=final)

    def product(self) -> Tensor:
        return torch.exp(-self.step.sum(0, dtype=self.wide).unsqueeze(-1) * self.rate.to(self.wide))
