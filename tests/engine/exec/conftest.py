"""One Ray session for all tests of this folder; executors start it when the first of them needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def session() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()
