from collections.abc import Iterator

import pytest

from tests.headrace.servers import SERVERS, Lane


@pytest.fixture(scope="session", params=list(SERVERS))
def server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    with SERVERS[request.param]() as url:
        yield url


@pytest.fixture
def lane(server_url: str) -> Iterator[Lane]:
    """An empty server."""
    lane = Lane(server_url)
    lane.redis.flushall()
    yield lane
    lane.store.close()
