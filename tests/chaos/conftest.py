import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.bench import Bench
from tests.chaos.parts import Server
from tests.headrace.own_server import free_port


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A server and its engines, all real processes."""
    server = Server(tmp_path / "server", free_port())
    server.start()
    with_engines = Bench(server, tmp_path)
    yield with_engines
    with_engines.close()


#: The mutation proof takes two minutes, and is `make chaos`'s: it is collected only where it is named.
collect_ignore = [] if any("test_guards" in word for word in sys.argv) else ["test_guards.py"]
