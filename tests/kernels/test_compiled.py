"""Every operator's programs compile for a Hopper GPU, in bfloat16, and fit its shared memory."""

from collections.abc import Callable

import pytest
import torch

from ltrain.kernels.carry import Map
from ltrain.plan.operators import Sizes, operators
from tests.kernels.interpreter import GPU, INTERPRETED

pytestmark = pytest.mark.skipif(GPU or INTERPRETED, reason="compiles for a GPU that is not there")

# Of a program that Triton 3.6 made: %state is one tile, and the products of a turn go on while the next one's is loaded.
LOOP = """
    %tile = ttg.local_alloc : () -> !ttg.memdesc<1x64x32xbf16, #shared, #smem, mutable> loc(#loc1)
    %view = ttg.memdesc_index %tile[%c0_i32] : !ttg.memdesc<1x64x32xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x32xbf16, #shared> loc(#loc1)
    %sums:2 = scf.for %turn = %c0_i32 to %V step %c64_i32 iter_args(%sum = %zeros, %other = %zeros) -> (tensor<64x32xf32, #mma>)  : i32 {
      %state = ttg.memdesc_index %tile[%turn] : !ttg.memdesc<1x64x32xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x32xbf16, #shared> loc(#loc1)
      %one = ttng.warp_group_dot %rows, %state, %sum {inputPrecision = 0 : i32, isAsync = true} : tensor<64x32xf32, #mma> loc(#loc2)
      %two = ttng.warp_group_dot %rows, %state, %other {inputPrecision = 0 : i32, isAsync = true} : tensor<64x32xf32, #mma> loc(#loc2)
      %all:2 = ttng.warp_group_dot_wait %one, %two {pendings = PENDING : i32} : tensor<64x32xf32, #mma> loc(#loc2)
      %copy = ttg.async_copy_global_to_local %at, %view mask %inside : tensor<64x32x!tt.ptr<bf16>> -> <64x32xbf16, #shared, #smem, mutable> loc(#loc1)
      scf.yield %all#0, %all#1 : tensor<64x32xf32, #mma> loc(#loc2)
    } loc(#loc2)
"""

# Of a program that ptxas 12.8 made, which is right with UR9 in place of UR4.
PRODUCTS = """
        /*0100*/                   LDG.E R4, desc[UR12][R4.64] ;
        /*0180*/                   R2UR UR4, R4 ;
        /*15b0*/                   USGXT.U32 UR9, UR9, 0xe ;
        /*bee0*/                   UIADD3 UR18, UP1, UR4, 0x40, URZ ;
        /*cbd0*/                   UMOV UR26, UR9 ;
        /*d670*/                   HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR24].tnspB, RZ, !UPT ;
        /*d680*/                   HGMMA.64x32x16.F32.BF16 R24, R60, gdesc[UR16].tnspB, R24 ;
"""

SIZES = Sizes(heads=2, kv_heads=1, selected=64, hidden=128, vocab=256, experts=4)


def test_tiles_that_are_overwritten_are_seen() -> None:
    from tests.kernels.compiled import overwritten

    assert set(overwritten(LOOP.replace("PENDING", "2"))) == set(overwritten(LOOP.replace("PENDING", "1"))) == {"%tile"}
    assert not overwritten(LOOP.replace("PENDING", "0")) and not overwritten(LOOP.replace("PENDING", "2").replace("<1x64", "<2x64"))


def test_products_that_read_elsewhere_are_seen() -> None:
    from tests.kernels.compiled import strayed

    assert ["UR16" in product for product in strayed(PRODUCTS)] == [True]
    assert not strayed(PRODUCTS.replace("UR4, 0x40", "UR9, 0x40"))


