"""Other people's kernels for what `ltrain bench kernels` measures, each of them optional: how it is called on our inputs.

What a peer wants to be laid out differently is laid out in `prepare`, which is not timed; both functions are differentiable, so that its
output and gradients can be compared with ours.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltrain.kernels.linear_recurrence import linear_recurrence

Inputs = dict[str, Tensor]


def installed_version(distribution: str) -> str | None:
    """None: no such distribution is installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _as_given(x: Inputs) -> Inputs:
    return x


class Peer(NamedTuple):
    """run: what `prepare` makes of the inputs, and the sizes of the operator -> the output as our operator has it."""

    name: str
    package: str  # to import
    distribution: str  # whose version counts
    run: Callable[[Inputs, Any], Tensor]
    prepare: Callable[[Inputs], Inputs] = _as_given
    same: bool = True  # computes what ours does; else what ours is to take the place of

    @property
    def version(self) -> str | None:
        """None: it is not installed."""
        return None if find_spec(self.package) is None else installed_version(self.distribution) or ""


def _batch(*tensors: Tensor) -> list[Tensor]:
    return [x.unsqueeze(0) for x in tensors]


def _fla_lightning(x: Inputs, s: Any) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(*_batch(x["q"], x["k"], x["v"]), g_gamma=x["decay"], scale=s.scale)[0][0]


def _fla_gla(x: Inputs, s: Any) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(*_batch(x["q"], x["k"], x["v"], x["decay"]), scale=s.scale)[0][0]


def _fla_delta_rule(x: Inputs, s: Any) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(*_batch(x["q"], x["k"], x["v"], x["beta"]), scale=s.scale)[0][0]


def _fla_gated_delta_rule(x: Inputs, s: Any) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(*_batch(x["q"], x["k"], x["v"], x["decay"], x["beta"]), scale=s.scale)[0][0]


def _fla_kda(x: Inputs, s: Any) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(*_batch(x["q"], x["k"], x["v"], x["decay"], x["beta"]), scale=s.scale)[0][0]


def _ours_by_package(x: Inputs, s: Any) -> Tensor:
    """Our own operator, its backend the package: what `auto` could take."""
    decay = x.get("decay")
    faded = decay.expand(len(x["q"]), -1) if decay is not None and decay.ndim == 1 else decay
    alone = torch.tensor([0, len(x["q"])], dtype=torch.int32)
    return linear_recurrence(x["q"], x["k"], x["v"], faded, x.get("beta"), alone, scale=s.scale, backend="fla").output


def _fla_hgrn(x: Inputs, s: Any) -> Tensor:
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(*_batch(x["b"], x["log_a"]))[0][0]


def _fla_conv(x: Inputs, s: Any) -> Tensor:
    from fla.modules.conv import causal_conv1d

    return causal_conv1d(x["x"].unsqueeze(0), x["weight"], activation="silu")[0][0]


def _mamba_ssd(x: Inputs, s: Any) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inner, step, B, C = _batch(x["x"], x["step"], x["B"], x["C"])
    return mamba_chunk_scan_combined(inner, step, -x["rate"], B, C, chunk_size=256)[0]


def _channels_first(x: Inputs) -> Inputs:
    """[T, n] -> [1, n, T], as mamba's convolution leaves them."""
    return {name: tensor if name == "rate" else tensor.T.unsqueeze(0).contiguous() for name, tensor in x.items()}


def _mamba_scan(x: Inputs, s: Any) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(x["x"], x["step"], -x["rate"], x["B"], x["C"])[0].T


def _causal_conv1d(x: Inputs, s: Any) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x["x"].T.unsqueeze(0), x["weight"], activation="silu")[0].T


def _heads_first(x: Inputs) -> Inputs:
    """[T, H, D] -> [1, H, T, D]"""
    return {name: tensor.transpose(0, 1).unsqueeze(0).contiguous() for name, tensor in x.items()}


def _sdpa(backend: SDPBackend) -> Callable[[Inputs, Any], Tensor]:
    def run(x: Inputs, s: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, scale=s.scale, enable_gqa=True)[0].transpose(0, 1)

    return run


def _dense_mla(x: Inputs) -> Inputs:
    """Keys and values of every head, as latents are expanded to without a selection: of 576 numbers, to keys of 192 and values of 128."""
    tokens, heads, width = x["q"].shape
    key, value = width // 3, 2 * width // 9
    g = torch.Generator(x["q"].device).manual_seed(3)
    q, k, v = (torch.randn(1, heads, tokens, n, generator=g, device=x["q"].device, dtype=x["q"].dtype) for n in (key, key, value))
    return {"q": q, "k": k, "v": v}


def _dense(x: Inputs) -> Inputs:
    """All keys, without a selection."""
    return _heads_first({name: x[name] for name in ("q", "k", "v")})


def _fla_nsa(x: Inputs, s: Any) -> Tensor:
    from fla.ops.nsa import parallel_nsa

    one = x["q"].new_ones(1, *x["q"].shape[:2])  # the gates of both branches
    shape = s.nsa_shape
    given = _batch(x["q"], x["k"], x["v"])
    return parallel_nsa(*given, g_cmp=one, g_slc=one, block_counts=shape.top, block_size=shape.block, window_size=0, scale=s.scale)[0]


def _fla_moba(x: Inputs, s: Any) -> Tensor:
    from fla.ops.moba import parallel_moba

    tokens, (block, top) = len(x["q"]), s.moba_blocks
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=x["q"].device)
    return parallel_moba(*_batch(x["q"], x["k"], x["v"]), bounds, tokens, block, top)[0]


