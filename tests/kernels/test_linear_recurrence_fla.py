"""Linear recurrences by optional packages: which calls go there, what they are handed, and on a GPU that has the packages the results against
float64, with the limits of our own kernels."""

import inspect
import itertools
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from ltrain.kernels.linear_recurrence import chunked, fla, linear_recurrence
from ltrain.kernels.linear_recurrence.fla import CONSTANT, DELTA, GATED_DELTA, Kind
from ltrain.kernels.recurrence import Linear
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import build_mixer
from ltrain.model.options import RECURRENCES, LinearRecurrenceOptions
from ltrain.model.sequence import Sequence
from tests.kernels.interpreter import GPU
from tests.kernels.test_linear_recurrence import LENGTHS, cu, gradients, inputs
from tests.kernels.test_linear_recurrence_triton import MIXED, compare

FORMS = {CONSTANT: {"decay": "head", "delta": False}, DELTA: {"decay": "none"}, GATED_DELTA: {"decay": "head"}}
KINDS = pytest.mark.parametrize("kind", FORMS, ids=["constant", "delta", "gated_delta"])


def needs(package):
    return pytest.mark.skipif(not GPU or find_spec(package) is None, reason=f"needs a GPU and {package}")


FLA, QLA = needs("fla"), needs("flash_qla")
EACH = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(CONSTANT, marks=FLA, id="constant"),
        pytest.param(DELTA, marks=FLA, id="delta"),
        pytest.param(GATED_DELTA, marks=QLA, id="gated_delta"),
    ],
)


# What is handed over


