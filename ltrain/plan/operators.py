"""What `ltrain bench kernels` measures: each operator's inputs, how ours is called, and the floating-point operations it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels import routing
from ltrain.kernels.attention import FULL, Mask, attention
from ltrain.kernels.cross_entropy import linear_cross_entropy_sum
from ltrain.kernels.elementwise_recurrence import scan, selective_scan
from ltrain.kernels.experts import grouped_linear
from ltrain.kernels.gates import channel_decay, scaled
from ltrain.kernels.glu import Gating, gated_halves
from ltrain.kernels.linear_recurrence import linear_recurrence
from ltrain.kernels.norm import gated_rms_norm, l2_norm, rms_norm
from ltrain.kernels.rope import rotate
from ltrain.kernels.segments import parts
from ltrain.kernels.short_conv import short_conv
from ltrain.kernels.sparse_attention import select
from ltrain.kernels.sparse_attention.block_means import block_attention
from ltrain.kernels.sparse_attention.latent import latent_attention
from ltrain.kernels.sparse_attention.native import Shape, native_attention
from ltrain.plan.peers import Inputs

CHUNK = 64  # tokens: the chunk whose products count as a linear recurrence's


class Sizes(NamedTuple):
    """Those of Mamba-2, the scans and the convolution follow from heads and head_dim."""

    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 4096
    selected: int = 2048  # keys that DSA's indexer gives each query; of NSA's and MoBA's blocks see `nsa_shape` and `moba_blocks`
    hidden: int = 4096  # of the cross entropy, the norm and the experts
    vocab: int = 131072
    states: int = 16  # of a channel in Mamba's scan
    experts: int = 16
    inner: int = 1024  # width of an expert
    eps: float = 1e-6

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def nsa_heads(self) -> int:
        return 4 * self.heads

    @property
    def nsa_shape(self) -> Shape:
        """The paper's, for 2048 selected keys of DSA: 32, 16, 64, 16."""
        block = max(self.selected // 128, 1) * 4
        return Shape(block // 2, block // 4, block, 16)

    @property
    def moba_blocks(self) -> tuple[int, int]:
        """Tokens of a block, and blocks that a query sees: as many keys as DSA's twice."""
        return max(self.selected // 4, 1), 8


@dataclass(frozen=True)
class Operator:
    """inputs: of so many tokens, in a type; run: their output by one of our backends.

    flops: of the matrix products of a forward over so many tokens (of a scan: its multiplications and additions); both: times that of a
    forward and a backward together; once: those that have no backward beside them. fixed: names of inputs that have no gradient.
    """

    family: str
    inputs: Callable[[int, torch.dtype, torch.Generator], Inputs]
    run: Callable[[Inputs, str], Tensor]
    flops: Callable[[int], float]
    both: float = 3.0  # each product has two in the backward
    fixed: tuple[str, ...] = ()
    once: Callable[[int], float] = lambda tokens: 0.0


class _Random(NamedTuple):
    """Draws from a normal distribution of standard deviation 1."""

    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return drawn.to(dtype or self.dtype)


def _alone(x: Tensor) -> Tensor:
    return torch.tensor([0, len(x)], dtype=torch.int32)


def _linear(s: Sizes, decay: str, delta: bool) -> Operator:
    """decay: constant, none, head or channel."""

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        shape = (tokens, s.heads, s.head_dim)
        x = {"q": draw(*shape), "k": F.normalize(draw(*shape, dtype=torch.float32), dim=-1).to(dtype), "v": draw(*shape)}
        if decay == "constant":
            x["decay"] = -(2 ** (-8 * torch.arange(1, s.heads + 1, device=generator.device, dtype=torch.float32) / s.heads))
        elif decay != "none":
            x["decay"] = F.logsigmoid(draw(*shape[: 2 if decay == "head" else 3], dtype=torch.float32)) / 16
        if delta:
            x["beta"] = draw(*shape[:2]).sigmoid()
        return x

    def run(x: Inputs, backend: str) -> Tensor:
        faded = x["decay"].expand(len(x["q"]), -1) if decay == "constant" else x.get("decay")
        return linear_recurrence(x["q"], x["k"], x["v"], faded, x.get("beta"), _alone(x["q"]), scale=s.scale, backend=backend).output

    return Operator(
        "linear_recurrence",
        inputs,
        run,
        lambda n: n * s.heads * _recurrence_flops(s.head_dim, s.head_dim, delta),
        fixed=("decay",) * (decay == "constant"),
    )


def _recurrence_flops(key: int, value: int, delta: bool) -> float:
    """Per token and head in the chunked form: the state read and written, q k^T and its product with the values; with the delta rule also the
    state recalled, k k^T and the solved system applied to keys and values."""
    return 2 * (2 + delta) * key * value + 2 * CHUNK * (key + value) + delta * 2 * CHUNK * (2 * key + value)


def _mamba2(s: Sizes) -> Operator:
    heads, width, groups, states = 4 * s.heads, max(1, s.head_dim // 2), max(1, s.heads // 2), s.head_dim

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        # the state's own scale: keys of length about 1
        b, c = (draw(tokens, groups, states) * states**-0.5 for _ in range(2))
        step = F.softplus(draw(tokens, heads, dtype=torch.float32) - 4)
        return {"x": draw(tokens, heads, width), "step": step, "rate": draw(heads, dtype=torch.float32).exp(), "B": b, "C": c}

    def run(x: Inputs, backend: str) -> Tensor:
        values = scaled(x["x"], x["step"], backend="reference" if backend == "reference" else "auto")
        return linear_recurrence(x["C"], x["B"], values, -x["step"] * x["rate"], None, _alone(values), scale=1.0, backend=backend).output

    return Operator("linear_recurrence", inputs, run, lambda n: n * heads * _recurrence_flops(states, width, False))


def _mamba(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        step = F.softplus(draw(tokens, s.channels, dtype=torch.float32) - 4).to(dtype)
        rate = draw(s.channels, s.states, dtype=torch.float32).exp()
        return {"x": draw(tokens, s.channels), "step": step, "rate": rate, "B": draw(tokens, s.states), "C": draw(tokens, s.states)}

    def run(x: Inputs, backend: str) -> Tensor:
        return selective_scan(x["x"], x["step"], x["rate"], x["B"], x["C"], _alone(x["x"]), backend=backend)[0]

    # decay, its product with the state, step x B added, and what C reads
    return Operator("elementwise_recurrence", inputs, run, lambda n: 7 * n * s.channels * s.states)


def _rg_lru(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(torch.float32, generator)  # states and decays are wide whatever the activations are
        return {"log_a": F.logsigmoid(draw(tokens, s.channels)) / 16, "b": draw(tokens, s.channels)}

    def run(x: Inputs, backend: str) -> Tensor:
        return scan(x["log_a"].exp(), x["b"], _alone(x["b"]), backend=backend)[0]

    return Operator("elementwise_recurrence", inputs, run, lambda n: 3 * n * s.channels)


def _short_conv(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        return {"x": draw(tokens, s.channels), "weight": draw(s.channels, 4)}

    def run(x: Inputs, backend: str) -> Tensor:
        return short_conv(x["x"], x["weight"], _alone(x["x"]), return_final_state=False, backend=backend)[0]

    return Operator("short_conv", inputs, run, lambda n: 8 * n * s.channels)


def _attention(s: Sizes, mask: Mask) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        k, v = (draw(tokens, s.kv_heads, s.head_dim) for _ in range(2))
        return {"q": draw(tokens, s.heads, s.head_dim), "k": k, "v": v}

    def run(x: Inputs, backend: str) -> Tensor:
        return attention(x["q"], x["k"], x["v"], _alone(x["q"]), scale=s.scale, mask=mask, backend=backend)

    def flops(tokens: int) -> float:
        reach = min(mask.window or tokens, tokens)
        return 4 * s.heads * s.head_dim * (reach * (reach + 1) / 2 + (tokens - reach) * reach)

    # scores are made again in the backward: five products beside the forward's two
    return Operator("attention", inputs, run, flops, both=3.5)


def _dsa(s: Sizes, fp8: bool = False) -> Operator:
    """DeepSeek-V3.2's, for 16 heads x 128: 128 heads, latents of 512 + 64 numbers, an indexer of 64 heads x 128."""
    heads, rank, rest, index_heads = 8 * s.heads, 4 * s.head_dim, s.head_dim // 2, 4 * s.heads

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        index = {"iq": draw(tokens, index_heads, s.head_dim), "ik": draw(tokens, s.head_dim), "iw": draw(tokens, index_heads, dtype=torch.float32)}
        return {"q": draw(tokens, heads, rank + rest), "latent": draw(tokens, rank + rest), **index}

    def run(x: Inputs, backend: str) -> Tensor:
        whole = parts(_alone(x["q"]), len(x["q"]))
        indices = select(x["iq"], x["ik"], x["iw"], whole, min(s.selected, len(x["q"])), fp8=fp8, backend=backend)
        return latent_attention(x["q"], x["latent"], indices, width=rank, scale=(1.5 * s.head_dim) ** -0.5, backend=backend)[0]

    def flops(tokens: int) -> float:
        reach = min(s.selected, tokens)
        return 2 * heads * (2 * rank + rest) * (reach * (reach + 1) / 2 + (tokens - reach) * reach)

    def once(tokens: int) -> float:
        return index_heads * s.head_dim * tokens * (tokens + 1)

    # scores again and their gradients, and the products with queries, latents and values: (3 (rank + rest) + 2 rank) beside 2 rank + rest
    both = 1 + (5 * rank + 3 * rest) / (2 * rank + rest)
    return Operator("sparse_attention", inputs, run, flops, both, ("iq", "ik", "iw"), once)


def _seen(t: int, block: int, top: int) -> int:
    """Keys of `top` blocks, its own among them, of the query at place t."""
    return min(t + 1, (top - 1) * block + t % block + 1)


def _nsa(s: Sizes, means: bool) -> Operator:
    """Both branches of the kernels, added up, with 16 query heads to a K/V head for 16 and 4 heads. means: a compressed block is the mean of
    the keys, and of the values, of a selected one, as fla has it."""
    heads, shape = s.nsa_heads, s.nsa_shape
    if means:
        shape = Shape(shape.block, shape.block, shape.block, shape.top)

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        q, (k, v) = draw(tokens, heads, s.head_dim), (draw(tokens, s.kv_heads, s.head_dim) for _ in range(2))
        compressed = {} if means else {name: draw(shape.compressed(tokens), s.kv_heads, s.head_dim) for name in ("kc", "vc")}
        return {"q": q, "k": k, "v": v, **compressed}

    def compress(x: Tensor) -> Tensor:
        return x[: len(x) // shape.block * shape.block].unflatten(0, (-1, shape.block)).mean(1)

    def run(x: Inputs, backend: str) -> Tensor:
        kc, vc = (compress(x["k"]), compress(x["v"])) if means else (x["kc"], x["vc"])
        whole = parts(_alone(x["q"]), len(x["q"]))
        return sum(native_attention(x["q"], x["q"], kc, vc, x["k"], x["v"], whole, scale=s.scale, shape=shape, backend=backend))  # type: ignore[return-value]

    def flops(tokens: int) -> float:
        return 4 * heads * s.head_dim * sum(shape.compressed(t + 1) + _seen(t, shape.block, shape.top) for t in range(tokens))

    def once(tokens: int) -> float:  # the importance of compressed blocks, where not all are selected
        return 2 * heads * s.head_dim * sum(shape.compressed(t + 1) for t in range(shape.top * shape.block, tokens))

    return Operator("sparse_attention", inputs, run, flops, 3.5, once=once)


def _moba(s: Sizes) -> Operator:
    """Each query head has keys and values of its own."""
    block, top = s.moba_blocks

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        return {name: draw(tokens, s.heads, s.head_dim) for name in ("q", "k", "v")}

    def run(x: Inputs, backend: str) -> Tensor:
        whole = parts(_alone(x["q"]), len(x["q"]))
        return block_attention(x["q"], x["k"], x["v"], whole, scale=s.scale, block=block, top=top, backend=backend)

    def flops(tokens: int) -> float:
        return 4 * s.heads * s.head_dim * sum(_seen(t, block, top) for t in range(tokens))

    def once(tokens: int) -> float:  # products with the means of the blocks before
        return 2 * s.heads * s.head_dim * sum(t // block for t in range(top * block, tokens))

    return Operator("sparse_attention", inputs, run, flops, 3.5, once=once)


def _cross_entropy(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        labels = torch.randint(s.vocab, (tokens,), generator=generator, device=generator.device)
        return {"x": draw(tokens, s.hidden), "weight": draw(s.vocab, s.hidden) * s.hidden**-0.5, "labels": labels}

    def run(x: Inputs, backend: str) -> Tensor:
        return linear_cross_entropy_sum(x["x"], x["weight"], x["labels"], factor=1 / len(x["x"]), backend=backend).objective

    return Operator("cross_entropy", inputs, run, lambda n: 2 * n * s.hidden * s.vocab)


def _norm(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        return {"x": draw(tokens, s.hidden), "weight": draw(s.hidden)}

    return Operator("norm", inputs, lambda x, backend: rms_norm(x["x"], x["weight"], s.eps), lambda n: 4 * n * s.hidden)


def _norm_of_heads(s: Sizes, gated: bool) -> Operator:
    """To length 1, or RMSNorm times a gate."""

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw, shape = _Random(dtype, generator), (tokens, s.heads, s.head_dim)
        return {"x": draw(*shape)} | ({"weight": draw(s.head_dim, dtype=torch.float32), "z": draw(*shape)} if gated else {})

    def run(x: Inputs, backend: str) -> Tensor:
        if gated:
            return gated_rms_norm(x["x"], x["weight"], x["z"], s.eps, "silu", backend=backend)
        return l2_norm(x["x"], s.eps, backend=backend)

    return Operator("gates", inputs, run, lambda n: (8 if gated else 4) * n * s.channels)


def _channel_decay(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        wide = {"A_log": draw(s.heads, dtype=torch.float32), "bias": draw(s.channels, dtype=torch.float32)}
        return {"a": draw(tokens, s.channels), **wide}

    def run(x: Inputs, backend: str) -> Tensor:
        return channel_decay(x["a"], x["A_log"], x["bias"], s.heads, "softplus", backend=backend)

    return Operator("gates", inputs, run, lambda n: 6 * n * s.channels)


def _rope(s: Sizes) -> Operator:
    """Of queries, whose heads turn whole."""

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        rates = 1e4 ** (-torch.arange(0, s.head_dim, 2, device=generator.device) / s.head_dim)
        angles = torch.arange(tokens, device=generator.device)[:, None, None] * rates
        return {"x": draw(tokens, s.heads, s.head_dim), "cos": angles.cos(), "sin": angles.sin()}

    return Operator(
        "rope", inputs, lambda x, backend: rotate(x["x"], x["cos"], x["sin"], backend=backend), lambda n: 3 * n * s.channels, 2.0, ("cos", "sin")
    )


def _glu(s: Sizes) -> Operator:
    """SwiGLU, as wide as two experts."""
    width = 2 * s.inner

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {"x": _Random(dtype, generator)(tokens, 2 * width)}

    return Operator("glu", inputs, lambda x, backend: gated_halves(x["x"], Gating(), backend=backend), lambda n: 5 * n * width)


def _experts(s: Sizes) -> Operator:
    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        counts = torch.full((s.experts,), tokens // s.experts, device=generator.device)
        counts[0] += tokens % s.experts
        return {"x": draw(tokens, s.hidden), "weight": draw(s.experts, s.inner, s.hidden) * s.hidden**-0.5, "counts": counts}

    def run(x: Inputs, backend: str) -> Tensor:
        return grouped_linear(x["x"], x["weight"], x["counts"], backend=backend)

    return Operator("experts", inputs, run, lambda n: 2 * n * s.hidden * s.inner)


def _routing(s: Sizes) -> Operator:
    """To two experts of each token and back, without what these do."""

    def inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        draw = _Random(dtype, generator)
        return {"x": draw(tokens, s.hidden), "scores": draw(tokens, s.experts, dtype=torch.float32)}

    def run(x: Inputs, backend: str) -> Tensor:
        indices = routing.best(x["scores"].detach(), 2, backend=backend)
        p = routing.permutation(indices, s.experts, backend=backend)
        return routing.combine(routing.spread(x["x"], p, backend=backend), p, x["scores"].gather(1, indices), backend=backend)

    return Operator("experts", inputs, run, lambda n: 8 * n * s.hidden)


def operators(s: Sizes) -> dict[str, Operator]:
    """By name, in the sizes asked for."""
    return {
        "lightning": _linear(s, "constant", False),
        "gla": _linear(s, "channel", False),
        "delta_net": _linear(s, "none", True),
        "gated_delta_net": _linear(s, "head", True),
        "kda": _linear(s, "channel", True),
        "mamba2": _mamba2(s),
        "mamba": _mamba(s),
        "rg_lru": _rg_lru(s),
        "short_conv": _short_conv(s),
        "causal": _attention(s, FULL),
        "window": _attention(s, Mask(window=s.window)),
        "dsa": _dsa(s),
        "dsa_fp8": _dsa(s, fp8=True),
        "nsa": _nsa(s, means=False),
        "nsa_means": _nsa(s, means=True),
        "moba": _moba(s),
        "cross_entropy": _cross_entropy(s),
        "norm": _norm(s),
        "l2_norm": _norm_of_heads(s, False),
        "gated_norm": _norm_of_heads(s, True),
        "channel_decay": _channel_decay(s),
        "rope": _rope(s),
        "glu": _glu(s),
        "experts": _experts(s),
        "routing": _routing(s),
    }
