"""The exchanges of the mixers over context ranks: what a `Sequence` carries under context parallelism."""

import copy
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.kernels import attention, short_conv
from ltrain.kernels.attention import FULL, PLAIN, Mask, Score
from ltrain.kernels.recurrence import Recurrence
from ltrain.kernels.segments import Part
from ltrain.model.sequence import Latent, Sequence, shifted
from ltrain.parallel.context import decode
from ltrain.parallel.context.balance import Cost
from ltrain.parallel.context.cache import Cache
from ltrain.parallel.context.gather import Gather, Units, gather
from ltrain.parallel.context.halo import halo
from ltrain.parallel.context.layout import ContextLayout, Plan
from ltrain.parallel.context.messages import Messages, Silence, summed
from ltrain.parallel.context.ring import Links, Ring, RingAttention, ring
from ltrain.parallel.context.rows import RowExchange, Rows
from ltrain.parallel.context.scan import Scan, recurrence_over_ranks, scan
from ltrain.parallel.context.trace import Recorder
from ltrain.parallel.context.ulysses import Ulysses, layout_over_groups, places

PLANS_KEPT = 64  # micro-batches: more than any pipeline schedule has under way


class ContextExchange:
    """Ring, halo and scan over the ranks of one context group (the `Exchange` of `ltrain.model.sequence`).

    layout: how the stream is cut, with this rank's place in it, its rank in `cp_group`. cp_group: the context ranks
    (None with one); give it to nothing else, so that these messages keep their order. sum_group: every rank that holds
    tokens of the micro-batch, tensor and context ranks (None: this rank alone). tensor_group: the tensor ranks among them.
    ulysses: the ranks of `cp_group` that divide the heads of attention, and those that are a ring beside them (None: all are a ring).
    nodes: of the ranks of that ring, those on this rank's node, and those with its place on each (None: all are on one).
    fp8: rings and gathers send what goes forward in FP8 (`wire`).

    Raises ValueError where group and layout disagree. Building it is collective over `cp_group`.
    """

    def __init__(
        self,
        layout: ContextLayout,
        cp_group: dist.ProcessGroup | None = None,
        sum_group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        ulysses: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        nodes: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        fp8: bool = False,
    ):
        here = (0, 1) if cp_group is None else (dist.get_rank(cp_group), dist.get_world_size(cp_group))
        if here != (layout.rank, layout.size):
            raise ValueError(
                f"the context group makes this rank {here[0]} of {here[1]} but the layout says {layout.rank} of {layout.size}: "
                "give the group that the layout was made for"
            )
        self.layout, self.sum_group = layout, sum_group
        self.tensor = (0, 1) if tensor_group is None else (dist.get_rank(tensor_group), dist.get_world_size(tensor_group))
        self._messages = Messages(cp_group, layout.size)
        self._plans: Cache[Plan] = Cache(PLANS_KEPT)
        self._ulysses = None if ulysses is None else Ulysses.over(*ulysses, self.bytes)
        self._nodes = None if nodes is None else Links.over(*nodes, self.bytes, fp8)
        self._fp8 = fp8

    def resized(self, tokens: int, cost: Cost | None = None) -> "ContextExchange":
        """The same ranks, and the same count of bytes, for streams of another length. cost: of the layers, None: as here."""
        other = copy.copy(self)
        other.layout, other._plans = replace(self.layout, tokens=tokens, tail=0, cost=cost or self.layout.cost), Cache(PLANS_KEPT)
        return other

    def silent(self) -> "ContextExchange":
        """The same without messages, to measure what these cost: noise arrives. Of no use for training."""
        other = copy.copy(self)
        other._messages = Silence()
        other._nodes = None if self._nodes is None else self._nodes.silent()
        other._ulysses = None if self._ulysses is None else self._ulysses.silent()
        return other

    @classmethod
    def recorded(cls, layout: ContextLayout, recorder: Recorder, ulysses: int = 1, inner_ring: int = 1, fp8: bool = False) -> "ContextExchange":
        """That of one rank whose others are not there: `recorder` tells what it would send them. Of no use for training."""
        exchange = cls(ContextLayout(layout.tokens), fp8=fp8)
        ring = ranks = list(range(layout.size))
        exchange.layout, exchange._messages = layout, recorder.messages("all", ranks)
        if ulysses > 1:
            members, ring = (next(found for found in kind if layout.rank in found) for kind in places(ranks, ulysses))
            swap, between = recorder.messages("members", members), recorder.messages("groups", ring)
            exchange._ulysses = Ulysses(ulysses, layout.rank % ulysses, swap, between)
        if inner_ring > 1:
            inside, across = (next(found for found in kind if layout.rank in found) for kind in places(ring, inner_ring))
            exchange._nodes = Links(recorder.messages("node", inside), recorder.messages("nodes", across), inner_ring, fp8)
        return exchange

    @property
    def members(self) -> int:
        """Ranks that divide the heads of attention among them."""
        return 1 if self._ulysses is None else self._ulysses.members

    @property
    def bytes(self) -> Counter[str]:
        """Bytes this rank has sent by kind (ring, ring across nodes, ulysses, halo, scan; last, state, decode, choice), forward and backward."""
        return self._messages.bytes

    def plan(self, cu_seqlens: Tensor) -> Plan:
        """The plan of a micro-batch, made once for all its layers. cu_seqlens [documents + 1] of the whole stream, on the host."""
        if cu_seqlens.device.type != "cpu":
            return self.layout.plan(cu_seqlens)  # which says what is wrong
        return self._plans.get(cu_seqlens, lambda: self.layout.plan(cu_seqlens))

    def _local(self, x: Tensor, what: str, seq: Sequence) -> Plan:
        if x.shape[0] != self.layout.local_tokens:
            raise ValueError(
                f"{what} has {x.shape[0]} tokens but this context rank holds {self.layout.local_tokens}: give ContextLayout.take of the stream"
            )
        return self.plan(seq.cu_seqlens)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: Sequence,
        *,
        scale: float,
        mask: Mask = FULL,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        latent: Latent | None = None,
    ) -> Tensor:
        """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] of this rank's T tokens, sinks [H] -> [T, H, Dv]."""
        if self.layout.size == 1:
            starts = seq.starts() if mask.placed else None
            return attention.attention(q, k, v, seq.cu_seqlens, scale=scale, mask=mask, starts=starts, score=score, sinks=sinks)
        plan = self._local(q, "q", seq)
        if self._ulysses is not None:
            inner = self._with_heads(self._ulysses, plan, seq, mask)
            score, sinks = self._ulysses.score(score), None if sinks is None else self._ulysses.heads(sinks)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return inner.exchange.attention(q, k, v, inner, scale=scale, mask=mask, score=score, sinks=sinks)

            return self._ulysses.attention(q, k, v, plan.layout, attend)
        begun = self._begun(plan, seq) if mask.placed else ()
        links = self._nodes or Links(self._messages, fp8=self._fp8)
        found: Ring = plan.derive(("ring", mask, begun), lambda: ring(plan, mask, dict(begun), links.places))
        if found.alone:
            before = dict(begun)
            first = [s.start - s.begin + before.get(s.document, 0) for s in plan.segments]
            return attention.attention(q, k, v, plan.cu_seqlens, scale=scale, mask=mask, starts=first, score=score, sinks=sinks)
        plain = score._replace(bias=None)
        # what is smaller travels: with many heads the latents, with few of them on this rank the keys and values
        made = latent if latent is not None and latent.width < k.shape[1:].numel() + v.shape[1:].numel() else None
        carried = (None, None, None) if made is None else (made.rows(), made.weight, made.expand)
        out: Tensor = RingAttention.apply(q, k, v, sinks, score.bias, *carried, found, links, seq.tape, scale, plain)  # type: ignore[no-untyped-call]
        return out

    def _with_heads(self, ulysses: Ulysses, plan: Plan, seq: Sequence, mask: Mask) -> Sequence:
        """The stream as those see it that have this rank's share of the heads; positions only where the mask asks for them."""
        key = f"heads of ulysses{' with positions' * mask.placed}"
        if key not in seq.shared:
            ring = copy.copy(self)
            ring.layout, ring._messages, ring._ulysses = layout_over_groups(plan.layout, ulysses.members), ulysses.ring, None
            ring._plans = Cache(PLANS_KEPT)
            positions = ulysses.positions(seq.positions, plan.layout) if mask.placed else seq.positions
            seq.shared[key] = Sequence(seq.cu_seqlens, positions, exchange=ring)
        return replace(seq.shared[key], tape=seq.tape)

    def _begun(self, plan: Plan, seq: Sequence) -> tuple[tuple[int, int], ...]:
        """(document, position of the first token that the stream has of it) of those here that an earlier stream has begun.

        Of all documents, where this rank may hold rows of others for its neighbours.
        """
        if "document starts" not in seq.shared:
            here = [s for s in plan.segments if s.length]
            rows = torch.tensor([s.local for s in here], dtype=torch.int64).to(seq.positions.device, non_blocking=True)
            starts = {s.document: place - (s.start - s.begin) for s, place in zip(here, seq.positions[rows].tolist(), strict=True)}
            if self._nodes is not None:
                known = torch.tensor([starts.get(document, 0) for document in range(len(seq.cu_seqlens) - 1)], device=seq.positions.device)
                starts = dict(enumerate(torch.stack(self._messages.all_gather("positions", known)).amax(0).tolist()))
            seq.shared["document starts"] = tuple((document, start) for document, start in starts.items() if start)
        found: tuple[tuple[int, int], ...] = seq.shared["document starts"]
        return found

    def _with_halo(self, x: Tensor, plan: Plan, seq: Sequence, reach: int) -> tuple[Tensor, Tensor | None]:
        """x [T, C], and the `reach` rows before each segment [segments, reach, C]; None: there are none."""
        rows: Rows = plan.derive(("halo", reach), lambda: halo(plan, reach))
        if not rows.needed:
            return x, None
        x, before = RowExchange.apply(x, rows, self._messages, seq.tape)  # type: ignore[no-untyped-call]
        return x, before.unflatten(0, (-1, reach))

    def short_conv(self, x: Tensor, weight: Tensor, seq: Sequence, activation: str | None = "silu") -> Tensor:
        """x [T, C], weight [C, W] -> [T, C]."""
        plan = self._local(x, "x", seq)
        x, state = self._with_halo(x, plan, seq, weight.shape[1] - 1)
        return short_conv.short_conv(x, weight, plan.cu_seqlens, initial_state=state, return_final_state=False, activation=activation)[0]

    def before(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, C] -> [T, C]"""
        plan = self._local(x, "x", seq)
        x, last = self._with_halo(x, plan, seq, 1)
        return shifted(x, plan.cu_seqlens, None if last is None else last.squeeze(1))

    def halo(self, x: Tensor, seq: Sequence, reach: int) -> tuple[Tensor, Tensor | None]:
        """x [T, C] -> x, and the rows before each run [runs, reach, C]"""
        return self._with_halo(x, self._local(x, "x", seq), seq, reach)

    @property
    def whole(self) -> bool:
        return self.layout.size == 1

    def parts(self, seq: Sequence) -> list[Part]:
        """Of this rank's queries among what `gather` gives."""
        return self._gather(seq, int).parts

    def _gather(self, seq: Sequence, units: Units) -> Gather:
        plan = self.plan(seq.cu_seqlens)
        found: Gather = plan.derive(("gather", units), lambda: gather(plan, units))
        return found

    def gather(self, x: Tensor, seq: Sequence, units: Units = int) -> Tensor:
        """x [rows, C] of this rank's documents -> those that these have up to its last part of each"""
        rows = self._gather(seq, units).rows
        if rows.total == len(x) and not rows.read and not rows.sent:
            return x
        return RowExchange.apply(x, rows, self._messages, seq.tape, self._fp8)[1]  # type: ignore[no-any-return, no-untyped-call]

    def recurrence(self, inputs: Recurrence, seq: Sequence) -> Tensor:
        """Of this rank's T tokens."""
        plan = self._local(inputs.values, "the recurrence", seq)
        maps: Scan = plan.derive("scan", lambda: scan(plan))
        if not maps.needed:
            return inputs.run(plan.cu_seqlens)[0]
        return recurrence_over_ranks(inputs, plan.cu_seqlens, maps, self._messages, seq.tape)[0]

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the tensor and context ranks of the micro-batch, without gradient."""
        if self.sum_group is None or self.sum_group.size() == 1:
            return x.detach()
        return summed("sum", x.detach().clone(), self.sum_group)

    def runs(self, seq: Sequence) -> list[tuple[int, int, int]]:
        """(document, place in it, tokens) of each of this rank's segments."""
        return [(segment.document, segment.start - segment.begin, segment.length) for segment in self.plan(seq.cu_seqlens).segments]

    def last(self, x: Tensor, seq: Sequence, count: int) -> Tensor:
        """x [T, C] -> [N, count, C]"""
        return decode.last(x, self._local(x, "x", seq), count, self._messages)

    def last_hidden(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T / tensor ranks, hidden] -> [N / tensor ranks, hidden]"""
        return decode.last_hidden(x, self.plan(seq.cu_seqlens), self.tensor, self.sum_group)

    def final_recurrence(self, inputs: Recurrence, seq: Sequence) -> tuple[Tensor, Tensor]:
        """As `recurrence`, and the state after each document [N, ...]."""
        return decode.final_recurrence(inputs, self._local(inputs.values, "the recurrence", seq), self._messages, seq.tape)

    def decode_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        behind: Tensor,
        *,
        scale: float,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """q [N, H, D], k [N, L, Hk, D], v [N, L, Hk, Dv], behind [N, L], sinks [H], seen [N, H or Hk, L] -> [N, H, Dv]"""
        return decode.decode_attention(q, k, v, behind, self._messages, scale=scale, score=score, sinks=sinks, seen=seen)

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [N, H, Dv] and lse [N, H] over the keys here -> over those of all context ranks"""
        return decode.merged(out, lse, self._messages)

    def best(self, scores: Tensor, numbers: Tensor, count: int) -> Tensor:
        """scores and numbers [..., n] of what is here -> the numbers of the best on all context ranks [..., count]"""
        return decode.best(scores, numbers, count, self._messages)

    def keeps(self, step: int) -> bool:
        """The ranks in turn."""
        return step % self.layout.size == self.layout.rank

    def takes(self, blocks: Tensor) -> Tensor:
        """The ranks in turn."""
        return blocks % self.layout.size == self.layout.rank

    def sequence(self, cu_seqlens: Tensor, positions: Tensor) -> Sequence:
        """This rank's `Sequence` of a micro-batch: cu_seqlens [documents + 1] and positions [tokens] of the whole stream."""
        layout = self.layout.of(cu_seqlens)
        return Sequence(cu_seqlens, layout.take(positions), exchange=self, counted=layout.counted(*self.tensor))
