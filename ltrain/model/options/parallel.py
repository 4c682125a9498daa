"""Mixers side by side."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.model.options.elementwise import RGLRUOptions
from ltrain.schema import ABOVE_0, ConfigError, Limits

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig

SCALES = ("in_scale", "out_scale")


@dataclass
class Branch:
    """One of the mixers, as resolved. In a config its options stand beside these fields."""

    LIMITS: ClassVar[Limits] = dict.fromkeys(SCALES, ABOVE_0)

    mixer: str  # a key of MIXERS
    options: Any  # an instance of that mixer's dataclass
    in_scale: float = 1.0  # times what it reads
    out_scale: float = 1.0  # times what it gives


def heads_width(options: Any) -> int:
    """What a mixer's heads give together for each token."""
    if hasattr(options, "inner"):
        return int(options.inner)
    heads = getattr(options, "value_heads", 0) or options.heads
    return int(heads * (getattr(options, "value_dim", 0) or options.head_dim))


@dataclass
class ParallelOptions(MixerOptions):
    """Mixers side by side on the same input, whose outputs are added (Falcon-H1, Zuo et al. 2025; Hymba, Dong et al. 2024)."""

    # name -> {mixer: a mixer's name (default: the branch's), in_scale, out_scale, its options...}; as written here, and resolved to a Branch
    branches: dict[str, Any] = field(default_factory=lambda: {"attention": {}, "mamba2": {}})
    # Hymba: the mean of what the branches' heads give, each normed over all heads, goes through one output projection; else each has its own
    fuse: bool = False

    def resolved(self) -> Iterator[tuple[str, Branch]]:
        for name, branch in self.branches.items():
            if isinstance(branch, Branch):
                yield name, branch

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        if len(self.branches) < 2:
            raise ConfigError(f"{key}.branches has {len(self.branches)} of the two or more mixers that go side by side: write them, or the one alone")
        for name, branch in self.resolved():
            at = f"{key}.branches.{name}"
            if branch.mixer in ("none", "parallel"):
                raise ConfigError(f"{at}.mixer={branch.mixer} cannot be a branch: write a mixer that reads tokens by itself")
            branch.options.check(at, parallel)
            if self.fuse and branch.out_scale != 1:
                raise ConfigError(
                    f"{at}.out_scale={branch.out_scale:g} has no effect with {key}.fuse=true, which norms what a branch gives: take it out"
                )
            biased = isinstance(branch.options, RGLRUOptions) or any(getattr(branch.options, bias, False) for bias in ("out_bias", "bias"))
            if self.fuse and biased:
                raise ConfigError(f"{at} has a bias in the output projection that {key}.fuse=true takes from it: write no bias")

        widths = {name: heads_width(branch.options) for name, branch in self.resolved()}
        if self.fuse and len(set(widths.values())) > 1:
            told = " and ".join(f"{name} has {width}" for name, width in widths.items())
            raise ConfigError(f"{key}.fuse=true takes the mean of what the branches' heads give, but {told} numbers: make heads x width equal")

        for what, found in (
            ("leave something to later layers", [name for name, branch in self.resolved() if branch.options.gives()]),
            ("need what an earlier layer left", [name for name, branch in self.resolved() if branch.options.takes()[1]]),
        ):
            if len(found) > 1:
                raise ConfigError(f"{key}.branches {' and '.join(found)} both {what}, which one branch of a layer can: write kv: own in the others")

    def softmax_heads(self) -> dict[str, tuple[int, int]]:
        return {
            f"branches.{name}{'.' * bool(key)}{key}": heads
            for name, branch in self.resolved()
            for key, heads in branch.options.softmax_heads().items()
        }

    def gives(self) -> str:
        return next((branch.options.gives() for _, branch in self.resolved() if branch.options.gives()), "")

    def takes(self) -> tuple[str, str]:
        found = ((name, *branch.options.takes()) for name, branch in self.resolved())
        return next(((f"branches.{name}.{option}", giver) for name, option, giver in found if giver), ("", ""))

    def refuses(self) -> dict[str, str]:
        return {kind: f"{why} (its branch {name})" for name, branch in reversed([*self.resolved()]) for kind, why in branch.options.refuses().items()}
