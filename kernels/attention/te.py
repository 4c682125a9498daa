"""Attention of packed pairs by cuDNN's fused kernels, through Transformer Engine: many pairs of any lengths in one call, windows and heads whose
values are narrower than their keys among them. What it does not take goes to our own kernels.

A call has pairs of one kind whose rows are all different; a ring's pieces, which may share queries or keys, take several, whose parts are merged.
Its backward takes the log-sum-exp over all keys, which is what lets a ring hand it one piece at a time. Source: transformer_engine's fused_attn.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.attention import blockwise, by_pair, flash
from ltrain.kernels.attention.merging import merge_into
from ltrain.kernels.attention.pairs import PLAIN, Pair
from ltrain.kernels.libraries import load_cudnn
from ltrain.kernels.segments import accumulator, wants_triton

# Rows of the pairs on average, from which it is worth its while. Forwards and backwards on one H200, 16/4 heads x 128, it takes 0.92 of
# the time of our own kernels in documents of 512 tokens, 0.76 in those of 4096 and 0.72 to 0.78 with a window of 4096.
LEAST = 512
# Where values are narrower than keys, the backward without a mask is slow: on one H200 with 16 heads of 192 and 128 it takes 103 ms for 2^30 scores,
# with a window that hides none of them 75, and for as many in causal squares 64, which for few rows is less than adding them up costs.
FAR = 1 << 22  # of that window
SPLIT = 16384  # rows and keys of a pair from which its backward is worth two causal squares
# A call of one pair whose rows and keys this divides goes as a batch of one sequence: on one H200 the backward then takes 0.89 to 0.95 of the time of
# the packed kernels. There is a plan for each length, and so only for few of them.
ALONE = 4096
UTILS = "transformer_engine.pytorch.attention.dot_product_attention.utils"
OLDEST = 90600  # version of cuDNN: before, and on GPUs of capability 12.0, the log-sum-exps of packed documents are laid out otherwise


@cache
def engine() -> Any:
    """Transformer Engine's module, or why there is none."""
    if find_spec("transformer_engine") is None:
        return "needs Transformer Engine, which is not installed"
    load_cudnn()
    try:
        import_module("transformer_engine.pytorch")  # which finds the libraries that the next ones load
        if not hasattr(import_module(UTILS), "FusedAttentionParams"):
            return "needs Transformer Engine 2.20 or newer"
        return import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    except (ImportError, OSError, AssertionError, RuntimeError) as error:
        return f"needs Transformer Engine, which does not load ({str(error).partition('.')[0]})"


@cache
def _cudnn() -> int:
    """Version of the cuDNN that Transformer Engine has loaded, which need not be torch's."""
    return int(import_module("transformer_engine_torch").get_cudnn_version())


class Kind(NamedTuple):
    """Of the pairs of a call"""

    causal: bool
    window: int

    @property
    def reach(self) -> tuple[int, int]:
        """How many keys behind and ahead of itself a query sees, -1: all."""
        return self.window - 1 if self.window else -1, 0 if self.causal else -1


class Form(NamedTuple):
    """How a call is laid out"""

    alone: bool  # a batch of one sequence, or packed ones
    reach: tuple[int, int]
    causal: bool

    @property
    def mask(self) -> str:
        return ("causal" if self.causal else "no_mask") if self.alone else "padding_causal" if self.causal else "padding"

    @property
    def format(self) -> str:
        return "bshd" if self.alone else "thd"

    @property
    def layout(self) -> str:
        return "_".join([self.format] * 3)


def _queries(pairs: Sequence[Pair]) -> slice:
    """The rows that theirs lie in."""
    return slice(min(p.q_start for p in pairs), max(p.q_start + p.q_len for p in pairs))


def _keys(pairs: Sequence[Pair]) -> slice:
    return slice(min(p.k_start for p in pairs), max(p.k_start + p.k_len for p in pairs))


