"""Attention over context ranks: keys and values travel, queries and outputs stay.

The ring of Liu et al. 2023 (Ring Attention) on packed documents. In step s of P - 1, rank r works on keys and values of
rank r - s. They come straight from their owner instead of through the neighbour, which lets each message hold only the
rows that its receiver's masks can see: (P-1)/P of K and V is the most that arrives, for a causal document in zigzag it
is at most 3/4 of that, for a window the rows that it reaches over a cut (both ways: on either side of it) and the anchors once, for chunks
those of a chunk that is cut, and nothing travels between ranks that share no document. Step s + 1 is under way while step s
is computed. The outputs of the steps merge by log-sum-exp. The backward is a second ring; a step's key and value
gradients go straight back to their owner in the type of what came, and are added up there, in float32 or wider where there are several. Keys and
values that are made of something smaller (the latents of multi-head latent attention) may be made on arrival: then that travels, and its gradient.

Between nodes the same rows would travel once for each rank that reads them. In a double ring (Gu et al. 2024, LoongTrain)
they come once, to the rank with their owner's place in its node, while the steps on the node before are computed; it
passes on to each neighbour what that one reads, adds up their gradients and sends the sums back.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.kernels.attention import Mask, Pair, Score, backward_pairs, forward_pairs, merge_into, seen, sinks_gradient, with_sinks
from ltrain.model.sequence import Tape
from ltrain.parallel.context import wire
from ltrain.parallel.context.balance import joined
from ltrain.parallel.context.layout import Plan, Segment
from ltrain.parallel.context.messages import Messages, Silence, Transit

Rows = list[tuple[int, int]]  # [start, stop) among a rank's tokens
Starts = Mapping[int, int]  # document -> position
NONE = Transit([], [], {})
ACROSS = "ring across nodes"


class Reads(NamedTuple):
    """What one rank's queries see on another rank."""

    queries: Rows  # of the reader
    keys: Rows  # of the owner
    pairs: list[Pair]  # in numbers of the rows above, laid end to end


class Step(NamedTuple):
    """One step of the ring, as this rank sees it."""

    source: int | None  # None: this rank holds what came for its node
    destination: int
    reads: Reads  # what this rank works on, in rows of their owner: of `source`, or of that one's place in the stage's node
    held: Rows  # without a source: these rows among those that this rank holds
    sent: Rows  # rows of what this rank holds that `destination` works on


LOCAL = Step(None, 0, Reads([], [], []), [], [])  # this rank's own keys


class Stage(NamedTuple):
    """Steps on keys of one node. Ranks are numbered by node here, and by place in the node in its steps."""

    source: int
    destination: int
    arriving: int  # rows that come from this rank's place on `source`: all that this node reads there
    sent: Rows  # rows of this rank's keys that the node `destination` reads
    steps: list[Step]  # in the first stage without this rank's own keys


class Ring(NamedTuple):
    local: list[Pair]  # inside this rank
    stages: list[Stage]  # none, where this rank has nothing to do for others or with theirs; else all, so that two ranks post in the same order
    alone: bool  # no segment of this rank has to do with another one

    @property
    def many(self) -> bool:
        """Whether more than one part is added to this rank's own: then sums are wider than the inputs, which one part needs not."""
        steps = [step for stage in self.stages for step in stage.steps]
        return max(sum(bool(step.reads.pairs) for step in steps), sum(bool(step.sent) for step in steps)) > 1 or len(self.stages) > 1


class Links(NamedTuple):
    """Messages inside a node of so many places, and between those at the same place of all nodes; None: all are one node. fp8: see `wire`."""

    inside: Messages
    across: Messages | None = None
    places: int | None = None
    fp8: bool = False

    @classmethod
    def over(cls, inside: dist.ProcessGroup, across: dist.ProcessGroup, count: Counter[str], fp8: bool) -> "Links":
        """Collective over both groups; what is sent is added to `count`."""
        return cls(Messages(inside, inside.size(), count, "place"), Messages(across, across.size(), count, "node"), inside.size(), fp8)

    def silent(self) -> "Links":
        return self._replace(inside=Silence(), across=None if self.across is None else Silence())


