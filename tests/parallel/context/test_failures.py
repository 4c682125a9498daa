"""A context rank that stalls or dies in the middle of an exchange: the others say which one and where, and do not hang."""

import datetime
import os
import re
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ltrain.model.sequence import Sequence
from tests.parallel import pool as pools
from tests.parallel.context.streams import SHARED, Case, compute, divided
from tests.parallel.context.test_context_exchange import MIXERS
from tests.parallel.pool import Pool, RankError

TIMEOUT = 2.0  # seconds
SILENT = 1  # the rank


def attend(how: str) -> None:
    """On a rank of a pool: two rounds of a ring, and in the second one is missing."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    exchange = ContextExchange(ContextLayout(8 * size, rank, size, "contiguous"), group, group)
    whole = Sequence.of([8 * size])
    q, k, v = (torch.ones(8, 2, 4) for _ in range(3))
    for round_ in range(2):
        if round_ and rank == SILENT:
            if how.startswith("stalls"):
                time.sleep(3 * TIMEOUT)
                return
            os._exit(1)
        if round_ and how.startswith("is gone"):  # before the others post
            time.sleep(1)
        seq = exchange.sequence(whole.cu_seqlens, whole.positions)
        collective, rows = how.split(" ")[-1] if round_ else "", q.flatten(1)
        if collective == "last":
            exchange.last(rows, seq, 1)
        elif collective == "hidden":
            exchange.last_hidden(rows, seq)
        elif collective == "sum":
            exchange.sum(rows)
        elif collective == "gather":
            exchange.decode_attention(q, k[:, None], v[:, None], torch.zeros(8, 1, dtype=torch.int64), scale=1.0)
        exchange.attention(q, k, v, seq, scale=1.0)


KINDS = {"last": "last exchange, summing over", "hidden": "last hidden exchange, summing over", "sum": "sum exchange, summing over"}
KINDS["gather"] = "decode exchange, gathering from"


@pytest.mark.parametrize(
    "how", ["stalls", "dies", "is gone", *(f"{how} {kind}" for kind in KINDS for how in ("is gone from", "dies in")), "stalls in sum"]
)
def test_the_others_name_the_rank_and_the_exchange(how: str) -> None:
    pool = Pool(3)  # its groups are of no use afterwards
    try:
        started = time.monotonic()
        with pytest.raises(RankError) as error:
            pool.run(attend, how, timeout=60.0)
        # rank 2 reads keys of rank 1, which reads keys of rank 0
        ring = rf"ExchangeError: ring exchange, (sending to|receiving from) rank {SILENT} \(context rank {SILENT}\): "
        kind = KINDS.get(how.split(" ")[-1])
        expected = f"ExchangeError: {kind} ranks 0, 1, 2: " if kind else ring
        assert re.search(expected, str(error.value)), str(error.value)
        assert time.monotonic() - started < 40
    finally:
        pool.close()


# Every exchange of messages between two ranks, as (case, ranks that divide heads, ranks of a node, what an error calls it)
EXCHANGES = {
    "ring": ("attention", 1, 1, "ring"),
    "latents": ("latent", 1, 1, "ring"),
    "inside a node": ("attention", 1, 2, "ring"),
    "across nodes": ("attention", 1, 2, "ring across nodes"),
    "heads": ("attention", 2, 1, "ulysses"),
    "halo": ("short convolution", 1, 1, "halo"),
    "gather": ("gather", 1, 1, "gather"),
    "scan": ("delta and decay near 1", 1, 1, "scan"),
}


def silent(names: list[str], backward: bool) -> dict[str, tuple[str, float]]:
    """On a rank of a pool of 4: of each exchange the error that this rank saw where one of them stalls, and the seconds until then."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.context.messages import ExchangeError

    rank, size, found = dist.get_rank(), dist.get_world_size(), {}
    made, wait = dist.new_subgroups_by_enumeration, datetime.timedelta(seconds=TIMEOUT / 2)

    def quick(groups: list[list[int]]) -> Any:
        return made(groups, timeout=wait)

    for name in names:
        mixer, members, inside, _ = EXCHANGES[name]
        case = Case(lengths=(12 * size,), **MIXERS[mixer])
        group, ranks = dist.new_group(timeout=wait), list(range(size))
        with patch.object(dist, "new_subgroups_by_enumeration", quick):
            ulysses, nodes = divided([ranks], members), divided([ranks], inside)
        layout = ContextLayout(case.tokens, rank, size, "contiguous")
        exchange = ContextExchange(layout, group, group, ulysses=ulysses, nodes=nodes)
        inputs = {key: x if key in SHARED else layout.take(x) for key, x in case.inputs().items()}
        started = time.monotonic()

        def stall(rank: int = rank) -> None:
            if rank == SILENT:
                raise InterruptedError

        try:
            if not backward:
                stall()
            compute(case, inputs, exchange.sequence(case.cu_seqlens, case.positions), stall)
        except InterruptedError:
            pass
        except ExchangeError as error:
            found[name] = str(error), time.monotonic() - started
        dist.barrier()
    return found


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_exchange_names_the_rank_that_stalls(backward: bool) -> None:
    pool = Pool(4)
    try:
        results = pool.run(silent, list(EXCHANGES), backward, timeout=120.0)
    finally:
        pool.close()
    for name, (_, _, _, kind) in EXCHANGES.items():
        errors = [result[name] for result in results if name in result]
        named = [text for text, _ in errors if re.search(rf"^{kind} exchange, .* rank {SILENT} \(", text)]
        assert named, (name, errors)
        assert all(seconds < 3 * TIMEOUT for _, seconds in errors), (name, errors)