@cache
def _flex(tokens: int, window: int, device: torch.device) -> tuple[Any, Any]:
    """FlexAttention, compiled, and its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return torch.compile(flex_attention, dynamic=False), create_block_mask(sees, None, None, tokens, tokens, device, _compile=True)


def _flex_window(x: Inputs, s: Any) -> Tensor:
    if not x["q"].is_cuda:
        raise ValueError("is compiled, which pays on a GPU only")
    attend, mask = _flex(x["q"].shape[2], s.window, x["q"].device)
    out: Tensor = attend(x["q"], x["k"], x["v"], block_mask=mask, scale=s.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _liger_cross_entropy(x: Inputs, s: Any) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(x["x"], x["weight"], x["labels"])
    loss: Tensor = found[0] if isinstance(found, tuple) else found  # older ones give the loss alone
    return loss


def _torch_cross_entropy(x: Inputs, s: Any) -> Tensor:
    return F.cross_entropy(F.linear(x["x"], x["weight"]).float(), x["labels"])


def _liger_rms_norm(x: Inputs, s: Any) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # the last: not to write its gradient over the output's
    normed: Tensor = LigerRMSNormFunction.apply(x["x"], x["weight"], s.eps, 0.0, "llama", False)
    return normed


def _liger_swiglu(x: Inputs, s: Any) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gated: Tensor = LigerSiLUMulFunction.apply(*x["x"].chunk(2, dim=-1))
    return gated


def _torch_swiglu(x: Inputs, s: Any) -> Tensor:
    gate, up = x["x"].chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_rope(x: Inputs, s: Any) -> Tensor:
    first, second = x["x"].chunk(2, dim=-1)
    return torch.cat((first * x["cos"] - second * x["sin"], second * x["cos"] + first * x["sin"]), dim=-1).to(x["x"].dtype)


def _torch_routing(x: Inputs, s: Any) -> Tensor:
    weights, indices = x["scores"].topk(2, dim=-1)
    by_expert = indices.flatten().sort(stable=True).indices
    rows = x["x"][by_expert // 2]
    return torch.zeros_like(x["x"]).index_add(0, by_expert // 2, rows * weights.flatten()[by_expert].to(rows.dtype).unsqueeze(-1))


def _fla_kda_gate(x: Inputs, s: Any) -> Tensor:
    from fla.ops.kda.gate import fused_kda_gate

    y: Tensor = fused_kda_gate(x["a"].unflatten(-1, (s.heads, -1)), x["A_log"], x["bias"])
    return y


def _torch_l2_norm(x: Inputs, s: Any) -> Tensor:
    return F.normalize(x["x"], dim=-1, eps=s.eps)


def _torch_gated_norm(x: Inputs, s: Any) -> Tensor:
    return F.rms_norm(x["x"], x["weight"].shape, x["weight"].to(x["x"].dtype), s.eps) * F.silu(x["z"])


def _fla(name: str, run: Callable[[Inputs, Any], Tensor]) -> Peer:
    return Peer(f"fla {name}", "fla", "flash-linear-attention", run)


OURS_BY_FLA = Peer("ltrain, backend=fla", "fla", "flash-linear-attention", _ours_by_package)

PEERS: dict[str, list[Peer]] = {
    "lightning": [_fla("simple_gla", _fla_lightning), OURS_BY_FLA],
    "gla": [_fla("gla", _fla_gla)],
    "delta_net": [_fla("delta_rule", _fla_delta_rule), OURS_BY_FLA],
    "gated_delta_net": [
        _fla("gated_delta_rule", _fla_gated_delta_rule),
        OURS_BY_FLA._replace(package="flash_qla", distribution="flash-qla"),
    ],
    "kda": [_fla("kda", _fla_kda)],
    "mamba2": [Peer("mamba_ssm ssd", "mamba_ssm", "mamba-ssm", _mamba_ssd)],
    "mamba": [Peer("mamba_ssm scan", "mamba_ssm", "mamba-ssm", _mamba_scan, _channels_first)],
    "rg_lru": [_fla("hgrn", _fla_hgrn)],
    "short_conv": [Peer("causal_conv1d", "causal_conv1d", "causal-conv1d", _causal_conv1d), _fla("conv", _fla_conv)],
    "causal": [
        Peer("sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _heads_first),
        Peer("sdpa flash", "torch", "torch", _sdpa(SDPBackend.FLASH_ATTENTION), _heads_first),
    ],
    "window": [Peer("flex", "torch", "torch", _flex_window, _heads_first)],
    "dsa": [Peer("dense sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _dense_mla, same=False)],
    "dsa_fp8": [Peer("dense sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _dense_mla, same=False)],
    "nsa": [Peer("dense sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _dense, same=False)],
    "nsa_means": [_fla("nsa", _fla_nsa), Peer("dense sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _dense, same=False)],
    "moba": [_fla("moba", _fla_moba), Peer("dense sdpa cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), _dense, same=False)],
    "cross_entropy": [
        Peer("liger", "liger_kernel", "liger-kernel", _liger_cross_entropy),
        Peer("whole logits", "torch", "torch", _torch_cross_entropy),
    ],
    "rope": [Peer("halves", "torch", "torch", _torch_rope)],
    "glu": [Peer("liger", "liger_kernel", "liger-kernel", _liger_swiglu), Peer("silu, product", "torch", "torch", _torch_swiglu)],
    "routing": [Peer("index_add", "torch", "torch", _torch_routing)],
    "l2_norm": [Peer("normalize", "torch", "torch", _torch_l2_norm)],
    "gated_norm": [Peer("rms_norm, silu", "torch", "torch", _torch_gated_norm)],
    "channel_decay": [_fla("kda gate", _fla_kda_gate)],
    "norm": [Peer("liger", "liger_kernel", "liger-kernel", _liger_rms_norm)],
}