class Call(NamedTuple):
    kind: Kind
    pairs: tuple[Pair, ...]  # no row of queries or of keys is in two

    @property
    def queries(self) -> slice:
        return _queries(self.pairs)

    @property
    def keys(self) -> slice:
        return _keys(self.pairs)

    def form(self, back: bool, q: Tensor, k: Tensor, v: Tensor) -> Form:
        """back: in the backward"""
        alone = len(self.pairs) == 1 and self.pairs[0].q_len % ALONE == self.pairs[0].k_len % ALONE == 0
        forms = [Form(False, self.kind.reach, self.kind.causal)]
        if alone:
            forms.insert(0, forms[0]._replace(alone=True))
        if back and self.kind == Kind(False, 0) and _narrow(q, v) and all(max(p.q_len, p.k_len) <= FAR for p in self.pairs):
            forms.insert(0, Form(False, (FAR, FAR), False))
        return next((form for form in forms[:-1] if _lacks(form, *_sizes(q, k, v)) is None), forms[-1])

    def covers(self, queries: int, keys: int) -> bool:
        """Whether it has each of so many queries and of so many keys."""
        return sum(p.q_len for p in self.pairs) >= queries and sum(p.k_len for p in self.pairs) >= keys


class Places(NamedTuple):
    """Where the pairs of a call lie, on the device: [pairs + 1] int32 each, and what queries between them are covered, None: all."""

    q_bounds: Tensor
    k_bounds: Tensor
    q_starts: Tensor
    k_starts: Tensor
    longest: tuple[int, int]
    covered: Tensor | None


def _kind(pair: Pair) -> Kind | None:
    """None: there is no kernel, which for causal masks and windows takes squares on the diagonal. (One for the ends of rectangles works through
    hidden blocks, too: in the backward twice as long.)"""
    square = pair.causal and pair.q_len == pair.k_len and not (pair.window and pair.gap)
    return Kind(pair.causal, pair.window) if square or not pair.causal and not pair.window else None


@lru_cache(maxsize=256)  # all layers of a micro-batch with the same mask have the same
def _parted(pairs: tuple[Pair, ...]) -> tuple[list[Call], list[Pair]]:
    """Calls, that of most queries first, and the pairs that are for others."""
    calls: list[tuple[Kind, list[Pair]]] = []
    rest: list[Pair] = []
    plain, windows = [pair for pair in pairs if not pair.window], [pair for pair in pairs if pair.window]
    widest = max((kind.window for pair in windows if (kind := _kind(pair)) is not None), default=0)
    for pair in sorted([*by_pair.squares(plain), *windows]):
        if pair.causal and not pair.window and pair.q_len <= widest:
            pair = pair._replace(window=widest, gap=0)  # hides nothing of it: it goes in one call with the documents of which it does
        kind = _kind(pair)
        if kind is None:
            rest.append(pair)
            continue
        for of, some in calls:
            last = some[-1]  # sorted by the first query; keys of a call rise, too
            if of == kind and last.q_start + last.q_len <= pair.q_start and last.k_start + last.k_len <= pair.k_start:
                some.append(pair)
                break
        else:
            calls.append((kind, [pair]))
    found = [Call(kind, tuple(some)) for kind, some in calls]
    return sorted(found, key=lambda call: -sum(pair.q_len for pair in call.pairs)), rest


