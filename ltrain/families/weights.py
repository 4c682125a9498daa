"""Weights by name: which of their tensors hold which rows of ours, both ways, without copying a model.

A logical tensor of ours is one or more parts along its first axis (queries, keys, values...). A tensor of theirs holds some of
these parts, one after another or, with `groups`, interleaved: group after group, each with every part's rows of it. Several of
ours may fill one of theirs: experts along a first axis that ours lack, others one below the other in the order of `at`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltrain.model.layers import layout_of, pieces
from ltrain.model.stack import Stack

Shape = tuple[int, ...]
Row = tuple[str, str, tuple["Weight", ...], object]  # prefix of our names, prefix of theirs, the table below the two, the options of the layer's part


@dataclass(frozen=True)
class Theirs:
    """One of their tensors, or a part of one. Names may hold {leaf} (weight or bias) and {expert} where the name of ours does.

    Where ours is one for each {expert} and theirs is not, the experts lie along its first axis.
    """

    name: str
    parts: tuple[int, ...] = (0,)  # of our tensor, in their order
    groups: str = ""  # the option of the mixer or feed-forward that counts the groups their rows are interleaved in
    transposed: bool = False  # a matrix that is used as x @ W, [in, out]; a bias is not
    unit_axes: tuple[int, ...] = ()  # axes of theirs that have length 1 and that ours lacks
    at: int = 0  # where several of ours are parts of this one: the place of this one among them, from above


@dataclass(frozen=True)
class Weight:
    """One logical tensor of ours, or one for each leaf and expert, and the tensors of theirs that hold it."""

    ours: str
    theirs: tuple[Theirs, ...]
    parts: int = 1  # equal parts, where the layout declares none

    @classmethod
    def same(cls, ours: str, theirs: str, unit_axes: tuple[int, ...] = (), transposed: bool = False, at: int = 0) -> "Weight":
        """The same tensor under two names."""
        return cls(ours, (Theirs(theirs, transposed=transposed, unit_axes=unit_axes, at=at),))

    def counted(self, use: int) -> "Weight":
        """With this number for {use} in their names."""
        return replace(self, theirs=tuple(replace(t, name=t.name.replace("{use}", str(use))) for t in self.theirs))


@dataclass(frozen=True)
class Claim:
    """The rows of one of their tensors that one of ours holds."""

    theirs: str  # full name
    parts: tuple[int, ...]  # of ours
    widths: tuple[int, ...]  # rows of each of these parts
    groups: int
    transposed: bool
    unit_axes: tuple[int, ...]
    expert: int | None  # its place along the first axis, where experts are stacked
    at: int
    start: int = 0  # the row, of each group, at which it begins

    @property
    def rows(self) -> int:
        """Of each group."""
        return sum(self.widths) // self.groups

    def parts_of(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(part, its rows) out of their tensor, or out of one expert's of it."""
        for axis in sorted(self.unit_axes, reverse=True):
            tensor = tensor.squeeze(axis)
        if self.transposed and tensor.ndim == 2:
            tensor = tensor.T
        grouped = tensor.unflatten(0, (self.groups, -1))[:, self.start : self.start + self.rows]  # [G, rows of a group, ...]
        for part, piece in zip(self.parts, grouped.split([width // self.groups for width in self.widths], dim=1), strict=True):
            yield part, piece.flatten(0, 1)

    def rows_of(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Its rows by group [G, rows, ...], out of the parts of ours."""
        return torch.cat([parts[part].unflatten(0, (self.groups, -1)) for part in self.parts], dim=1)


@dataclass(frozen=True)
class Ours:
    """One logical tensor of ours, resolved: its whole shape, the widths of its parts along the first axis, and where they lie in theirs."""

    name: str
    kind: str  # param | buffer
    shape: Shape
    widths: tuple[int, ...]
    claims: tuple[Claim, ...]

    def assemble(self, read: Callable[[str, int | None], Tensor]) -> Tensor:
        """Our tensor, out of theirs: read(name, expert) gives one of theirs, or one expert's of it."""
        parts = dict(p for claim in self.claims for p in claim.parts_of(read(claim.theirs, claim.expert)))
        return parts[0].reshape(self.shape) if len(parts) == 1 else torch.cat([parts[i] for i in range(len(self.widths))])


@dataclass(frozen=True)
class Their:
    """One of their tensors, resolved: its shape, and each of ours that is a part of it."""

    name: str
    shape: Shape
    claims: tuple[tuple[Ours, Claim], ...]

    def assemble(self, read: Callable[[Ours], Tensor]) -> Tensor:
        """Their tensor, out of all of ours."""
        experts: dict[int | None, list[tuple[Ours, Claim]]] = defaultdict(list)
        for ours, claim in self.claims:
            experts[claim.expert].append((ours, claim))
        made = []
        for claims in experts.values():
            rows = torch.cat([claim.rows_of(read(ours).split(ours.widths)) for ours, claim in claims], dim=1).flatten(0, 1)
            made.append(rows.T if claims[0][1].transposed and rows.ndim == 2 else rows)
        return (made[0] if None in experts else torch.stack(made)).reshape(self.shape)


@dataclass(frozen=True)
class Table:
    """Every tensor of a whole model under both names."""

    ours: dict[str, Ours]
    theirs: dict[str, Their]
    unnamed: tuple[str, ...]  # buffers of ours that the family has not


def resolve(stack: Stack, rows: Iterable[Row]) -> Table:
    """The table of a whole model."""
    table = {ours: (theirs, [(_pattern(weight.ours), weight) for weight in weights], options) for ours, theirs, weights, options in rows}
    found: dict[str, Ours] = {}
    unnamed = []
    for name, part in logical(stack).items():
        ours = _resolve(name, part, table)
        if ours is not None:
            found[name] = ours
        else:
            assert part.kind == "buffer", f"the family's table has no row for {name}"
            unnamed.append(name)
    return _place(found, tuple(unnamed))


@dataclass(frozen=True)
class Logical:
    """A tensor of a whole model."""

    kind: str  # param | buffer
    shape: Shape
    splits: tuple[int, ...]  # widths of the parts that the layout declares along the first axis, or none

    @property
    def widths(self) -> tuple[int, ...]:
        return self.splits or self.shape[:1]


def logical(stack: Stack) -> dict[str, Logical]:
    """Every parameter and saved buffer of a whole model."""
    found: dict[str, Logical] = {}
    for name, param in stack.named_parameters():
        for piece in pieces(name, param):  # the same name and shape again for each part
            found[piece.name] = Logical("param", piece.shape, layout_of(param).splits)
    parameters = {name for name, _ in stack.named_parameters(remove_duplicate=False)}
    buffers = {name: b for name, b in stack.state_dict(keep_vars=True).items() if name not in parameters}
    return found | {name: Logical("buffer", tuple(b.shape), ()) for name, b in buffers.items()}


def _place(found: dict[str, Ours], unnamed: tuple[str, ...]) -> Table:
    """Their tensors, out of which of ours lie in each."""
    by_name: dict[str, list[tuple[Ours, Claim]]] = defaultdict(list)
    for ours in found.values():
        for claim in ours.claims:
            by_name[claim.theirs].append((ours, claim))
    places: dict[str, tuple[Shape, list[tuple[str, int]]]] = {}
    placed: dict[tuple[str, str, int], Claim] = {}  # ours, theirs, at
    for name, claims in by_name.items():
        claims.sort(key=lambda c: (c[1].expert or 0, c[1].at))
        row, before = 0, claims[0][1]
        for ours, claim in claims:
            row = row if claim.expert == before.expert else 0
            placed[ours.name, name, claim.at] = replace(claim, start=row)
            row, before = row + claim.rows, claim
        assert all(c.groups == before.groups for _, c in claims), name
        shape = [row * before.groups, *claims[0][0].shape[1:]]
        shape = shape[::-1] if before.transposed and len(shape) == 2 else shape
        for axis in before.unit_axes:
            shape.insert(axis, 1)
        if before.expert is not None:
            shape.insert(0, len({c.expert for _, c in claims}))
        places[name] = tuple(shape), [(ours.name, claim.at) for ours, claim in claims]
    final = {name: replace(ours, claims=tuple(placed[name, c.theirs, c.at] for c in ours.claims)) for name, ours in found.items()}
    theirs = {name: Their(name, shape, tuple((final[o], placed[o, name, at]) for o, at in order)) for name, (shape, order) in places.items()}
    return Table(final, theirs, unnamed)


_Rows = dict[str, tuple[str, list[tuple[re.Pattern[str], Weight]], object]]


def _resolve(name: str, whole: Logical, rows: _Rows) -> Ours | None:
    shape = whole.shape
    for end in [*(i + 1 for i in range(len(name) - 1, 0, -1) if name[i] == "."), 0]:  # longest prefix first
        theirs, weights, options = rows.get(name[:end], ("", [], None))
        for pattern, weight in weights:
            match = pattern.fullmatch(name[end:])
            if match is None:
                continue
            widths = whole.splits or (shape[0] // weight.parts,) * weight.parts
            if len({part for t in weight.theirs for part in t.parts}) == 1:
                widths = (shape[0],)
            assert sorted(p for t in weight.theirs for p in t.parts) == list(range(len(widths))), name
            expert = match.groupdict().get("expert")
            claims = [
                Claim(
                    theirs + t.name.format(**match.groupdict()),
                    t.parts,
                    tuple(widths[part] for part in t.parts),
                    getattr(options, t.groups) if t.groups else 1,
                    t.transposed,
                    t.unit_axes,
                    int(expert) if expert is not None and "{expert}" not in t.name else None,
                    t.at,
                )
                for t in weight.theirs
            ]
            return Ours(name, whole.kind, shape, widths, tuple(claims))
    return None


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\{leaf\}", "(?P<leaf>weight|bias)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(text)
