"""What models can be made of and which come from Hugging Face, read from the code: docstrings, options and the families' tables."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ltrain import schema
from ltrain.families import FAMILIES, family
from ltrain.families.family import Role
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import Mixer, build_mixer
from ltrain.model.options import MIXERS, NO_MIXER
from ltrain.pattern import build_options

PARALLELISMS = ("tensor", "context", "pipeline")
FP8_PRODUCTS = ("column", "row", "experts")  # of the factory: what ltrain.parallel.fp8_layers makes
BEGIN, END = "<!-- ltrain models --markdown -->", "<!-- end -->"  # around its output in the README


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    about: str  # and the paper
    mixers: tuple[str, ...]  # of a family
    supports: dict[str, bool]


class _Recording(LocalLayers):
    """A factory without memory that knows which layers it gave and would give in FP8."""

    def __init__(self) -> None:
        super().__init__(device="meta")
        self.made: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in FP8_PRODUCTS:
            self.made.add(name)
        return super().__getattribute__(name)


def supports(mixer: str, fixed: dict[str, Any]) -> dict[str, bool]:
    """What a mixer with these options works under, the others at their defaults."""
    _, options = build_options(mixer, fixed, mixer, lambda key: "")
    refused, layers = options.refuses(), _Recording()
    built: Mixer = build_mixer(mixer, 64, options, layers)
    decodes = type(built).decode is not Mixer.decode and "decode" not in refused
    return {**{name: name not in refused for name in PARALLELISMS}, "FP8": {"column", "row"} <= layers.made, "decode": decodes}


def mixers() -> list[Row]:
    """Every name that a config may write as `mixer`."""
    found = []
    for name, (_, options, _) in MIXERS.items():
        if name != NO_MIXER:
            papers: dict[str, str] = options.PAPERS  # type: ignore[attr-defined]
            found.append(Row(name, papers.get(name) or _first(options.__doc__), (), supports(name, {})))
    return found


def families() -> list[Row]:
    """Every model_type of Hugging Face that converts."""
    found = []
    for name in FAMILIES:
        roles: Iterable[Role] = [role for role in family(name).mixers.values() if role.mixer != NO_MIXER]
        each = [supports(role.mixer, {k: v for k, v in role.fixed.items() if k != "block"}) for role in roles]
        about = _first(import_module(f"ltrain.families.models.{name}").__doc__)
        used = tuple(dict.fromkeys(role.mixer for role in roles))
        supported = {key: all(s[key] for s in each) for key in each[0]}
        supported["pipeline"] &= family(name).shared is None  # such blocks serve all stages
        found.append(Row(name, about, used, supported))
    return found


def _first(doc: str | None) -> str:
    """The first sentence of a docstring."""
    text = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    return text.removesuffix(".")


def _cells(row: Row, family: bool) -> list[str]:
    marks = ["yes" if there else "no" for there in row.supports.values()]
    return [row.name, row.about, *([", ".join(row.mixers)] if family else []), *marks]


def tables() -> list[list[list[str]]]:
    """The two tables, each with a line of headings."""
    support = [*PARALLELISMS, "FP8", "decode"]
    return [
        [["mixer", "what it is", *support], *(_cells(row, False) for row in mixers())],
        [["model_type", "family", "mixers", *support], *(_cells(row, True) for row in families())],
    ]


def markdown() -> str:
    """As in the README."""
    found = []
    for head, *rows in tables():
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *([f"`{row[0]}`", *row[1:]] for row in rows))]
        found.append("\n".join(lines))
    return "\n\n".join(found)


def placed(document: str) -> str:
    """A document with the tables between its marks."""
    before, _, rest = document.partition(BEGIN)
    if END not in rest:
        raise schema.ConfigError(f"the file has no lines {BEGIN} and {END}: write them where the tables go")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{rest.partition(END)[2]}"


def text() -> str:
    """In columns."""
    found = []
    for table in tables():
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        found.append("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table))
    return "\n\n".join(found)
