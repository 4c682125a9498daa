"""A Hugging Face model read under our names."""

import fnmatch
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ltrain.checkpoint.index import Shape
from ltrain.families import family_of
from ltrain.families import folder as hugging_face
from ltrain.families.family import Family
from ltrain.families.weights import Table
from ltrain.model.layers import LocalLayers
from ltrain.model.options import ModelConfig
from ltrain.model.stack import Stack
from ltrain.schema import ConfigError


def whole_model(model: ModelConfig, vocab: int, device: torch.device | str, dtype: torch.dtype | None = None) -> Stack:
    """All layers on one device, with unfilled weights."""
    return Stack(model, vocab, LocalLayers.of(model, device, dtype))


class Source:
    """A Hugging Face model read under our names, as `Checkpoint` is.

    Errors: ConfigError where its config is not supported or its tensors are not those that the config makes.
    """

    def __init__(self, path: Path | str):
        self.folder = hugging_face.Folder(path)
        self.path = self.folder.path
        self.family: Family = family_of(self.folder.config)
        self.model = self.family.to_model(self.folder.config)
        stack = whole_model(self.model, self.model.vocab, "meta")
        self.table: Table = self.family.table(stack)
        self.unnamed: dict[str, Tensor] = {n: torch.zeros_like(b, device="cpu") for n, b in stack.named_buffers() if n in self.table.unnamed}
        self.ignored = [*self._check_names(), *self.folder.others]

    def names(self, kind: str) -> list[str]:
        """Logical names of ours of a kind: param or buffer."""
        named = [name for name, ours in self.table.ours.items() if ours.kind == kind]
        return [*named, *self.unnamed] if kind == "buffer" else named

    def shape(self, name: str, kind: str) -> Shape:
        return tuple(self.unnamed[name].shape) if name in self.unnamed else self.table.ours[name].shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Wide enough for every tensor of theirs that makes it up."""
        if name in self.unnamed:
            return self.unnamed[name].dtype
        return reduce(torch.promote_types, [self.folder.dtype(claim.theirs) for claim in self.table.ours[name].claims])

    def read(self, name: str, kind: str, start: Iterable[int] | None = None, shape: Iterable[int] | None = None) -> Tensor:
        """A buffer that the family has not is 0."""
        whole = self.unnamed[name] if name in self.unnamed else self.table.ours[name].assemble(self.folder.read)
        return whole if start is None or shape is None else whole[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]

    def _check_names(self) -> list[str]:
        """Tensors that are no part of the model. Errors: those that it lacks or does not know, another shape."""
        computed = self.family.computed(self.model)
        expected = {*self.table.theirs, *computed}
        self.folder.rename(expected, self.family.renames)
        present = self.folder.names
        missing, unexpected = sorted(expected - present), sorted(present - expected)
        ignored = [n for n in unexpected if self._ignores(n)]
        unexpected = [n for n in unexpected if n not in ignored and not self._tied_copy(n)]
        if missing or unexpected:
            faults = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("has, beyond its config,", unexpected)) if names]
            raise ConfigError(f"{self.path} {' and '.join(faults)}: give the config.json and the weights of one {self.family.model_type} model")
        for name, their in self.table.theirs.items():
            if self.folder.shape(name) != their.shape:
                shapes = f"has shape {list(self.folder.shape(name))} in {self.path}, and its config.json makes it {list(their.shape)}"
                raise ConfigError(f"{name} {shapes}: give the config that it was saved with")
        for name, make in computed.items():
            found, value = self.folder.read(name), make()
            if found.shape != value.shape or not torch.allclose(found.double(), value.double(), rtol=1e-3):
                raise ConfigError(f"{name} in {self.path} is not what its config.json makes it: it was trained, or the config is another model's")
        return ignored

    def _ignores(self, name: str) -> bool:
        """Whether the family says that it is no part of the model."""
        behind = {self.model.depth, *(int(part) for part in name.split(".") if part.isdecimal() and int(part) > self.model.depth)}
        return any(fnmatch.fnmatchcase(name, pattern.format(depth=layer)) for pattern in self.family.ignored for layer in behind)

    def _tied_copy(self, name: str) -> bool:
        """Whether it is the head of a model whose head is its embedding."""
        names = {weight.ours: weight.theirs[0].name for weight in self.family.weights}
        if not self.model.tie_embeddings or name != names["head.weight"]:
            return False
        if not torch.equal(self.folder.read(name), self.folder.read(names["embed.weight"])):
            raise ConfigError(f"{name} in {self.path} is not the embedding, but config.json ties them: write tie_word_embeddings: false")
        return True


def some(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