@lru_cache(maxsize=256)
def turned(pairs: tuple[Pair, ...]) -> tuple[list[Pair], list[Pair]]:
    """Pairs, where of a window over keys before all of its queries only what has no mask is left; and its corner: squares that are causal for rows
    that are counted from the last to the first, in numbers of the same rows."""
    kept: list[Pair] = []
    corners: list[Pair] = []
    for pair in pairs:
        if pair.causal or not pair.window or pair.gap < pair.q_len - 1:
            kept.append(pair)
            continue
        # counted from the last, query i sees the keys 0 .. i + more
        more = pair.window - 1 - pair.gap
        every = max(min(more, pair.k_len), 0)
        side = min(pair.q_len, pair.k_len - every)
        end, first = pair.k_start + pair.k_len - every, pair.q_start + pair.q_len - side
        if every:
            kept.append(Pair(pair.q_start, pair.q_len, end, every, False))
        if side:
            corners.append(Pair(first, side, end - side, side, True))
            if first > pair.q_start:
                kept.append(Pair(pair.q_start, first - pair.q_start, pair.k_start, end - pair.k_start, False))
    return kept, corners


@lru_cache(maxsize=256)
def triangles(pairs: tuple[Pair, ...]) -> tuple[list[Pair], list[Pair]]:
    """Pairs, where of those without a mask, in squares, only what lies on and below the diagonal is left; and what lies above it: squares that
    are causal for rows that are counted from the last to the first, in numbers of the same rows."""
    below: list[Pair] = []
    above: list[Pair] = []
    todo = list(by_pair.squares(list(pairs)))
    while todo:
        pair = todo.pop()
        side = min(pair.q_len, pair.k_len)
        if pair.causal or pair.window or side < SPLIT:
            below.append(pair)
            continue
        below.append(Pair(pair.q_start, side, pair.k_start, side, True))
        above.append(Pair(pair.q_start, side - 1, pair.k_start + 1, side - 1, True))
        if pair.q_len > side:
            todo.append(pair._replace(q_start=pair.q_start + side, q_len=pair.q_len - side))
        elif pair.k_len > side:
            todo.append(pair._replace(k_start=pair.k_start + side, k_len=pair.k_len - side))
    return below, above


@lru_cache(maxsize=256)
def _places(call: Call, device: torch.device) -> Places:
    q_bounds, k_bounds = [0], [0]
    for pair in call.pairs:
        q_bounds.append(q_bounds[-1] + pair.q_len)
        k_bounds.append(k_bounds[-1] + pair.k_len)
    queries, keys = call.queries, call.keys
    q_starts = [*(p.q_start - queries.start for p in call.pairs), queries.stop - queries.start]
    k_starts = [*(p.k_start - keys.start for p in call.pairs), keys.stop - keys.start]
    numbers = torch.tensor([q_bounds, k_bounds, q_starts, k_starts], dtype=torch.int32).to(device, non_blocking=True)
    covered = None
    if q_bounds[-1] < queries.stop - queries.start:
        seen = torch.zeros(queries.stop - queries.start, dtype=torch.bool)
        for pair in call.pairs:
            seen[pair.q_start - queries.start :][: pair.q_len] = True
        covered = seen.to(device, non_blocking=True)
    longest = max(p.q_len for p in call.pairs), max(p.k_len for p in call.pairs)
    return Places(numbers[0], numbers[1], numbers[2], numbers[3], longest, covered)


def _narrow(q: Tensor, v: Tensor) -> bool:
    return q.shape[2] > v.shape[2]


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.dtype, int, int, int, int, torch.device]:
    return q.dtype, q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.device


@cache
def _lacks(form: Form, dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int, device: torch.device) -> str | None:
    """Why Transformer Engine has no kernel for these, or None."""
    module = engine()
    fields = import_module(UTILS).FusedAttentionParams
    te_type = next(number for number, torch_type in module.TORCH_DType.items() if torch_type == dtype)
    tokens = 4096
    rows, layout = module.QKVFormat[form.format], module.QKVLayout[form.layout]
    asked = fields(
        attn_mask_type=module.AttnMaskType[form.mask],
        window_size_left=form.reach[0],
        window_size_right=form.reach[1],
        bottom_right_diagonal=False,
        qkv_dtype=te_type,
        o_dtype=te_type,
        do_dtype=te_type,
        dqkv_dtype=te_type,
        qkv_layout=layout,
        o_format=rows,
        do_format=rows,
        dqkv_layout=layout,
        batch_size=1 if form.alone else 2,
        num_attn_heads=heads,
        num_gqa_groups=kv_heads,
        head_dim_qk=width,
        head_dim_v=value_width,
        max_seqlen_q=tokens if form.alone else tokens // 2,
        max_seqlen_kv=tokens if form.alone else tokens // 2,
        num_tokens_q=tokens,
        num_tokens_kv=tokens,
    )
    found, why = module.tex.get_fused_attn_backend(asked)
    if int(found) == int(module.FusedAttnBackend.F16_arbitrary_seqlen):
        return None
    return f"has no kernel for {heads} heads of {width} and {kv_heads} of {value_width} ({str(why).strip().rstrip('.') or 'no reason given'})"


