"""The Triton kernels against float64: on a GPU every case, elsewhere some of them in Triton's interpreter."""

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ltrain.kernels.linear_recurrence import linear_recurrence
from tests.kernels.interpreter import DEVICE, GPU, on_gpu, runs
from tests.kernels.test_linear_recurrence import BOTH, cu, inputs


def compare(lengths, tolerance, *, dtype=torch.float32, with_map=False, reset=(), lowest=-1e9, backend="triton", constant=False, **kwargs):
    """Output, final state and every gradient, relative RMS below `tolerance`, of the same rounded inputs; constant: one row of decays for all tokens,
    which has no gradient."""
    x = inputs(lengths, dtype=dtype, **kwargs)
    for token in reset:
        x[3].data[token] = lowest
    x[3:] = [None if t is None else t.detach().float().requires_grad_() for t in x[3:]]
    x = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in x]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in x]
    if constant:
        x[3], wide[3] = (t[3].detach()[0].expand(len(t[0]), -1) for t in (x, wide))
    given = [t is not None and t.requires_grad for t in x]
    names = ["output", "state", *itertools.compress(["dq", "dk", "dv", "ddecay", "dbeta", "dstate"], given)]
    found = []
    # token by token would take minutes on a GPU, where `chunked`, which is held to the reference elsewhere, is exact enough in float64
    for tensors, by in ((x, backend), (wide, "chunked" if GPU else "reference")):
        q, k, v, decay, beta, state = tensors
        result = linear_recurrence(
            q, k, v, decay, beta, cu(lengths), scale=0.4, initial_state=state, return_final_state=True, return_segment_map=with_map, backend=by
        )
        g = torch.Generator().manual_seed(1)
        outputs = [result.output, result.final_state, *(result.segment_map or ())]
        loss = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)).sum() for t in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, list(itertools.compress(tensors, given)))])
    names[2:2] = ["M", "E"] if with_map else []
    for name, got, expected in zip(names, *found, strict=True):
        assert got.isfinite().all(), name
        error = (got.double() - expected).norm() / expected.norm()
        # What passes a decay is a difference of what is read and written, each rounded: behind strong decays little is left of it.
        most = 1.5 * tolerance if name == "ddecay" else tolerance
        assert error < most, f"{name}: relative error {error:.2e}"


def expected_level(decay):
    """The level of `tiles.first_level` for float32, for one chunk [64, H, K]."""
    sums = [decay.unflatten(0, (-1, size)).sum(1).min() for size in (32, 16, 8)]
    return next((level for level, total in zip((5, 4, 3), sums, strict=True) if total > -16), 0)


MIXED = [64, 0, 65, 1, 63]


@runs
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_what_is_neither_given_nor_wanted(group, delta):
    """One row of decays for all tokens and no states, and no gradients of them or through the other output: the same numbers as with all of them. But
    a token's own part of dq and dk is rounded like the others where no decay has a gradient, which that would disturb."""
    lengths = [70, 0, 3]
    x = inputs(lengths, heads=1, group=group, delta=delta, dtype=torch.float32)
    q, k, v, decay, beta, state = (None if t is None else t.detach().to(DEVICE) for t in x)
    leaves = [t.requires_grad_() for t in (q, k, v, beta) if t is not None]
    row, found = decay[0].expand(len(q), -1), []
    for given in (True, False):
        decays, start = (row.contiguous().requires_grad_(), torch.zeros_like(state).requires_grad_()) if given else (row, None)
        args = q, k, v, decays, beta, cu(lengths)
        whole = linear_recurrence(*args, scale=0.4, initial_state=start, return_final_state=True, return_segment_map=True, backend="triton")
        part = linear_recurrence(*args, scale=0.4, initial_state=start, return_final_state=given, backend="triton")
        losses = part.output.square().sum(), whole.final_state.square().sum()
        if given:
            losses = losses[0] + 0 * part.final_state.sum(), losses[1] + 0 * whole.output.sum()
        grads = [grad for loss in losses for grad in torch.autograd.grad(loss, leaves)]
        found.append([whole.output, whole.final_state, *whole.segment_map, part.output, *grads])
    tolerance = 0 if delta or group > 1 else 1e-5
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*found, strict=True))


@runs
@pytest.mark.parametrize(("decay", "delta"), BOTH)
def test_what_is_kept_or_made_again_is_the_same(decay, delta):
    """The same numbers either way, and beside the inputs no more kept than what pairs of tokens take."""
    x = inputs([70, 0, 130], heads=1, group=2, width=16, value_width=16, decay=decay, delta=delta, dtype=torch.float32)
    leaves = [None if t is None else t.detach().float().to(DEVICE).requires_grad_() for t in x]
    given = [t for t in leaves if t is not None]
    found, kept = [], []
    for recompute in (False, True):
        sizes = {}
        with saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t
        ):
            *args, state = leaves
            out = linear_recurrence(*args, cu([70, 0, 130]), scale=0.4, initial_state=state, backend="triton", recompute=recompute).output
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
        inputs_at = {t.untyped_storage().data_ptr() for t in given}
        kept.append(sum(size for address, size in sizes.items() if address not in inputs_at))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    pairs = len(leaves[0]) * leaves[2].shape[1] * 64 * 4 * ((decay == "channel" or delta) + delta)
    assert kept[1] <= pairs + 64 < kept[0]


