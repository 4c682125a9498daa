"""What only a GPU tells of the kernels: the same bits twice, memory linear in the stream, addresses past 2^31, and what compute-sanitizer finds."""

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ltrain.kernels.attention import Mask, attention
from ltrain.kernels.elementwise_recurrence import scan, selective_scan
from ltrain.kernels.gates import channel_decay, scaled
from ltrain.kernels.glu import Gating, gated_halves
from ltrain.kernels.linear_recurrence import linear_recurrence
from ltrain.kernels.norm import l2_norm
from ltrain.kernels.rope import rotate
from ltrain.kernels.routing import combine, permutation, spread
from ltrain.kernels.routing.gate import Gate, route
from ltrain.kernels.segments import parts
from ltrain.kernels.short_conv import short_conv
from ltrain.kernels.sparse_attention import select
from ltrain.kernels.sparse_attention.latent import latent_attention, latent_index_loss
from ltrain.plan.operators import Operator, Sizes, operators

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = Sizes(selected=512, vocab=32768)
TRITON = sorted(set(operators(SIZES)) - {"norm", "experts"})  # these are torch's


def once(operator: Operator, tokens: int) -> list[torch.Tensor]:
    """Output and gradients."""
    x = operator.inputs(tokens, torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    leaves = {name: t.requires_grad_() for name, t in x.items() if t.is_floating_point() and name not in operator.fixed}
    out = operator.run(x, "triton")
    return [out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]


def index_loss(sizes: Sizes, tokens: int) -> list[torch.Tensor]:
    """The loss of DSA's indexer and its gradients."""
    x = operators(sizes)["dsa"].inputs(tokens, torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    q, latent, index = x["q"], x["latent"], (x["iq"].requires_grad_(), x["ik"].requires_grad_(), x["iw"].requires_grad_())
    chosen = select(*index, parts(torch.tensor([0, tokens // 3, tokens], dtype=torch.int32), tokens), min(sizes.selected, tokens), backend="triton")
    _, lse = latent_attention(q, latent, chosen, width=4 * sizes.head_dim, scale=0.1, backend="triton")
    loss = latent_index_loss(q, latent, lse, index, chosen, scale=0.1, heads=q.shape[1], backend="triton")
    return [loss, *torch.autograd.grad(loss, index)]


def gate(sizes: Sizes, tokens: int) -> list[torch.Tensor]:
    """The router's weights, choice, loads and shares, and its gradients."""
    logits = torch.randn(tokens, sizes.experts, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
    routed = route(logits, torch.zeros(sizes.experts, device="cuda"), Gate(min(2, sizes.experts), "sigmoid", True, 1.5), backend="triton")
    return [*routed, *torch.autograd.grad(routed.weights.square().sum() + routed.shares.square().sum(), logits)]


BESIDE: dict[str, Callable[[Sizes, int], list[torch.Tensor]]] = {
    "index_loss": index_loss,
    "gate": gate,
}  # programs that no operator of the bench runs


def results(name: str, sizes: Sizes, tokens: int) -> list[torch.Tensor]:
    return BESIDE[name](sizes, tokens) if name in BESIDE else once(operators(sizes)[name], tokens)


@pytest.mark.parametrize("name", [*TRITON, *BESIDE])
def test_the_same_bits_twice(name: str) -> None:
    for a, b in zip(results(name, SIZES, 3000), results(name, SIZES, 3000), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", TRITON)
def test_memory_is_linear_in_the_stream(name: str) -> None:
    operator = operators(SIZES)[name]
    peaks = []
    for tokens in (16384, 32768):
        once(operator, tokens)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        once(operator, tokens)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 2.1 * peaks[0], [f"{peak / 2**20:.0f} MiB" for peak in peaks]


LAST = 300  # tokens of the last document, whose numbers lie past 2^31


def bounds(tokens: int) -> torch.Tensor:
    return torch.tensor([0, tokens - LAST, tokens], dtype=torch.int32)


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(len(shape))).mul_(scale)


def far(run: Callable[..., torch.Tensor], *inputs: torch.Tensor, whole: tuple[torch.Tensor, ...] = ()) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradients of the last document's tokens, at the end of a stream and alone; run(bounds, *inputs, *whole)."""
    tokens, found = len(inputs[0]), []
    for last in (False, True):
        leaves = [(x[-LAST:].clone() if last else x).requires_grad_() for x in inputs]
        cu_seqlens = torch.tensor([0, LAST], dtype=torch.int32) if last else bounds(tokens)
        out = run(cu_seqlens, *leaves, *whole)
        weight = torch.zeros_like(out)
        weight[-LAST:] = 1
        found.append([x[-LAST:].clone() for x in (out, *torch.autograd.grad(out, leaves, weight))])
        del out, weight
    return list(zip(*found, strict=True))


def needs(gib: int) -> pytest.MarkDecorator:
    there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return pytest.mark.skipif(there < gib * 2**30, reason=f"needs a GPU with {gib} GiB")


LARGE = [pytest.param(name, marks=needs(120)) for name in ("delta", "head", "channel")]


@pytest.mark.parametrize("name", [*LARGE, "conv", "scan", "mamba", "rope", "glu", "routing", "attention", "norm", "decays", "scaled"])
def test_addresses_past_two_to_the_31(name: str) -> None:
    """A stream of a little more than 2^31 numbers: what its last document gives alone, it gives there, to the bit.

    Chunks of the selective scan and tiles of attention are cut wherever documents begin in them: the last one is cut elsewhere, and rounded there.
    """
    wanted = 2**31 + (1 << 24)
    if name in ("delta", "head", "channel"):
        heads, width = (16, 128)
        tokens = wanted // (heads * width)
        q, k, v = drawn(tokens, heads, width), drawn(tokens, heads, width, scale=width**-0.5), drawn(tokens, heads, width)
        more = {"channel": (tokens, heads, width), "head": (tokens, heads)}.get(name)
        decay = [drawn(*more).abs_().neg_().mul_(0.05)] if more else []
        beta = [drawn(tokens, heads).sigmoid_()] if name == "delta" else []

        def recur(cu: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            given = {"decay": rest[0] if decay else None, "beta": rest[-1] if beta else None}
            return linear_recurrence(q, k, v, **given, cu_seqlens=cu, scale=0.1, backend="triton").output

        pairs = far(recur, q, k, v, *decay, *beta)
    elif name == "conv":
        weight = drawn(2048, 4)
        pairs = far(lambda cu, x: short_conv(x, weight, cu, return_final_state=False, backend="triton")[0], drawn(wanted // 2048, 2048))
    elif name == "scan":
        a, b = drawn(wanted // 2048, 2048).float().sigmoid_(), drawn(wanted // 2048, 2048).float()
        pairs = far(lambda cu, a, b: scan(a, b, cu, backend="triton")[0], a, b)
    elif name == "mamba":
        tokens, rate = wanted // 2048, drawn(2048, 16).float().abs_()
        step = F.softplus(drawn(tokens, 2048) - 4)
        of_tokens = drawn(tokens, 2048), step, drawn(tokens, 16), drawn(tokens, 16)
        pairs = far(lambda cu, x, step, B, C: selective_scan(x, step, rate, B, C, cu, backend="triton")[0], *of_tokens)
    elif name == "rope":
        angles = drawn(wanted // 2048, 1, 32).float()
        pairs = far(lambda cu, x: rotate(x, angles.cos()[-len(x) :], angles.sin()[-len(x) :], backend="triton"), drawn(wanted // 2048, 16, 128))
    elif name == "glu":
        pairs = far(lambda cu, x: gated_halves(x, Gating(), backend="triton"), drawn(wanted // 4096, 4096))
    elif name == "attention":
        tokens = wanted // 2048
        sizes = drawn(tokens, 16, 128), drawn(tokens, 4, 128), drawn(tokens, 4, 128)
        pairs = far(lambda cu, q, k, v: attention(q, k, v, cu, scale=0.1, mask=Mask(window=512), backend="triton"), *sizes)
    elif name == "norm":
        pairs = far(lambda cu, x: l2_norm(x, backend="triton"), drawn(wanted // 2048, 16, 128))
    elif name == "decays":
        A_log, bias = drawn(16).float(), drawn(2048).float()
        pairs = far(lambda cu, a: channel_decay(a, A_log, bias, 16, "softplus", backend="triton"), drawn(wanted // 2048, 2048))
    elif name == "scaled":
        tokens = wanted // 2048
        pairs = far(lambda cu, x, factors: scaled(x, factors, backend="triton"), drawn(tokens, 16, 128), drawn(tokens, 16).float())
    else:
        tokens = wanted // 4096  # each to two experts
        indices = torch.rand(tokens, 8, device="cuda").topk(2, dim=-1).indices

        def routed(cu: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            p = permutation(indices[-len(x) :].contiguous(), 8, backend="triton")
            return combine(spread(x, p, backend="triton"), p, weights, backend="triton")

        pairs = far(routed, drawn(tokens, 2048), drawn(tokens, 2).sigmoid_())
    for at_the_end, alone in pairs:
        assert alone.isfinite().all() and alone.ne(0).any()
        if name in ("mamba", "attention"):
            assert (at_the_end - alone).float().norm() < 0.01 * alone.float().norm()
        else:
            assert torch.equal(at_the_end, alone)


SMALL = Sizes(heads=2, kv_heads=1, head_dim=64, window=64, selected=64, hidden=128, vocab=500, experts=4, inner=64)


def run_small(name: str) -> None:
    results(name, SMALL, 200)
    torch.cuda.synchronize()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("name", [*TRITON, *BESIDE])
def test_compute_sanitizer_is_clean(name: str) -> None:
    words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run([*words, f"from tests.gpu.test_kernels import run_small; run_small({name!r})"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