def cudnn_refusal(q: Tensor) -> str | None:
    """Why cuDNN's kernels take no such queries, whoever calls them, or None."""
    if q.device.type != "cuda":
        return f"runs on CUDA, not on {q.device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "is for GPUs from Hopper on"
    return None if q.dtype in (torch.float16, torch.bfloat16) else f"takes float16 or bfloat16, not {q.dtype}"


def refusal(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair]) -> str | None:
    """Why these cannot go through Transformer Engine, or None."""
    if why := cudnn_refusal(q):
        return why
    if isinstance(lacking := engine(), str):
        return lacking
    if torch.cuda.get_device_capability(q.device)[0] == 12 or _cudnn() < OLDEST:
        return "is for GPUs of another capability than 12.0, with cuDNN 9.6 or newer"
    kept, corners = turned(tuple(pairs))
    kinds = {call.kind for some in (kept, corners) for call in _parted(tuple(some))[0]}
    if not kinds:
        return "takes windows on the diagonal and at cuts, and there are only others"
    reasons = (_lacks(Form(False, kind.reach, kind.causal), *_sizes(q, k, v)) for kind in kinds)
    return next((why for why in reasons if why is not None), None)


def worthwhile(pairs: list[Pair]) -> bool:
    """Whether the pairs are long, and most of the scores in those that there is a kernel for."""

    def scores(pair: Pair) -> float:
        keys = min(pair.window or pair.k_len, pair.k_len)
        return pair.q_len * keys / (2 if pair.causal and keys == pair.k_len else 1)

    kept, corners = turned(tuple(pairs))
    calls, rest = _parted(tuple(kept))
    taken = [pair for call in calls for pair in call.pairs] + corners
    return sum(pair.q_len for pair in taken) >= LEAST * len(taken) and sum(map(scores, taken)) > sum(map(scores, rest))


@cache
def _generator(device: torch.device) -> torch.Generator:
    """Its kernels draw numbers for a dropout even where there is none: not from torch's own, whose later ones would change."""
    return torch.Generator(device)


def _options(form: Form, places: Places, q: Tensor, scale: float) -> dict[str, Any]:
    padded = {} if form.alone else {"cu_seqlens_q_padded": places.q_starts, "cu_seqlens_kv_padded": places.k_starts}
    return padded | {
        "fused_attention_backend": engine().FusedAttnBackend.F16_arbitrary_seqlen,
        "max_seqlen_q": places.longest[0],
        "max_seqlen_kv": places.longest[1],
        "cu_seqlens_q": places.q_bounds,
        "cu_seqlens_kv": places.k_bounds,
        "fake_dtype": q.dtype,
        "attn_scale": scale,
        "qkv_layout": form.layout,
        "o_format": form.format,
        "attn_mask_type": form.mask,
        "window_size": form.reach,
    }


def for_others(q: Tensor, k: Tensor, v: Tensor, scale: float, pairs: list[Pair]) -> Any:
    """The backend for the pairs that are not for cuDNN."""
    if wants_triton("auto", q):
        from ltrain.kernels.attention import triton_attention

        if triton_attention.refusal(q, k, v, scale, PLAIN) is None:
            return triton_attention
    return flash if flash.refusal(q, k, v, pairs) is None else blockwise