def count(rows: Rows) -> int:
    return sum(stop - start for start, stop in rows)


def take(x: Tensor, rows: Rows) -> Tensor:
    """x [T, ...] -> its `rows` end to end."""
    parts = [x[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x[:0]


def _between(reader: Segment, owner: Segment, mask: Mask, starts: Starts) -> list[Pair]:
    """What tokens of one segment see of another one of the same document, in rows of their ranks."""
    moved = starts.get(reader.document, 0) - reader.begin  # from places in the stream to positions
    queries, keys = ((s.start + moved, s.stop + moved) for s in (reader, owner))
    return [pair.moved(reader.local - queries[0], owner.local - keys[0]) for pair in seen(queries, keys, mask)]


def _across(plan: Plan, reader: int, owner: int, mask: Mask, starts: Starts) -> list[Pair]:
    """What the reader's segments see of the owner's other ones of the same documents, of which only earlier ones are seen under a causal mask."""

    def cut(rank: int) -> dict[int, list[Segment]]:
        found: dict[int, list[Segment]] = {}
        for segment in (s for span in plan.of(rank) for s in dict.fromkeys((span.head, span.tail)) if s is not None):
            found.setdefault(segment.document, []).append(segment)
        return found

    owners: dict[int, list[Segment]] = plan.derive(("cut", owner), lambda: cut(owner))
    readers: dict[int, list[Segment]] = plan.derive(("cut", reader), lambda: cut(reader))
    both = [(a, b) for document, mine in readers.items() for a in mine for b in owners.get(document, [])]
    met = [(a, b) for a, b in both if b.stop <= a.start or not mask.causal and a.stop <= b.start]
    return [pair for a, b in met for pair in _between(a, b, mask, starts)]


def _packed(rows: Rows) -> tuple[Rows, Callable[[int], int]]:
    """The same rows once each, in order, and where one of them lies when these are laid end to end."""
    once = joined(rows)
    places = list(accumulate((stop - start for start, stop in once), initial=0))
    starts = [start for start, _ in once]

    def place(row: int) -> int:
        i = bisect_right(starts, row) - 1
        return places[i] + row - starts[i]

    return once, place


def _reads(plan: Plan, reader: int, owner: int, mask: Mask, starts: Starts) -> Reads:
    pairs = _across(plan, reader, owner, mask, starts)
    queries, place_query = _packed([(p.q_start, p.q_start + p.q_len) for p in pairs])
    keys, place_key = _packed([(p.k_start, p.k_start + p.k_len) for p in pairs])
    return Reads(queries, keys, [p._replace(q_start=place_query(p.q_start), k_start=place_key(p.k_start)) for p in pairs])


def ring(plan: Plan, mask: Mask, starts: Starts, places: int | None = None) -> Ring:
    """Which rows meet in which step. Every rank makes the same choice for a pair of ranks.

    starts: the position of the first token that the stream has of a document, where that is not 0 and a segment of it is here. places: neighbours
    that are one node; None: all are.
    """
    rank, inside = plan.layout.rank, places or plan.layout.size
    nodes, (node, place) = plan.layout.size // inside, divmod(rank, inside)
    own = [pair for s in plan.segments for pair in _between(s, s, mask, starts)]
    across = _across(plan, rank, rank, mask, starts)
    found: dict[tuple[int, int], Reads] = {}

    def reads(reader: int, owner: int) -> Reads:
        if (reader, owner) not in found:
            found[reader, owner] = _reads(plan, reader, owner, mask, starts)
        return found[reader, owner]

    def of_node(node: int, owner: int) -> tuple[Rows, Callable[[int], int]]:
        return _packed([rows for reader in range(node * inside, (node + 1) * inside) for rows in reads(reader, owner).keys])

    stages = []
    for o in range(nodes):
        source, destination = (node - o) % nodes, (node + o) % nodes
        owner = source * inside + place  # whose rows this rank holds for its node
        held, at = of_node(node, owner) if o else ([], int)

        def placed(rows: Rows, at: Callable[[int], int] = at) -> Rows:
            return [(at(start), at(start) + stop - start) for start, stop in rows]

        steps = []
        for i in range(0 if o else 1, inside):
            behind, ahead = (place - i) % inside, (place + i) % inside
            mine = reads(rank, source * inside + behind)
            if i:
                steps.append(Step(behind, ahead, mine, [], placed(reads(node * inside + ahead, owner).keys)))
            else:
                steps.append(Step(None, ahead, mine, placed(mine.keys), []))
        stages.append(Stage(source, destination, count(held), of_node(destination, rank)[0] if o else [], steps))
    busy = any(stage.arriving or stage.sent or any(step.reads.pairs or step.sent for step in stage.steps) for stage in stages)
    return Ring(own + across, stages if busy else [], not busy and not across)


Carried = tuple[Tensor, ...]  # what travels, [T, ...] each: K and V, or what they are made of on arrival


def _send(messages: Messages, kind: str, held: Carried, destination: int, sent: Rows, source: int, rows: int) -> Transit:
    """These rows of what is held in one flat message, one tensor after another, and as many from the source as it has for this rank."""
    sends = {destination: torch.cat([take(x, sent).flatten() for x in held])} if sent else {}
    receives = {source: rows * _width(held)} if rows else {}
    return messages.post(kind, sends, receives, dtype=held[0].dtype, device=held[0].device)


def _pass_on(step: Step, held: Carried, links: Links) -> Transit:
    if step.source is None:
        return NONE
    return _send(links.inside, "ring", held, step.destination, step.sent, step.source, count(step.reads.keys))


def _arriving(plan: Ring, carried: Carried, links: Links) -> Iterator[tuple[int, Step, list[Tensor]]]:
    """Of each step its stage and the rows to work on. The next ones are under way when a step is given, the first ones after `next`."""
    held, coming = carried, NONE
    for number, stage in enumerate(plan.stages):
        if number:
            arrived = coming.wait()
            held = tuple(_split(arrived[stage.source], stage.arriving, carried)) if stage.arriving else tuple(x[:0] for x in carried)
        if number + 1 < len(plan.stages):
            then = plan.stages[number + 1]
            assert links.across is not None  # there are several nodes
            coming = _send(links.across, ACROSS, carried, then.destination, then.sent, then.source, then.arriving)
        transit = _pass_on(stage.steps[0], held, links) if stage.steps else NONE
        if not number:
            yield 0, LOCAL, []
        for i, step in enumerate(stage.steps):
            arrived = transit.wait()
            if i + 1 < len(stage.steps):
                transit = _pass_on(stage.steps[i + 1], held, links)
            if step.source is None:
                yield number, step, [take(x, step.held) for x in held]
            else:
                yield number, step, _split(arrived.pop(step.source), count(step.reads.keys), carried) if step.reads.keys else []


def _width(carried: Carried) -> int:
    return sum(x.shape[1:].numel() for x in carried)


def _split(flat: Tensor, rows: int, carried: Carried) -> list[Tensor]:
    """A flat message of `rows` rows -> [rows, ...] of each tensor."""
    parts = flat.split([rows * x.shape[1:].numel() for x in carried])
    return [part.view(rows, *x.shape[1:]) for part, x in zip(parts, carried, strict=True)]


class Expansion(NamedTuple):
    """K and V of what travels. weight: None where these travel themselves. of: what travels in FP8, as it was before; None: it is as it was."""

    weight: Tensor | None
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    of: Carried | None

    def _unpacked(self, arrived: list[Tensor]) -> list[Tensor]:
        if self.of is None:
            return arrived
        (packed,) = arrived
        return _apart(wire.unpack(packed, _width(self.of), self.of[0].dtype), self.of)

    def __call__(self, arrived: list[Tensor]) -> tuple[Tensor, Tensor]:
        arrived = self._unpacked(arrived)
        if self.expand is None or self.weight is None:
            return arrived[0], arrived[1]
        return self.expand(arrived[0], self.weight)

    def backward(self, arrived: list[Tensor], gradients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor | None]:
        """What `gradients` gives for K and V, as gradients of what has arrived and of the weight."""
        arrived = self._unpacked(arrived)
        if self.expand is None or self.weight is None:
            return list(gradients(arrived[0], arrived[1])), None
        leaves = arrived[0].detach().requires_grad_(), self.weight.detach().requires_grad_()
        with torch.enable_grad():
            k, v = self.expand(*leaves)
        dk, dv = gradients(k.detach(), v.detach())
        drows, dweight = torch.autograd.grad((k, v), leaves, (dk.to(k.dtype), dv.to(v.dtype)))
        return [drows], dweight


def _apart(rows: Tensor, carried: Carried) -> list[Tensor]:
    """rows [n, C] -> [n, ...] of each tensor"""
    parts = rows.split([x.shape[1:].numel() for x in carried], dim=1)
    return [part.reshape(len(rows), *x.shape[1:]) for part, x in zip(parts, carried, strict=True)]


def _travelling(k: Tensor, v: Tensor, latent: Tensor | None, links: Links) -> tuple[Carried, Carried | None]:
    """What travels, and where that is in FP8, what it is made of."""
    carried = (k, v) if latent is None else (latent,)
    if not links.fp8:
        return carried, None
    return (wire.pack(torch.cat([x.flatten(1) for x in carried], dim=1)),), carried


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    carried: Carried,
    expansion: Expansion,
    plan: Ring,
    links: Links,
    scale: float,
    score: Score,
) -> tuple[Tensor, Tensor]:
    steps = _arriving(plan, carried, links)
    next(steps, None)
    out, lse = forward_pairs(q, k, v, plan.local, scale=scale, score=score, wide=plan.many)  # [T, H, Dv], [T, H]
    for _, step, arrived in steps:
        if not step.reads.pairs:
            continue
        k_step, v_step = expansion(arrived)
        out_step, lse_step = forward_pairs(take(q, step.reads.queries), k_step, v_step, step.reads.pairs, scale=scale, score=score, wide=False)
        done = 0
        for a, b in step.reads.queries:
            part = slice(done, done + b - a)
            merge_into(out[a:b], lse[a:b], out_step[part], lse_step[part])
            done += b - a
        del arrived, k_step, v_step, out_step, lse_step  # before there is room for the rows after the next ones
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.to(v.dtype), lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    carried: Carried,
    expansion: Expansion,
    plan: Ring,
    links: Links,
    scale: float,
    score: Score,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Gradients of q, k and v; of what was carried (k and v themselves: among the first), of the weight and of the bias."""
    steps = _arriving(plan, carried, links)
    next(steps, None)
    dq, dk, dv, dbias = backward_pairs(dout, q, k, v, out, lse, plan.local, scale=scale, score=score, wide=plan.many)
    expanded = expansion.weight is not None
    of = expansion.of or carried
    own = [x.new_zeros(x.shape, dtype=dk.dtype) for x in of] if expanded else [dk, dv]
    home = Home(own, plan, of[0].dtype, links)
    dweight = None
    for stage, step, arrived in steps:
        found: list[Tensor] = []
        if step.reads.pairs:

            def gradients(k_step: Tensor, v_step: Tensor, step: Step = step) -> tuple[Tensor, Tensor]:
                nonlocal dbias
                q_step, dout_step, out_step, lse_step = (take(x, step.reads.queries) for x in (q, dout, out, lse))
                dq_step, dk_step, dv_step, dbias_step = backward_pairs(
                    dout_step, q_step, k_step, v_step, out_step, lse_step, step.reads.pairs, scale=scale, score=score, wide=False
                )
                dbias = dbias if dbias_step is None else dbias_step if dbias is None else dbias + dbias_step
                _add([dq], [dq_step], step.reads.queries)
                return dk_step, dv_step

            found, dweight_step = expansion.backward(arrived, gradients)
            if dweight_step is not None:
                dweight = dweight_step if dweight is None else dweight + dweight_step
        del arrived
        home.send(stage, step, found)
        del found
    home.finish()
    return [dq, dk, dv], own if expanded else [], dweight, dbias


class Home:
    """Brings gradients back the way that the rows came: through the rank that held them for the node, which adds up those of its node.

    own: where this rank's arrive, one tensor for each that is carried. dtype: of a message. Those of a step travel while the next one is computed.
    """

    def __init__(self, own: list[Tensor], plan: Ring, dtype: torch.dtype, links: Links):
        self.own, self.stages, self.dtype, self.links = own, plan.stages, dtype, links
        self.held = own  # of the stage whose gradients arrive now
        self.under_way: tuple[int, Step, Transit] | None = None
        self.across: list[tuple[Stage, Transit]] = []

    def send(self, stage: int, step: Step, found: list[Tensor]) -> None:
        """What a step found, to where its rows came from."""
        transit = NONE
        if step.source is not None:
            sends = {step.source: torch.cat([x.flatten().to(self.dtype) for x in found])} if found else {}
            receives = {step.destination: count(step.sent) * _width(tuple(self.own))} if step.sent else {}
            transit = self.links.inside.post("ring", sends, receives, dtype=self.dtype, device=self.own[0].device)
        self._arrive()
        if step.source is None:  # the first one of its stage
            self.held = [x.new_zeros(self.stages[stage].arriving, *x.shape[1:]) for x in self.own]
            if found:
                _add(self.held, found, step.held)
        self.under_way = stage, step, transit

    def _arrive(self) -> None:
        """The gradients of the step before, added in the order of the steps; behind the last one of a stage its sums go on."""
        if self.under_way is None:
            return
        number, step, transit = self.under_way
        arrived, stage = transit.wait(), self.stages[number]
        if step.sent:
            _add(self.held, _split(arrived[step.destination], count(step.sent), tuple(self.own)), step.sent)
        if number and step is stage.steps[-1]:
            assert self.links.across is not None  # the rows came over it
            sends = {stage.source: torch.cat([x.flatten().to(self.dtype) for x in self.held])} if stage.arriving else {}
            receives = {stage.destination: count(stage.sent) * _width(tuple(self.own))} if stage.sent else {}
            self.across.append((stage, self.links.across.post(ACROSS, sends, receives, dtype=self.dtype, device=self.own[0].device)))

    def finish(self) -> None:
        self._arrive()
        for stage, transit in self.across:
            arrived = transit.wait()
            if stage.sent:
                _add(self.own, _split(arrived[stage.destination], count(stage.sent), tuple(self.own)), stage.sent)


def _add(into: list[Tensor], parts: list[Tensor], rows: Rows) -> None:
    """To these rows of each tensor, one after another, what lies end to end in its part."""
    for x, part in zip(into, parts, strict=True):
        done = 0
        for a, b in rows:
            x[a:b] += part[done : done + b - a]
            done += b - a


class RingAttention(torch.autograd.Function):
    """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], sinks [H], bias [H, buckets] -> [T, H, Dv]: inside documents that may cross the ranks.

    latent [T, C] and weight: what travels instead of k and v, and what `expand` makes these of on arrival; None: they travel themselves. Gradients of
    what other ranks made of it come to latent, those of what this rank made of theirs to weight; k and v get those of this rank's own pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        latent: Tensor | None,
        weight: Tensor | None,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        plan: Ring,
        links: Links,
        tape: Tape,
        scale: float,
        score: Score,
    ) -> Tensor:

        def attend() -> tuple[Tensor, Tensor]:
            carried, of = _travelling(k, v, latent, links)
            return _forward(q, k, v, sinks, carried, Expansion(weight, expand, of), plan, links, scale, score._replace(bias=bias))

        out, lse = tape.keep(attend)
        ctx.save_for_backward(q, k, v, sinks, bias, latent, weight, out, lse)
        ctx.ring = expand, plan, links, scale, score._replace(bias=None)
        return out.detach()  # an own handle: autograd would tie the kept one to this graph

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, bias, latent, weight, out, lse = ctx.saved_tensors
        expand, plan, links, scale, score = ctx.ring
        carried, of = _travelling(k, v, latent, links)
        expansion = Expansion(weight, expand, of)
        own, home, dweight, dbias = _backward(dout, q, k, v, out, lse, carried, expansion, plan, links, scale, score._replace(bias=bias))
        dsinks = None if sinks is None else sinks_gradient(dout, out, lse, sinks)
        dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
        dlatent = home[0].to(latent.dtype) if latent is not None else None
        return *(x.to(of.dtype) for x, of in zip(own, (q, k, v), strict=True)), dsinks, dbias, dlatent, dweight, *[None] * 6