def stand_in(seen):
    """Has the packages' arguments, and computes by our reference."""

    def run(q, k, v, first=None, second=None, *, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu=None, g_gamma=None):
        assert len(q) == 1 and (first is None) == (g_gamma is not None)
        cuts = cu([q.shape[1]]) if cu_seqlens is None else cu_seqlens
        assert cuts.dtype == torch.int32 and (cuts.diff() > 0).all()
        if cu_seqlens_cpu is not None:
            assert torch.equal(cu_seqlens_cpu, cuts)
        seen.append(cu_seqlens)
        decay = g_gamma.expand(q.shape[1], -1) if first is None else None if second is None else first[0]
        beta = second if second is not None else first
        x = q[0], k[0], v[0], decay, None if beta is None else beta[0]
        result = linear_recurrence(*x, cuts, scale=scale, initial_state=initial_state, return_final_state=output_final_state, backend="reference")
        return result.output.unsqueeze(0), result.final_state

    return run


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for both, and the cuts that they were called with."""
    seen = []
    monkeypatch.setattr(fla, "_fla", lambda: {DELTA: stand_in(seen), CONSTANT: stand_in(seen)})
    monkeypatch.setattr(fla, "_flash_qla", lambda: stand_in(seen))
    pieces = ModuleType(fla.PIECES)
    for name in fla.HOW_FAR:
        setattr(pieces, name, lambda threshold=-10.0: threshold)
    monkeypatch.setitem(sys.modules, fla.PIECES, pieces)
    return seen


@KINDS
@pytest.mark.parametrize("lengths", [x for x in LENGTHS if sum(x)], ids=str)
@pytest.mark.parametrize("begun", [True, False])
def test_packed_segments_states_and_gradients_are_handed_over(kind, lengths, begun, packages):
    """Segments without tokens are left out of the call, and their states pass."""
    x = inputs(lengths, dtype=torch.float32, **FORMS[kind])
    if kind == CONSTANT:
        x[3] = x[3].detach()[0].expand(sum(lengths), -1)
    leaves = [t for t in (x if begun else x[:5]) if t is not None and t.requires_grad]
    state = x[5] if begun else None
    bounds = cu(lengths)
    output, final = fla.linear_recurrence(*x[:5], bounds.tolist(), 0.4, state, True)
    assert len(packages) == 1 and (packages[0] is None) == (sum(n > 0 for n in lengths) == 1)
    expected = linear_recurrence(*x[:5], bounds, scale=0.4, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close((output, final), expected[:2])
    torch.testing.assert_close(gradients(expected._replace(output=output, final_state=final), leaves), gradients(expected, leaves))
    assert fla.linear_recurrence(*x[:5], bounds.tolist(), 0.4, state, False)[1] is None


def test_pieces_are_taken_whole_in_a_call_and_not_after_it(packages, monkeypatch):
    pieces, asked = sys.modules[fla.PIECES], []
    own = [getattr(pieces, name) for name in fla.HOW_FAR]

    def gated(*args, **kwargs):
        asked.append([getattr(pieces, name)(**given) for name in fla.HOW_FAR for given in ({}, {"threshold": -10.0})])
        raise RuntimeError("no memory")

    monkeypatch.setattr(fla, "_flash_qla", lambda: gated)
    x = inputs([5], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no memory"):
        fla.linear_recurrence(*x[:5], [0, 5], 0.4, None, False)
    assert asked == [[fla.NEVER] * 4]
    assert [getattr(pieces, name) for name in fla.HOW_FAR] == own and own[0]() == -10.0


def test_a_flash_qla_whose_pieces_cannot_be_taken_whole_is_refused(packages, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fla, "find_spec", lambda name: name)
    package, pieces = ModuleType("flash_qla"), ModuleType(fla.PIECES)
    package.chunk_gated_delta_rule = stand_in([])
    for name in fla.HOW_FAR:
        setattr(pieces, name, lambda threshold: threshold)
    preprocess = ModuleType(f"{fla.PIECES}.cp.preprocess")
    names = ", ".join(fla.HOW_FAR)
    exec(f"def cp_preprocess_fwd():\n    from {fla.PIECES} import {names}\n    return {names}", vars(preprocess))
    monkeypatch.setitem(sys.modules, "flash_qla", package)
    for module in (pieces, preprocess):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    find = inspect.unwrap(fla._flash_qla)
    assert find() is package.chunk_gated_delta_rule
    exec(f"def cp_preprocess_fwd():\n    return {names}", vars(preprocess))  # from its own module, as it found them when it was loaded
    assert "how to take pieces of documents whole" in find()
    monkeypatch.delitem(sys.modules, preprocess.__name__)  # 0.1.2 has no such module
    assert "how to take pieces of documents whole" in find()
    monkeypatch.setitem(sys.modules, preprocess.__name__, preprocess)
    exec(f"def cp_preprocess_fwd():\n    from {fla.PIECES} import {names}\n    return {names}", vars(preprocess))
    pieces.get_warmup_chunks_bidi = lambda tokens: tokens
    assert "how to take pieces of documents whole" in find()
    del pieces.get_warmup_chunks_bidi
    assert "how to take pieces of documents whole" in find()
    del package.chunk_gated_delta_rule
    assert "which does not load" in find()


def test_an_fla_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(fla, "find_spec", lambda name: name)
    rule, simple = ModuleType("fla.ops.delta_rule"), ModuleType("fla.ops.simple_gla")
    rule.chunk_delta_rule = simple.chunk_simple_gla = stand_in([])
    for module in (rule, simple):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    find = inspect.unwrap(fla._fla)
    assert find() == {DELTA: rule.chunk_delta_rule, CONSTANT: simple.chunk_simple_gla}
    simple.chunk_simple_gla = lambda q, k, v, cu_seqlens=None: v
    assert find() == "needs flash-linear-attention 0.6.0 or newer"
    del rule.chunk_delta_rule
    assert "which does not load" in find()


# Which calls go there


def call(**change):
    x = dict(zip(("q", "k", "v", "decay", "beta"), inputs([10], width=128, value_width=128, dtype=torch.bfloat16), strict=False))
    x = {name: t.detach() for name, t in x.items()} | {"backend": "fla", "cu_seqlens": cu([10]), "scale": 1.0}
    return linear_recurrence(**{**x, **change})


def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "runs on CUDA, not on cpu: choose triton, chunked or auto"),
        ({"decay": torch.zeros(10, 2, 128)}, "not delta ones with decay=channel"),
        ({"beta": None}, "not additive ones with decay=head"),
        ({"beta": None, "decay": None}, "not additive ones with decay=none"),
        ({"return_segment_map": True}, "has no map of a segment"),
        ({"q": torch.zeros(10, 2, 128)}, "takes q, k and v in bfloat16, not torch.float32"),
        ({"initial_state": half(1, 2, 128, 128)}, "takes an initial state in float32, not torch.bfloat16"),
        ({"v": half(10, 2, 64)}, "takes heads of 128 for Gated DeltaNet, not 128 and 64"),
        ({"decay": None, "v": half(10, 2, 40)}, "takes heads of at most 256 in multiples of 16, not 128 and 40"),
        ({"decay": None, "v": half(10, 2, 272)}, "takes heads of at most 256 in multiples of 16, not 128 and 272"),
        ({"decay": None, "q": half(10, 1, 128), "k": half(10, 1, 128)}, "takes as many key heads as value heads, not 1 and 2"),
        ({"q": half(10, 1, 128), "k": half(10, 1, 128)}, "runs on CUDA"),
        ({"beta": None, "decay": torch.zeros(2, requires_grad=True).expand(10, -1)}, "has no gradient of one row of decays"),
        ({"beta": None, "decay": torch.zeros(2).expand(10, -1)}, "runs on CUDA"),
        ({"decay": torch.zeros(2).expand(10, -1)}, "runs on CUDA"),
        ({"scale": 0.0}, "takes a scale other than 0"),
    ],
)
def test_refusals(change, words, packages):
    with pytest.raises(ValueError, match=f"backend='fla' .*{words}"):
        call(**change)


def test_an_empty_stream_and_numbers_past_32_bits_are_refused(packages, monkeypatch):
    x = {name: half(0, 2, 128) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match="takes at least one token"):
        call(**x, decay=torch.zeros(0, 2), beta=torch.zeros(0, 2), cu_seqlens=cu([0]))
    # two chunks of 2 heads x 128 x 128 are as many numbers as one more is too many
    monkeypatch.setattr(fla, "NUMBERS", 2 * 2 * 128 * 128 + 1)
    with pytest.raises(ValueError, match="runs on CUDA"):
        call(cu_seqlens=cu([4, 6]))
    with pytest.raises(ValueError, match=r"less than 2\^31 numbers"):
        call(cu_seqlens=cu([4, 5, 1]))


@KINDS
def test_a_package_that_is_not_there_is_named(kind, monkeypatch):
    monkeypatch.setattr(fla, "find_spec", lambda name: None)
    for name in ("_fla", "_flash_qla"):
        monkeypatch.setattr(fla, name, inspect.unwrap(getattr(fla, name)))
    change = {} if kind == GATED_DELTA else {"decay": None} if kind == DELTA else {"beta": None, "decay": torch.zeros(2).expand(10, -1)}
    name = "FlashQLA for Gated DeltaNet" if kind == GATED_DELTA else "flash-linear-attention"
    with pytest.raises(ValueError, match=f"backend='fla' needs {name}, which is not installed"):
        call(**change)


def test_a_gpu_that_flash_qla_has_no_kernels_for_is_refused(packages, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(fla, "_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"runs Gated DeltaNet on GPUs of capability 9.0, 10.0, 10.3, not \(8, 0\)"):
        call()
    assert call(decay=None).output.shape == (10, 2, 128)
    monkeypatch.setattr(fla, "_capability", lambda device: (9, 0))
    assert call().output.shape == (10, 2, 128)


@pytest.fixture
def taken(monkeypatch):
    """Who runs what `auto` decides, on a GPU that a table has: fla or chunked."""
    seen = []
    monkeypatch.setattr(fla, "FASTER", {(9, 0): {DELTA: 32768, CONSTANT: 32768}})
    monkeypatch.setattr(fla, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(fla, "refusal", lambda *args: None)
    monkeypatch.setattr(fla, "linear_recurrence", lambda q, k, v, *rest: (seen.append("fla") or v, None))
    monkeypatch.setattr(chunked, "linear_recurrence", lambda q, k, v, *rest: (seen.append("chunked") or v, None, None))
    monkeypatch.delenv("LTRAIN_KERNELS", raising=False)
    return seen


def layer(kind, tokens=32768, width=128):
    """What a layer of the model gives to be carried along its stream."""
    q = half(tokens, 1, width)
    rates = torch.tensor([0.5], dtype=torch.float64)
    decay = {"none": None, "head": torch.zeros(tokens, 1), "channel": torch.zeros(tokens, 1, width), "constant": (-rates.float()).expand(tokens, -1)}
    beta = torch.zeros(tokens, 1) if kind.update == "delta" else None
    return Linear(q, q, q, decay[kind.decay], beta, 1.0, -rates if kind.decay == "constant" else None)


@pytest.mark.parametrize("kind", [Kind(*x) for x in itertools.product(("none", "constant", "head", "channel"), ("additive", "delta"))], ids=str)
def test_auto_takes_what_was_measured_faster(kind, taken):
    """A constant decay of the delta rule is one per head."""
    recurrence = layer(kind)
    for begun in (None, torch.zeros(1, *recurrence.state_shape)):
        recurrence.run(recurrence.alone, begun, final=begun is not None)
    assert taken == ["fla" if kind in (DELTA, CONSTANT) else "chunked"] * 2


@pytest.mark.parametrize("kind", [DELTA, CONSTANT], ids=str)
def test_auto_takes_nothing_that_was_not_measured(kind, taken, monkeypatch):
    recurrences = [layer(kind), layer(kind, tokens=32767), layer(kind, width=64)]
    for recurrence in recurrences:
        recurrence.run(recurrence.alone)
    assert taken == ["fla", "chunked", "chunked"]
    monkeypatch.setattr(fla, "_capability", lambda device: (10, 0))
    recurrences[0].run(recurrences[0].alone)
    assert taken.pop() == "chunked"
    monkeypatch.setattr(fla, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(fla, "refusal", lambda *args: "is not there")
    recurrences[0].run(recurrences[0].alone)
    assert taken.pop() == "chunked"


@pytest.mark.parametrize("kind", [DELTA, CONSTANT], ids=str)
def test_auto_takes_no_package_where_torch_is_deterministic(kind, taken, monkeypatch):
    recurrence = layer(kind)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    recurrence.run(recurrence.alone)
    monkeypatch.undo()
    assert taken == ["chunked"]


def test_auto_takes_no_package_where_plain_torch_is_asked_for(taken, monkeypatch):
    monkeypatch.setenv("LTRAIN_KERNELS", "reference")
    recurrence = layer(DELTA)
    recurrence.run(recurrence.alone)
    assert taken == ["chunked"]


@pytest.mark.parametrize("name", ["delta_net", "lightning", "retention", "gated_delta_net", "gla"])
def test_a_mixer_of_the_model_reaches_it(name, taken, monkeypatch):
    """What a mixer makes of its options is of the kind that they say."""
    monkeypatch.setattr(fla, "FASTER", {(9, 0): {DELTA: 8, CONSTANT: 8}})
    options = LinearRecurrenceOptions(**{**RECURRENCES[name], "key_heads": 2, "value_heads": 2, "key_dim": 128, "value_dim": 128})
    module = build_mixer(name, 32, options, LocalLayers(std=0.3, dtype=torch.bfloat16))
    seed_parameters(module, 0)
    module(torch.zeros(9, 32, dtype=torch.bfloat16, requires_grad=True), Sequence.of([4, 5])).sum().backward()
    assert taken == ["fla" if name in ("delta_net", "lightning", "retention") else "chunked"]


def test_a_rank_on_a_cpu_has_no_measurement():
    recurrence = layer(DELTA)
    assert not fla.worthwhile(recurrence.k, recurrence.v, recurrence.decay, recurrence.beta)


# What they compute

SHAPES = [(16, 16), (32, 48), (64, 64), (64, 128), (128, 64), (128, 128), (192, 96), (128, 256), (256, 256)]


@pytest.mark.parametrize(
    ("kind", "width", "value_width"),
    [
        *(pytest.param(kind, *shape, marks=FLA) for kind in (CONSTANT, DELTA) for shape in SHAPES),
        pytest.param(GATED_DELTA, 128, 128, marks=QLA),  # FlashQLA has no other heads
    ],
)
def test_every_shape_on_the_gpu(kind, width, value_width):
    """As of our own kernels: documents of one token more or less than a chunk, of none, of one; decays of every strength."""
    groups = [1, 8] if kind == GATED_DELTA else [1]
    levels = [None] if kind == DELTA else [-1e-3, -1.0, -5.0, None]
    for lengths, group, level in itertools.product([[500], MIXED, [1] * 70, [257, 700, 1, 255, 256]], groups, levels):
        form = {**FORMS[kind], "constant": kind == CONSTANT, "backend": "fla", "dtype": torch.bfloat16, "level": level}
        compare(lengths, 0.02, heads=2, group=group, width=width, value_width=value_width, **form)


@QLA
@pytest.mark.parametrize("level", [-1e-3, -0.1, -1.0, None])
@pytest.mark.parametrize("lengths", [[9000], [5000, 1, 0, 3999]])
def test_gated_delta_rule_in_pieces(lengths, level):
    """Long enough for pieces, few enough heads."""
    compare(lengths, 0.02, heads=2, group=2, width=128, value_width=128, dtype=torch.bfloat16, level=level, backend="fla")


@QLA
def test_no_piece_forgets_what_faded():
    """Every chunk fades the state by e^-10.2 and half of them write nothing, so that all there is after these is what FlashQLA, left to itself,
    forgets at the end of a piece: relative to themselves those outputs are as exact as the others."""
    from flash_qla import chunk_gated_delta_rule

    tokens, heads = 32768, 16
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 128, generator=g, device="cuda") for _ in range(3))
    q, k, v = q.bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16()
    decay, beta = torch.full((tokens, heads), -0.16, device="cuda"), torch.rand(tokens, heads, generator=g, device="cuda")
    beta.unflatten(0, (-1, 4, 64))[:, 2:] = 0
    wide = [x.double() for x in (q, k, v, decay, beta)]
    expected = linear_recurrence(*wide, cu([tokens]), scale=0.1, backend="chunked").output

    def worst(output):
        """Of the chunks'"""
        error = (output.double() - expected).unflatten(0, (-1, 64)).flatten(1).norm(dim=1)
        return float((error / expected.unflatten(0, (-1, 64)).flatten(1).norm(dim=1)).max())

    whole = linear_recurrence(q, k, v, decay, beta, cu([tokens]), scale=0.1, backend="fla").output
    assert worst(whole) < 0.02
    cut = chunk_gated_delta_rule(*(x.unsqueeze(0) for x in (q, k, v, decay, beta)), scale=0.1)[0][0]
    assert worst(cut) > 0.5, "FlashQLA forgets nothing by itself any more: then it may be called as it is"