def _span(pairs: list[Pair]) -> tuple[slice, slice, list[Pair]]:
    """The queries and the keys that they lie in, and them in rows of these."""
    queries, keys = _queries(pairs), _keys(pairs)
    return queries, keys, [pair.moved(-queries.start, -keys.start) for pair in pairs]


@lru_cache(maxsize=256)
def _turned_calls(pairs: tuple[Pair, ...]) -> tuple[slice, slice, list[Call]]:
    """The queries and the keys that causal squares lie in, and the calls for these rows when they are counted from the last to the first."""
    rows, keys, moved = _span(list(pairs))
    queries, others = rows.stop - rows.start, keys.stop - keys.start
    placed = [p._replace(q_start=queries - p.q_start - p.q_len, k_start=others - p.k_start - p.k_len) for p in moved]
    return rows, keys, _parted(tuple(placed))[0]


def _count(corners: list[Pair]) -> int:
    """Calls that they take."""
    return len(_turned_calls(tuple(corners))[2]) if corners else 0


def _first(calls: list[Call], rest: list[Pair], corners: list[Pair]) -> Call | None:
    """The one whose part comes first, None: pairs for others are. Where it has all rows, the other parts are merged with it or added to it."""
    if calls:
        return calls[0]
    return None if rest or not corners else _turned_calls(tuple(corners))[2][0]


def _parts(q: Tensor, k: Tensor, v: Tensor, calls: list[Call], rest: list[Pair], scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each call its queries, what it finds for these [rows, H, Dv], and the log-sum-exps [rows, H]."""
    for call in calls:
        places, rows, keys, form = _places(call, q.device), call.queries, call.keys, call.form(False, q, k, v)
        given = (x.unsqueeze(0) if form.alone else x for x in (q[rows], k[keys], v[keys]))
        part, (part_lse, *_) = engine().fused_attn_fwd(
            is_training=True, **dict(zip("qkv", given, strict=True)), rng_gen=_generator(q.device), **_options(form, places, q, scale)
        )
        if form.alone:
            part, part_lse = part[0], part_lse[0].transpose(0, 1).contiguous()
        assert part_lse.shape == (*part.shape[:2], 1), "Transformer Engine lays its log-sum-exps out in another way"
        part_lse = part_lse.squeeze(-1)
        if places.covered is not None:
            part_lse = part_lse.masked_fill(~places.covered.unsqueeze(1), -torch.inf)
        yield rows, part, part_lse
    if rest:
        rows, keys, moved = _span(rest)
        yield rows, *for_others(q, k, v, scale, rest).forward_pairs(q[rows], k[keys], v[keys], moved, scale)


def _turned(rows: slice, inside: slice) -> slice:
    """Where these rows, counted from the last of `rows` on, lie."""
    return slice(rows.stop - inside.stop, rows.stop - inside.start)


def _turned_parts(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As `_parts`, of causal squares of queries and keys that are counted from the last to the first."""
    rows, keys, calls = _turned_calls(tuple(pairs))
    for inside, *found in _parts(q[rows].flip(0), k[keys].flip(0), v[keys].flip(0), calls, [], scale):
        part, part_lse = (x.flip(0) for x in found)
        yield _turned(rows, inside), part, part_lse


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    """out may come back in q's type, where one call is all there is."""
    kept, corners = turned(tuple(pairs))
    calls, rest = _parted(tuple(kept))
    q, k, v = (x.contiguous() for x in (q, k, v))
    parts = chain(_parts(q, k, v, calls, rest, scale), _turned_parts(q, k, v, corners, scale) if corners else ())
    count, wide = len(calls) + bool(rest) + _count(corners), accumulator(q.dtype)
    first = _first(calls, rest, corners)
    if first is not None and first.covers(len(q), 0):
        _, out, lse = next(parts)
        out = out.to(wide) if count > 1 else out
    else:
        out = torch.zeros(*q.shape[:2], v.shape[2], dtype=wide, device=q.device)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    for rows, part, part_lse in parts:
        merge_into(out[rows], lse[rows], part, part_lse)
    return out, lse


def _gradients(
    inputs: tuple[Tensor, ...], lse: Tensor, calls: list[Call], rest: list[Pair], scale: float
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor, Tensor]]]:
    """inputs: dout, q, k, v and out. Of each call its queries and keys, and what it adds to dq, dk and dv there."""
    dout, q, k, v, out = inputs
    state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of the generator, for a dropout that there is not
    for call in calls:
        rows, keys, form = call.queries, call.keys, call.form(True, q, k, v)
        given = {"q": q[rows], "k": k[keys], "v": v[keys], "o": out[rows], "d_o": dout[rows]}
        sums = lse[rows].unsqueeze(-1)
        if form.alone:
            given, sums = {name: x.unsqueeze(0) for name, x in given.items()}, sums.transpose(0, 1).contiguous().unsqueeze(0)
        dq, dk, dv, *_ = engine().fused_attn_bwd(
            **given,
            aux_ctx_tensors=[sums, state],
            do_format=form.format,
            dqkv_layout=form.layout,
            **_options(form, _places(call, q.device), q, scale),
        )
        yield rows, keys, (dq[0], dk[0], dv[0]) if form.alone else (dq, dk, dv)
    if rest:
        rows, keys, moved = _span(rest)
        backend = for_others(q, k, v, scale, rest)
        yield rows, keys, backend.backward_pairs(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], moved, scale)


