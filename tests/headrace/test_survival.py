"""The server is killed and comes back: what waits, is leased, waits for later or is suspect, is so still."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from headrace.embedded import EmbeddedServer
from tests.headrace.servers import Lane, ids


def picture(lane: Lane) -> dict[bytes, object]:
    """All that the server holds of the lane, by key."""
    out: dict[bytes, object] = {}
    for key in lane.redis.keys("hr:*"):
        kind = lane.redis.type(key)
        if kind == b"stream":
            groups = [(g["name"], g["last-delivered-id"]) for g in lane.redis.xinfo_groups(key)]
            out[key] = (lane.redis.xrange(key), groups)
        elif kind == b"list":
            out[key] = lane.redis.lrange(key, 0, -1)
        elif kind == b"zset":
            out[key] = lane.redis.zrange(key, 0, -1, withscores=True)
        elif kind == b"hash":
            out[key] = lane.redis.hgetall(key)
        else:
            out[key] = lane.redis.get(key)
    return out


def test_everything_stands_where_it_stood(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        lane = Lane(server.url)
        lane.submit(*(f"a{i}" for i in range(20)), priority="bulk")
        lane.submit(*(f"b{i}" for i in range(20)), tenant="t")
        lane.submit("large", prompt="x" * 100_000, run="s")
        lane.run(lane.ledger.crashed("dead", lane.lease("dead", 6), {"rank": 1}))
        lane.run(lane.ledger.retry("e", lane.lease("e", 2)[0]))
        lane.lease("other", 3)
        lane.run(lane.ledger.cancel("r", ["a19"]))
        before, held = picture(lane), lane.run(lane.ledger.held_by("other"))
        os.kill(server.pid, signal.SIGKILL)
        while server.revive() is None:
            time.sleep(0.01)
        lane = Lane(server.url)
        assert picture(lane) == before
        assert lane.run(lane.ledger.held_by("other")) == held
        assert lane.run(lane.ledger.renew("other", held)) == []
        assert lane.run(lane.ledger.heal()) == 0
        assert len(ids(lane.lease("new", 100))) == 3, "a group of suspects"