@EACH
def test_the_longest_stream_that_is_taken(kind):
    """The end of a stream of nearly 2^31 numbers against its own last part, carried in by the state."""
    tokens, tail, heads = 2**31 // (16 * 256) - 64, 1000, 16
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 128, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    row = -torch.rand(heads, generator=g, device="cuda")
    decay = None if kind == DELTA else row.expand(tokens, -1) if kind == CONSTANT else -torch.rand(tokens, heads, generator=g, device="cuda")
    beta = None if kind == CONSTANT else torch.rand(tokens, heads, generator=g, device="cuda")
    x, at = (q, k, v, decay, beta), tokens - tail
    by = {"scale": 0.1, "backend": "fla"}
    with torch.no_grad():
        first, last = ([None if t is None else t[rows] for t in x] for rows in (slice(0, at), slice(at, tokens)))
        before = linear_recurrence(*first, cu([at]), return_final_state=True, **by).final_state
        expected = linear_recurrence(*last, cu([tail]), initial_state=before, **by).output
        got = linear_recurrence(*x, cu([tokens]), **by).output[at:]
    assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


@FLA
@pytest.mark.parametrize("kind", [DELTA, CONSTANT], ids=str)
def test_a_layer_is_carried_by_the_package_on_the_gpu(kind, monkeypatch):
    """`auto`, with gradients, where a table has it."""
    seen, run = [], fla.linear_recurrence
    monkeypatch.setattr(fla, "FASTER", {torch.cuda.get_device_capability(): {DELTA: 32768, CONSTANT: 32768}})
    monkeypatch.setattr(fla, "linear_recurrence", lambda *args: seen.append(args) or run(*args))
    on_gpu = {name: x.cuda() for name, x in vars(layer(kind)).items() if isinstance(x, torch.Tensor)}
    recurrence = layer(kind).given(on_gpu)
    if kind == CONSTANT:
        recurrence = recurrence.given({"decay": recurrence.constant.float().expand(recurrence.tokens, -1)})
    q = recurrence.q.requires_grad_()
    recurrence.run(recurrence.alone)[0].sum().backward()
    assert q.grad is not None and len(seen) == 1
