"""The pool tells which rank failed or hangs, and works again afterwards."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import Pool, RankError


def total(x: int) -> int:
    value = torch.tensor(x + dist.get_rank())
    dist.all_reduce(value)
    return int(value)


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("out of luck")
    dist.barrier()


def hang_on_one() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_ranks_answer_fail_hang_and_recover(pool: Any) -> None:
    assert pool(2) is pool(2)
    ranks = Pool(2)
    try:
        assert ranks.run(total, 3) == [7, 7]
        with pytest.raises(RankError, match=r"rank 1 of 2: [^$]*out of luck"):
            ranks.run(fail_on_one)
        with pytest.raises(RankError, match=r"rank\(s\) \[0\] of 2 after 5 s[^$]*hang_on_one"):
            ranks.run(hang_on_one, timeout=5)  # a restart is not counted
        assert ranks.run(total, 1) == [3, 3]
    finally:
        ranks.close()
