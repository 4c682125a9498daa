"""Other people's context parallelism beside ours, for `ltrain bench context-parallel`: Transformer Engine's for softmax attention, fla's for the
delta rules. Each is optional, and runs forward and backward on inputs of its own.

Their layouts want documents whose lengths are multiples of twice the ranks: lengths are rounded down to that.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], None]


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    rope: int  # of multi-head latent attention: keys have head_dim + rope numbers
    window: int


class Place(NamedTuple):
    """Where a peer runs: over the ranks of a group, or on this rank alone."""

    group: dist.ProcessGroup | None
    device: torch.device
    dtype: torch.dtype

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def drawn(self, tokens: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        """This rank's share of tokens"""
        g = torch.Generator(self.device).manual_seed(0)
        mine = tokens // self.ranks
        return [torch.randn(mine, *s, generator=g, device=self.device, dtype=self.dtype).div_(8).requires_grad_() for s in shapes]


class Peer(NamedTuple):
    """build: (documents, shape, where) -> a forward and a backward."""

    name: str
    package: str
    distribution: str
    build: Callable[[list[int], Shape, Place], Run]
    operators: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """None: it is not installed."""
        if find_spec(self.package) is None:
            return None
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return ""


def _gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    def both() -> None:
        out = run()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def _cu_seqlens(documents: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *documents]).cumsum(0).to(device, torch.int32)


def _transformer_engine(window: bool = False, latent: bool = False) -> Callable[[list[int], Shape, Place], Run]:
    def build(documents: list[int], s: Shape, at: Place) -> Run:
        from transformer_engine.pytorch import DotProductAttention

        width, kv_heads = (s.head_dim + s.rope, s.heads) if latent else (s.head_dim, s.kv_heads)
        packed = len(documents) > 1
        more: dict[str, Any] = {}
        if at.group is not None:
            # a window goes with gathered keys only
            more = {
                "cp_group": at.group,
                "cp_global_ranks": dist.get_process_group_ranks(at.group),
                "cp_stream": torch.cuda.Stream(),
                "cp_comm_type": "all_gather" if window else "p2p",
            }
        attend = DotProductAttention(
            s.heads,
            (width, s.head_dim),
            num_gqa_groups=kv_heads,
            qkv_format="thd" if packed else "bshd",
            attn_mask_type="padding_causal" if packed else "causal",
            window_size=(s.window - 1, 0) if window else None,
            softmax_scale=width**-0.5,
            **more,
        )
        leaves = at.drawn(sum(documents), (s.heads, width), (kv_heads, width), (kv_heads, s.head_dim))
        if not packed:
            return _gradients(lambda: attend(*(x.unsqueeze(0) for x in leaves)), leaves)
        cu_seqlens, longest = _cu_seqlens(documents, at.device), max(documents)
        bounds = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"), cu_seqlens)
        return _gradients(lambda: attend(*leaves, **bounds, max_seqlen_q=longest, max_seqlen_kv=longest), leaves)

    return build


def _fla(channel: bool) -> Callable[[list[int], Shape, Place], Run]:
    def build(documents: list[int], s: Shape, at: Place) -> Run:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda

        heads, wide = (s.heads,), (s.heads, s.head_dim)
        q, k, v, decay, beta = leaves = at.drawn(sum(documents), wide, wide, wide, wide if channel else heads, heads)
        cu_seqlens = _cu_seqlens(documents, at.device).long()
        more: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if at.group is not None:
            from fla.ops.cp import build_cp_context

            context = build_cp_context(cu_seqlens, at.group)
            more = {"cu_seqlens": context.cu_seqlens, "cp_context": context}
        run: Any = chunk_kda if channel else chunk_gated_delta_rule

        def forward() -> Tensor:
            given = q, F.normalize(k, dim=-1), v, F.logsigmoid(decay.float()) / 16, beta.float().sigmoid()
            out: Tensor = run(*(x.unsqueeze(0) for x in given), scale=s.head_dim**-0.5, **more)[0]
            return out

        return _gradients(forward, leaves)

    return build


def _te(build: Callable[[list[int], Shape, Place], Run], *operators: str) -> Peer:
    return Peer("Transformer Engine", "transformer_engine", "transformer-engine", build, operators)


PEERS = (
    _te(_transformer_engine(), "attention"),
    _te(_transformer_engine(window=True), "window"),
    _te(_transformer_engine(latent=True), "mla"),
    Peer("fla", "fla", "flash-linear-attention", _fla(False), ("gated_delta_net",)),
    Peer("fla", "fla", "flash-linear-attention", _fla(True), ("kda",)),
)


def rounded(documents: list[int], ranks: int) -> list[int]:
    """Lengths that all peers take."""
    return [n // (2 * ranks) * 2 * ranks for n in documents if n >= 2 * ranks]
