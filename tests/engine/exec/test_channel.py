"""The step channel: frames arrive in order, and nobody without the keys gets in."""

from __future__ import annotations

import dataclasses
import pickle
import re
import threading
from pathlib import Path

import pytest
import zmq

from engine.exec import channel, rank, ray, wire
from engine.exec.channel import DriverChannel, Endpoint, RankChannel


def _join(endpoint: Endpoint, rank: int) -> RankChannel:
    return RankChannel(endpoint, rank, threading.Event())


def test_frames_reach_every_rank_in_order_and_rank_0_answers() -> None:
    driver = DriverChannel("127.0.0.1", 2)
    ranks = [_join(driver.endpoint, r) for r in range(2)]
    try:
        assert driver.wait_for_ranks(10) == []
        for i in range(50):
            driver.send(b"plan %d" % i)
        for rank in ranks:
            assert [rank.receive() for _ in range(50)] == [b"plan %d" % i for i in range(50)]
        ranks[0].send(b"result")
        assert driver.receive(10) == b"result"
        assert driver.receive(0.01) is None
        seen: set[int] = set()
        for _ in range(50):
            seen.update(rank for rank, _ in driver.beats(0.2))
            if seen == {0, 1}:
                break
        assert seen == {0, 1}
    finally:
        for rank in ranks:
            rank.close()
        driver.close()


def test_a_peer_with_other_keys_cannot_join() -> None:
    driver = DriverChannel("127.0.0.1", 1)
    public, secret = zmq.curve_keypair()
    forged = dataclasses.replace(driver.endpoint, client_public=public, client_secret=secret)
    stranger = _join(forged, 0)
    try:
        assert driver.wait_for_ranks(1.0) == [0]
        rank = _join(driver.endpoint, 0)
        try:
            assert driver.wait_for_ranks(10) == []
        finally:
            rank.close()
    finally:
        stranger.close()
        driver.close()


def test_a_plain_peer_cannot_join() -> None:
    driver = DriverChannel("127.0.0.1", 1)
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.identity = b"0"
    plain.connect(driver.endpoint.steps)
    plain.send(b"ready")
    try:
        assert driver.wait_for_ranks(1.0) == [0]
    finally:
        plain.close(linger=0)
        context.term()
        driver.close()


def test_no_frame_is_ever_unpickled() -> None:
    for module in (channel, wire, rank, ray):
        source = Path(module.__file__ or "").read_text()
        assert not re.search(r"(import|from) \w*pickle|(send|recv)_pyobj|torch\.load", source), module
    bomb = pickle.dumps(Path("/"))
    for unpack in (wire.unpack_plan, wire.unpack_result):
        with pytest.raises(ValueError, match=r"."):
            unpack(bomb)
