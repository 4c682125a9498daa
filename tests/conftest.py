"""What tests of every part share."""

from collections.abc import Iterator

import pytest

from tests.parallel.pool import Pools


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """pool(4).run(function, *args): call it on four gloo ranks that live as long as the session."""
    pools = Pools()
    yield pools
    pools.close()
