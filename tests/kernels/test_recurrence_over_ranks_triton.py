"""Linear recurrences' Triton programs over context ranks that are threads of one process: what each rank runs, in which order, and what it gives."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels import linear_recurrence as family
from ltrain.kernels.linear_recurrence.triton_launches import Chunks
from ltrain.kernels.recurrence import Linear
from ltrain.model.sequence import Tape
from ltrain.parallel.context import scan as scans
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.messages import Messages, Transit
from tests.kernels.interpreter import INTERPRETED
from tests.parallel.context.streams import SHARED, Case, streams, whole

if INTERPRETED:
    from ltrain.kernels.linear_recurrence import triton_launches, triton_parts

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="ranks are threads, and autograd's backward stays in its caller's for tensors of the CPU alone"
)


class Office:
    """Messages between threads of which one runs at a time: the others wait for theirs."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.box: dict[tuple[int, int], list[Tensor]] = {}
        self.failed = False


class Threaded(Messages):
    def __init__(self, office: Office, rank: int, log: list[str]):
        super().__init__(None, 1)
        self.office, self.rank, self.log = office, rank, log

    def post(self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, int], *, dtype: torch.dtype, device: torch.device) -> Transit:
        self.log.append("post")
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in sends.values())
        for peer, x in sends.items():
            assert x.dtype == dtype
            self.office.box.setdefault((self.rank, peer), []).append(x.clone())
        self.office.turn.notify_all()
        return Awaited(self, {peer: n for peer, n in receives.items() if n})


class Awaited(Transit):
    def __init__(self, messages: Threaded, expected: dict[int, int]):
        super().__init__([], [], {})
        self.messages, self.expected = messages, expected

    def wait(self) -> dict[int, Tensor]:
        office, rank = self.messages.office, self.messages.rank
        assert office.turn.wait_for(lambda: office.failed or all(office.box.get((peer, rank)) for peer in self.expected), timeout=60)
        assert not office.failed, "another rank failed"
        self.messages.log.append("wait")
        found = {peer: office.box[peer, rank].pop(0) for peer in self.expected}
        assert {peer: x.numel() for peer, x in found.items()} == self.expected
        return found


def on_threads(size: int, work: Callable[[int, Office], Any]) -> list[Any]:
    office, results = Office(), [None] * size

    def run(rank: int) -> None:
        with office.turn:
            try:
                results[rank] = work(rank, office)
            except BaseException as error:
                results[rank], office.failed = error, True
                office.turn.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted((x for x in results if isinstance(x, BaseException)), key=lambda x: "another rank" in str(x)):
        raise error
    return results


def counted(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """`log` of a thread: the parts that it ran, each with its chunks, and its posts and waits."""
    here = threading.local()

    def watch(module: Any, name: str) -> None:
        run = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            chunks = next(x for x in args if isinstance(x, Chunks))
            if chunks.block_count:
                here.log.append(f"{name} {chunks.block_count}")
            return run(*args, **options)

        monkeypatch.setattr(module, name, watched)

    of_delta_rule = "prepare", "pass_states", "pass_gradients", "score_gradients", "key_gradients"
    of_sums = "prepared", "add_chunks", "accumulate", "token_gradients", "head_pair_gradients"
    for name in (*of_delta_rule, *of_sums, "read"):
        watch(triton_parts, name)
    return here


def over_threads(
    case: Case, size: int, kind: str, here: threading.local, *, final: bool = False, recompute: bool = False
) -> tuple[dict[str, Tensor], list[str], list[Tensor | None]]:
    """Outputs and gradients in the order of the stream, what each rank ran, and final states of its segments; recompute: of the kernels."""
    inputs = case.inputs()

    def work(rank: int, office: Office) -> tuple[dict[str, Tensor], str, Tensor | None]:
        plan = ContextLayout(case.tokens, rank, size, kind).plan(case.cu_seqlens)
        here.log, tape = [], Tape()
        leaves = {name: (x.clone() if name in SHARED else plan.layout.take(x)).requires_grad_() for name, x in inputs.items() if name != "dout"}
        scan = scans.scan(plan)

        def forward() -> tuple[Tensor, Tensor | None]:
            rate = leaves.get("rate")
            decay, constant = (leaves.get("decay"), None) if rate is None else (rate.expand(len(leaves["q"]), -1), rate.detach())
            linear = Linear(leaves["q"], leaves["k"], leaves["v"], decay, leaves.get("beta"), 0.3, constant, recompute)
            if not scan.needed:
                return linear.run(plan.cu_seqlens, final=final)
            return scans.recurrence_over_ranks(linear, plan.cu_seqlens, scan, Threaded(office, rank, here.log), tape, final=final)

        if case.recompute:
            out, after = checkpoint(forward, use_reentrant=False, preserve_rng_state=False, context_fn=tape.contexts)
        else:
            out, after = forward()
        here.log.append("|")
        grads = torch.autograd.grad(out, list(leaves.values()), plan.layout.take(inputs["dout"]))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}, ", ".join(here.log).replace(", |, ", " | "), after

    found = on_threads(size, work)
    layout = ContextLayout(case.tokens, 0, size, kind).of(case.cu_seqlens)
    order = torch.cat([torch.arange(a, b) for rank in range(size) for a, b in layout.spans(rank)])
    values = {
        name: sum(of[name] for of, *_ in found) if name in SHARED else torch.cat([of[name] for of, *_ in found])[order.argsort()]
        for name in found[0][0]
    }
    return values, [log for _, log, _ in found], [after for *_, after in found]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    monkeypatch.setattr(family, "wants_triton", lambda backend, x: backend in ("auto", "triton"))
    return counted(monkeypatch)