@runs
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("lowest", [-1e13, torch.finfo(torch.float32).min])
def test_tokens_that_are_reset_per_head(lowest, delta):
    """However low a finite decay is, nothing of before is left, and the decays beside it are what they are."""
    compare([66, 3], 1e-5, heads=1, group=2, width=16, value_width=16, level=-0.5, delta=delta, reset=(5, 6, 40, 63), lowest=lowest)


@runs
@pytest.mark.parametrize("decay", ["none", "head"])
def test_value_heads_that_read_together(decay):
    """In 16 bits, chunks of two blocks of values of at most 64 channels."""
    compare([200, 1, 128], 2e-3, heads=2, group=2, width=32, value_width=48, dtype=torch.float16, level=-0.1, decay=decay, delta=False)


@runs
@pytest.mark.parametrize(("decay", "delta"), BOTH)
def test_updates_and_decays(decay, delta):
    compare([65, 2], 1e-5, heads=1, group=2, width=16, value_width=16, decay=decay, delta=delta)


@runs
@pytest.mark.parametrize("level", [-1e-6, -5.0, -40.0])
def test_decay_levels(level):
    compare([66], 1e-5, heads=1, width=16, value_width=16, level=level)


@runs
@pytest.mark.parametrize(("level", "first"), [(-1e-6, 5), (-0.7, 5), (-1.4, 4), (-2.5, 3), (-5.0, 0), (-40.0, 0), (-1000.0, 0), (None, 0)])
def test_decay_levels_per_channel(level, first):
    """Every level that pairs of tokens may start from,."""
    x = inputs([64], heads=1, width=16, value_width=16, decay="channel", level=level)[3]
    assert expected_level(x.detach()) == first
    compare([64], 1e-5, heads=1, width=16, value_width=16, decay="channel", level=level)


@runs
@pytest.mark.parametrize("delta", [True, False])
def test_tokens_that_are_reset_per_channel(delta):
    """Decays of -1e9 between decays near 0: what is left of an exponent after them is exact."""
    compare([66, 3], 1e-5, heads=1, width=16, value_width=16, decay="channel", level=-0.5, delta=delta, reset=(5, 6, 40, 63))


@runs
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_widths_that_are_no_powers_of_two_and_empty_segments(decay):
    compare(MIXED, 1e-5, heads=1, group=2, width=20, value_width=40, decay=decay)


@runs
@pytest.mark.parametrize(("decay", "group"), [("none", 1), ("head", 2), ("channel", 1), ("channel", 2)])
def test_chunks_of_several_blocks(decay, group):
    """Where nothing is erased, a chunk has 4 blocks of 64 tokens: documents of one token more or less."""
    compare([257, 1, 255], 1e-5, heads=1, group=group, width=20, value_width=40, decay=decay, delta=False)


@runs
@pytest.mark.parametrize(("blocks", "lengths"), [(8, [700, 256]), (1, [530, 63])])
def test_several_chunks(blocks, lengths, monkeypatch):
    """And more than `accumulate` loads at a time, where a chunk has one block."""
    monkeypatch.setattr("ltrain.kernels.linear_recurrence.triton_launches.BLOCKS", blocks)
    compare(lengths, 1e-5, heads=1, width=16, value_width=16, delta=False)


@runs
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("level", [-1e-3, -5.0, -40.0])
def test_decay_levels_between_blocks(level, decay):
    compare([200], 1e-5, heads=1, width=16, value_width=16, level=level, decay=decay, delta=False)


@runs
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.float16, 0.05)])
def test_what_strong_decays_leave_of_gradients(dtype, tolerance):
    """A decay's gradient is next to nothing where it lets nothing pass, though the sums that it comes from are large: relative to itself."""
    strong = list(range(10, 200, 20))
    x = inputs([200], heads=1, width=16, value_width=16, level=-0.1, delta=False, dtype=dtype)
    x[3].data[strong] = -8.0
    found = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "chunked")):
        of = kind, kind, kind, torch.promote_types(kind, torch.float32), None, torch.promote_types(kind, torch.float32)
        q, k, v, logs, beta, state = (None if t is None else t.detach().to(DEVICE, to).requires_grad_() for t, to in zip(x, of, strict=True))
        output = linear_recurrence(q, k, v, logs, beta, cu([200]), scale=0.4, initial_state=state, backend=backend).output
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        found.append(torch.autograd.grad((output * weights.to(output)).sum(), logs)[0].double()[strong])
    assert (found[0] - found[1]).norm() < tolerance * found[1].norm()


