from collections.abc import Iterator

import pytest

from tests.parallel.pool import Pools


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pools]:
    """Pools of ranks with a GPU each."""
    pools = Pools("cuda")
    yield pools
    pools.close()