def check(case: Case, values: dict[str, Tensor]) -> None:
    for name, x in whole(case, torch.float64).items():
        assert (values[name].double() - x).norm() <= 1e-5 * x.norm(), name


# What ranks run of one document, 2 chunks for each, by what they have of it. W, U and the like are made once forward and, here, once backward. A pass
# of states of chunks is made once where they begin the document, and else for M, for E and from the state that arrives; back, once where they end it.
GRADIENTS = "score_gradients 2, key_gradients 2"
BEGIN = f"prepare 2, pass_states 2, post, read 2, wait | post, prepare 2, pass_states 2, read 2, wait, pass_gradients 2, {GRADIENTS}"
MIDDLE = (
    "prepare 2, pass_states 2, pass_states 2, post, wait, pass_states 2, read 2"
    f" | prepare 2, read 2, pass_gradients 2, post, pass_states 2, wait, pass_gradients 2, {GRADIENTS}"
)
END = f"post, prepare 2, wait, pass_states 2, read 2 | prepare 2, read 2, pass_gradients 2, post, pass_states 2, wait, {GRADIENTS}"
BOTH = (  # a chunk at the document's begin and one at its end
    "prepare 1, pass_states 1, post, prepare 1, read 1, wait, pass_states 1, read 1"
    f" | prepare 1, read 1, pass_gradients 1, post, prepare 1, pass_states 1, pass_states 1, read 1, wait, pass_gradients 1, {GRADIENTS}"
)
RUN = {
    (2, "contiguous"): [BEGIN, END],
    (3, "contiguous"): [BEGIN, MIDDLE, END],
    (2, "zigzag"): [BOTH, MIDDLE],
    (3, "zigzag"): [BOTH, MIDDLE, MIDDLE],
}
# And where nothing is erased: what chunks add is found once forward and once each way backward; sums over it once more in the middle of a document.
# The gradients of queries, of which there is a pass unless decays are per channel, come before the answer: they take no gradients of states.
ADDED, QUERIES, REST = "prepared 2, add_chunks 2", "token_gradients 2, head_pair_gradients 2", "read 2, head_pair_gradients 2"
BEGIN_SUMS = f"{ADDED}, accumulate 2, post, read 2, wait | {ADDED}, post, add_chunks 2, accumulate 2, {QUERIES}, wait, accumulate 2, {REST}"
MIDDLE_SUMS = (
    f"{ADDED}, accumulate 2, post, wait, accumulate 2, read 2"
    f" | {ADDED}, accumulate 2, post, add_chunks 2, accumulate 2, {QUERIES}, wait, accumulate 2, {REST}"
)
END_SUMS = f"{ADDED}, post, wait, accumulate 2, read 2 | {ADDED}, accumulate 2, post, add_chunks 2, accumulate 2, {QUERIES}, wait, {REST}"


def kept(log: str) -> str:
    """The same where nothing is made again in the backward."""
    forward, backward = log.split(" | ")
    parts = backward.replace("post, add_chunks 2, accumulate 2", "post").split(", ")
    return f"{forward} | {', '.join(part for part in parts if part.split()[0] not in ('prepare', 'prepared', 'pass_states'))}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("size", "kind"), RUN)