def _turned_gradients(inputs: tuple[Tensor, ...], lse: Tensor, pairs: list[Pair], scale: float) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """As `_gradients`, of causal squares of queries and keys that are counted from the last to the first."""
    dout, q, k, v, out = inputs
    rows, keys, calls = _turned_calls(tuple(pairs))
    flipped = tuple(x[of].flip(0) for x, of in ((dout, rows), (q, rows), (k, keys), (v, keys), (out, rows)))
    for some, of, parts in _gradients(flipped, lse[rows].flip(0), calls, [], scale):
        yield _turned(rows, some), _turned(keys, of), tuple(part.flip(0) for part in parts)


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse: over all keys. -> dq, dk, dv in float32 or wider, or in q's type, where one call is all there is."""
    kept, corners = turned(tuple(pairs))
    squares = _narrow(q, v) and _lacks(Form(False, Kind(True, 0).reach, True), *_sizes(q, k, v)) is None
    below, above = triangles(tuple(kept)) if squares else (kept, [])
    above = above + corners
    calls, rest = _parted(tuple(below))
    inputs = tuple(x.to(q.dtype).contiguous() for x in (dout, q, k, v, out))
    lse = lse.float().contiguous()
    parts = chain(_gradients(inputs, lse, calls, rest, scale), _turned_gradients(inputs, lse, above, scale) if above else ())
    count, wide = len(calls) + bool(rest) + _count(above), accumulator(q.dtype)
    first = _first(calls, rest, above)
    whole = (False, False) if first is None else (first.covers(len(q), 0), first.covers(0, len(k)))
    sums: list[Tensor] = []
    for rows, keys, part in parts:
        places = rows, keys, keys
        if sums:
            for total, of, found in zip(sums, places, part, strict=True):
                total[of] += found
            continue
        for x, of, found, all_of_it in zip((q, k, v), places, part, (*whole, whole[1]), strict=True):
            if all_of_it:
                sums.append(found.to(wide) if count > 1 else found)
            else:
                sums.append(torch.zeros(x.shape, dtype=wide, device=x.device))
                sums[-1][of] += found
    dq, dk, dv = sums or [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    return dq, dk, dv