@pytest.mark.parametrize("name", sorted(set(operators(SIZES)) - {"norm", "experts"}))
def test_programs_of_an_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.compiled import compiling

    operator = operators(SIZES)[name]
    x = operator.inputs(200, torch.bfloat16, torch.Generator().manual_seed(0))
    leaves = {key: t.requires_grad_() for key, t in x.items() if t.is_floating_point() and key not in operator.fixed}
    with compiling(monkeypatch) as found:
        out = operator.run(leaves | {key: t for key, t in x.items() if key not in leaves}, "triton")
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    assert found


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("delta", [True, False])
def test_programs_of_narrow_heads(delta: bool, decay: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.linear_recurrence import linear_recurrence
    from tests.kernels.compiled import compiling

    q, k, v, decays = (torch.zeros(70, 2, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    beta = torch.zeros(70, 2) if delta else None
    with compiling(monkeypatch) as found:
        decays = decays if decay == "channel" else decays[..., 0]
        out = linear_recurrence(q, k, v, decays, beta, torch.tensor([0, 70], dtype=torch.int32), scale=1.0, backend="triton").output
        torch.autograd.grad(out, [q, k, v, decays], torch.ones_like(out))
    assert found


@pytest.mark.parametrize("delta", [True, False])
def test_programs_of_the_widest_heads(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many documents as let a program have most columns of a state."""
    from ltrain.kernels.linear_recurrence import linear_recurrence
    from tests.kernels.compiled import compiling

    q, k, v, decay = (torch.zeros(70, heads, 256, dtype=torch.bfloat16, requires_grad=True) for heads in (2, 2, 16, 16))
    beta = torch.zeros(70, 16) if delta else None
    with compiling(monkeypatch) as found:
        out = linear_recurrence(q, k, v, decay, beta, torch.arange(71, dtype=torch.int32), scale=1.0, backend="triton").output
        torch.autograd.grad(out.sum(), (q, k, v, decay))
    assert found


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [8, 300])
def test_programs_of_a_router(score: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.routing.gate import Gate, route
    from tests.kernels.compiled import compiling

    logits, gate = torch.randn(200, experts, generator=torch.Generator().manual_seed(0)).requires_grad_(), Gate(3, score)
    with compiling(monkeypatch) as found:
        for indices in (None, torch.zeros(200, 3, dtype=torch.int64)):
            routed = route(logits, torch.zeros(experts), gate, indices, backend="triton")
            for out in (routed.weights.sum(), routed.shares.sum(), routed.weights.sum() + routed.shares.sum()):
                torch.autograd.grad(out, logits, retain_graph=True)
    assert len(found) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_programs_of_queries_keys_and_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.gates import channel_decay
    from ltrain.kernels.norm import l2_normed_parts
    from tests.kernels.compiled import compiling

    x, a = torch.randn(200, 4 * 128).to(dtype).requires_grad_(), torch.randn(200, 4).to(dtype).requires_grad_()
    with compiling(monkeypatch) as found:
        q, k, v = l2_normed_parts(x, 1, 128, backend="triton")
        torch.autograd.grad(q.sum() + k.sum() + v.sum(), x)
        torch.autograd.grad(channel_decay(a, torch.zeros(4), torch.zeros(4), 4, "softplus", backend="triton").sum(), a)
    assert len(found) == 4


def test_programs_of_a_convolution_behind_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.short_conv import short_conv
    from tests.kernels.compiled import compiling

    x, weight, state = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in ((200, 128), (128, 4), (2, 3, 128)))
    with compiling(monkeypatch) as found:
        y = short_conv(x, weight, torch.tensor([0, 1, 200], dtype=torch.int32), initial_state=state, return_final_state=False, backend="triton")[0]
        torch.autograd.grad(y.sum(), (x, weight, state))
    assert len(found) == 4


def test_program_of_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.attention import merging
    from tests.kernels.compiled import compiling

    with compiling(monkeypatch) as found:
        for dtype in (torch.float32, torch.bfloat16):
            merging.launch(
                torch.zeros(70, 3, 128, dtype=dtype), torch.zeros(70, 3), torch.zeros(70, 3, 128, dtype=torch.bfloat16), torch.zeros(70, 3)
            )
    assert len(found) == 2


class Answered:
    """The first of three segments begins a document and the last ends it; of the other ranks come zeros."""

    heads, tails = (1, 2), (0, 1)

    def states(self, ends: Callable[[], dict[int, Map]]) -> Callable[[], tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]:
        found = ends()
        return lambda: ({n: torch.zeros_like(found[0][1]) for n in self.heads}, {n: m for n, (m, _) in found.items() if m is not None})

    def gradients(self, own: dict[int, torch.Tensor], matrices: dict[int, torch.Tensor]) -> Callable[[], dict[int, torch.Tensor]]:
        return lambda: {n: torch.zeros_like(own[1]) for n in self.tails}


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("decay", [None, (200, 2), (200, 2, 128)], ids=["none", "head", "channel"])
def test_programs_of_recurrences_over_ranks(decay: tuple[int, ...] | None, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.kernels.linear_recurrence.triton_over_ranks import over_ranks
    from tests.kernels.compiled import compiling

    q, k, v = (torch.zeros(200, 2, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    faded, beta = None if decay is None else torch.zeros(decay), torch.zeros(200, 2) if delta else None
    with compiling(monkeypatch) as found:
        out, after = over_ranks(q, k, v, faded, beta, [0, 64, 128, 200], 1.0, Answered(), True, True)
        assert after is not None and after.shape == (3, 2, 128, 128)
        torch.autograd.grad(out.sum(), (q, k, v))
    counts = {name: sum(key.split()[0] == name for key in found) for name in ("pass_states", "pass_gradients", "add_chunks", "accumulate")}
    # kinds of them: forward those of each group of segments, of M and of E, and in the backward two that make states again; back, of each group
    of_delta_rule, of_sums = {"pass_states": 6, "pass_gradients": 3}, {"add_chunks": 2, "accumulate": 8}
    assert {name: count for name, count in counts.items() if count} == (of_delta_rule if delta else of_sums)