def test_what_each_rank_runs(size: int, kind: str, recompute: bool, here: threading.local) -> None:
    case = Case("linear_recurrence", (128 * size,), dtype=torch.float32)
    values, ran, _ = over_threads(case, size, kind, here, recompute=recompute)
    assert ran == [log if recompute else kept(log) for log in RUN[size, kind]]
    check(case, values)


@pytest.mark.parametrize(("decay", "recompute"), [("none", False), ("constant", True), ("head", False), ("channel", False), ("channel", True)])
def test_what_each_rank_runs_where_nothing_is_erased(decay: str, recompute: bool, here: threading.local) -> None:
    case = Case("linear_recurrence", (384,), dtype=torch.float32, update="add", decay=decay)
    values, ran, _ = over_threads(case, 3, "contiguous", here, recompute=recompute)
    expected = [log if recompute else kept(log) for log in (BEGIN_SUMS, MIDDLE_SUMS, END_SUMS)]
    if decay == "channel":
        expected = [log.replace(", head_pair_gradients 2", "") for log in expected]
    assert [log.replace(", prepare 2", "") for log in ran] == expected  # a part of `prepared`, of channels
    check(case, values)


@pytest.mark.parametrize(
    ("update", "middle", "again"),  # where nothing is posted
    [("delta", MIDDLE, "prepare 2, pass_states 2, read 2"), ("add", MIDDLE_SUMS, f"{ADDED}, accumulate 2, read 2")],
)
def test_recomputed_blocks_make_no_map_again(update: str, middle: str, again: str, here: threading.local) -> None:
    case = Case("linear_recurrence", (384,), dtype=torch.float32, update=update, recompute=True)
    values, ran, _ = over_threads(case, 3, "contiguous", here)
    forward, backward = kept(middle).split(" | ")
    assert ran[1] == f"{forward} | {again}, {backward}"
    check(case, values)


@pytest.mark.parametrize(
    ("kind", "decay", "update"),
    [
        *(("contiguous", "none", "delta"), ("zigzag", "head", "delta"), ("zigzag", "channel", "delta"), ("balanced", "channel", "delta")),
        *(("balanced", "none", "add"), ("zigzag", "constant", "add"), ("contiguous", "head", "add"), ("zigzag", "channel", "add")),
    ],
)
def test_outputs_and_gradients_are_those_of_one_rank(
    kind: str, decay: str, update: str, here: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launches, "BLOCKS", 1)  # so that a short segment has several chunks
    for lengths in (*(streams(3)[name] for name in ("with empty documents", "over several chunks")), [70, 0, 129, 101]):
        case = Case("linear_recurrence", tuple(lengths), dtype=torch.float32, decay=decay, update=update)
        check(case, over_threads(case, 3, kind, here)[0])


@pytest.mark.parametrize(("update", "decay"), [("delta", "head"), ("add", "channel"), ("add", "constant")])
def test_as_many_spans_as_have_maps_composed_in_rounds(update: str, decay: str, here: threading.local) -> None:
    assert 2 * 6 - 2 > scans.LONGEST
    case = Case("linear_recurrence", (10, 220, 10), dtype=torch.float32, update=update, decay=decay)
    check(case, over_threads(case, 6, "zigzag", here)[0])


@pytest.mark.parametrize("update", ["delta", "add"])
def test_final_states_of_all_segments(update: str, here: threading.local) -> None:
    case = Case("linear_recurrence", (30, 0, 170, 1, 99), dtype=torch.float32, update=update)
    inputs = {name: x.double() for name, x in case.inputs().items()}
    _, _, after = over_threads(case, 3, "zigzag", here, final=True)
    for rank, states in enumerate(after):
        plan = ContextLayout(case.tokens, rank, 3, "zigzag").plan(case.cu_seqlens)
        assert states is not None and len(states) == len(plan.segments)
        for segment, state in zip(plan.segments, states, strict=True):
            names = "q", "k", "v", "decay", "beta"
            q, k, v, decay, beta = (inputs[name][segment.begin : segment.stop] if name in inputs else None for name in names)
            one = Linear(q, k, v, decay, beta, 0.3)
            expected = family.linear_recurrence(q, k, v, decay, beta, one.alone, scale=0.3, return_final_state=True, backend="chunked").final_state
            assert expected is not None
            assert (state.double() - expected[0]).norm() <= 1e-5 * expected[0].norm()