# (exchange, ranks): each among ranks of its own, so that one pool is lost and not one for each death
DEATHS = [("halo", 2), ("gather", 2), ("scan", 2), ("heads", 2), ("across nodes", 4)]
LINES = [list(range(sum(n for _, n in DEATHS[:i]), sum(n for _, n in DEATHS[: i + 1]))) for i in range(len(DEATHS))]


def die(backward: bool) -> None:
    """On a rank of a pool: its line's exchange, in which the first of the line dies or, backward, the last: others wait for its messages."""
    import torch.distributed as dist

    from ltrain.parallel.context.exchange import ContextExchange
    from ltrain.parallel.context.layout import ContextLayout
    from ltrain.parallel.context.messages import Messages

    group, _ = dist.new_subgroups_by_enumeration(LINES)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found: dict[str, dict[str, Any]] = {name: {} for name, _ in DEATHS}
    for (name, _), line in zip(DEATHS, LINES, strict=True):
        _, members, inside, _ = EXCHANGES[name]
        found[name] = {"ulysses": divided([line], members), "nodes": divided([line], inside)}  # collective over all ranks of the pool
    name = next(name for (name, _), line in zip(DEATHS, LINES, strict=True) if dist.get_rank() in line)
    mixer, _, _, kind = EXCHANGES[name]
    case = Case(lengths=(12 * size,), **MIXERS[mixer])
    layout = ContextLayout(case.tokens, rank, size, "contiguous")
    exchange = ContextExchange(layout, group, group, **found[name])
    inputs = {key: x if key in SHARED else layout.take(x) for key, x in case.inputs().items()}
    post, dying = Messages.post, not backward

    def posted(self: Messages, what: str, *args: Any, **kwargs: Any) -> Any:
        if dying and what == kind and rank == (size - 1 if backward else 0):
            time.sleep(0.3)  # the others are in the exchange
            os._exit(1)
        return post(self, what, *args, **kwargs)

    def turn() -> None:
        nonlocal dying
        dying = True

    dist.barrier()
    with patch.object(Messages, "post", posted):
        compute(case, inputs, exchange.sequence(case.cu_seqlens, case.positions), turn)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_exchange_names_the_rank_that_dies(backward: bool) -> None:
    pool = Pool(sum(n for _, n in DEATHS))
    try:
        with patch.object(pools, "GRACE", 5 * TIMEOUT), pytest.raises(RankError) as error:  # which is as long as the others may take
            pool.run(die, backward)
    finally:
        pool.close()
    texts = re.split(r"^rank (\d+) of \d+: ", str(error.value), flags=re.MULTILINE)[1:]
    seen = {int(rank): text.rstrip().splitlines()[-1] for rank, text in zip(texts[::2], texts[1::2], strict=True)}
    assert seen.keys() == set(range(pool.size)), seen  # all have answered
    for (name, _), line in zip(DEATHS, LINES, strict=True):
        dead, kind = line[-1 if backward else 0], EXCHANGES[name][3]
        place = "member" if name == "heads" else "node" if name == "across nodes" else "context rank"
        assert seen[dead] == "its process ended"
        others = [seen[rank] for rank in line if rank != dead]
        assert all("ExchangeError: " in text for text in others), (name, others)
        named = rf"ExchangeError: {kind} exchange, (sending to|receiving from) rank {dead} \({place} \d+\): "
        assert [text for text in others if re.search(named, text)], (name, others)