@runs
@pytest.mark.parametrize(("width", "value_width"), [(256, 16), (16, 256)])
def test_wide_heads(width, value_width):
    compare([66], 1e-5, heads=1, width=width, value_width=value_width, decay="channel")


@runs
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("delta", [True, False])
def test_half_precision(decay, delta):
    compare([130], 5e-3, heads=1, width=16, value_width=16, dtype=torch.float16, decay=decay, delta=delta)


@runs
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("delta", [True, False])
def test_segment_map(decay, delta):
    compare([65, 3], 1e-5, heads=1, width=16, value_width=24, with_map=True, decay=decay, delta=delta)


@runs
def test_repeated_keys():
    """The system (I + A) is then as far from the identity as it gets: powers of A would overflow."""
    x = inputs([130], heads=1, width=16, value_width=16, decay="none", dtype=torch.float64)
    x[1] = x[1][:1].expand(130, 1, 16)
    x[4] = torch.ones_like(x[4])
    wide = [None if t is None else t.detach() for t in x]
    near = [None if t is None else t.float().to(DEVICE).contiguous() for t in wide]
    for_each = {"scale": 0.4, "return_final_state": True}
    got = linear_recurrence(*near[:5], cu([130]), initial_state=near[5], backend="triton", **for_each)
    expected = linear_recurrence(*wide[:5], cu([130]), initial_state=wide[5], backend="reference", **for_each)
    torch.testing.assert_close(got.output.cpu().double(), expected.output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.final_state.cpu().double(), expected.final_state, rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": torch.zeros(10, 4, 257)}, "at most 256"),
        ({"q": torch.zeros(10, 2, 8).half()}, "one type"),
        ({"chunk": 32}, "chunks of 64"),
    ],
)
def test_refusals(change, words):
    args = {"q": torch.zeros(10, 2, 8), "k": torch.zeros(10, 2, 8), "v": torch.zeros(10, 4, 4), "decay": None, "beta": None}
    args = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in {**args, **change}.items()}
    with pytest.raises(ValueError, match=f"backend='triton' .*{words}"):
        linear_recurrence(**args, cu_seqlens=cu([10]), scale=1.0, backend="triton")


@on_gpu
@pytest.mark.parametrize(("decay", "delta"), BOTH)
@pytest.mark.parametrize(
    ("width", "value_width"), [(16, 16), (32, 48), (60, 60), (64, 64), (64, 128), (128, 64), (128, 128), (192, 96), (128, 256), (256, 256)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_every_shape_on_the_gpu(width, value_width, dtype, tolerance, decay, delta):
    for lengths, group, level in itertools.product([[500], MIXED, [1] * 70, [257, 700, 1, 255, 256]], [1, 8], [-1e-3, -1.0, -5.0, None]):
        compare(lengths, tolerance, heads=2, group=group, width=width, value_width=value_width, dtype=dtype, level=level, decay=decay, delta=delta)


@on_gpu
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("level", [-0.5, -5.0, None])
def test_resets_in_bfloat16(level, delta):
    compare([500, 65], 0.02, width=128, value_width=128, dtype=torch.bfloat16, decay="channel", level=level, delta=delta, reset=range(5, 500, 37))


@on_gpu
def test_the_same_twice():
    x = [
        t.detach().to("cuda", torch.bfloat16 if i < 3 else torch.float32).requires_grad_()
        for i, t in enumerate(inputs([5000], width=64, value_width=64))
    ]

    def once():
        output = linear_recurrence(*x[:5], cu([5000]), scale=1.0, initial_state=x[5], backend="triton").output
        return [output, *torch.autograd.grad(output.square().sum(), x)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@on_gpu
def test_a_million_tokens():
    """Offsets beyond 2^31 elements: the end of the stream against its own last part, carried in by the state."""
    tokens, tail, heads, width = 2**20, 1000, 24, 96
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, width, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    decay, beta = -torch.rand(tokens, heads, generator=g, device="cuda"), torch.rand(tokens, heads, generator=g, device="cuda")
    with torch.no_grad():
        at = tokens - tail
        first = linear_recurrence(q[:at], k[:at], v[:at], decay[:at], beta[:at], cu([at]), scale=1.0, return_final_state=True)
        last = linear_recurrence(q[at:], k[at:], v[at:], decay[at:], beta[at:], cu([tail]), scale=1.0, initial_state=first.final_state)
        whole = linear_recurrence(q, k, v, decay, beta, cu([tokens]), scale=1.0)
    error = (whole.output[at:].float() - last.output.float()).norm() / last.output.float().norm()
    assert error < 0.01
