"""What sinks and awaiting applications rely on, on real servers: nothing leaves before all have it, and
nothing stays for ever."""

from __future__ import annotations

import pytest

from tests.headrace.servers import Lane, answer


@pytest.mark.parametrize(("one", "two"), [("first", "last"), ("last", "first")])
def test_a_result_is_deleted_when_every_sink_has_taken_it(lane: Lane, one: str, two: str) -> None:
    for group in (one, two):
        lane.run(lane.ledger.ensure_sink(None, group))
    lane.submit("a", "b", "c")
    lane.finish(lane.lease())
    entries = lane.run(lane.ledger.read_results(None, one, "s", 10, 1))
    lane.run(lane.ledger.ack_results(None, one, [e.entry_id for e in entries]))
    assert lane.run(lane.ledger.result_length(None)) == 3, "sink two has read nothing"
    assert lane.run(lane.ledger.result_lag(None, two)) == 3
    entries = lane.run(lane.ledger.read_results(None, two, "s", 10, 1))
    lane.run(lane.ledger.ack_results(None, two, [entries[0].entry_id, entries[2].entry_id]))
    assert lane.run(lane.ledger.result_length(None)) == 2, "b is still pending for two"
    assert [e.raw for e in lane.run(lane.ledger.unacknowledged(None, two, "s"))] == [entries[1].raw]
    lane.run(lane.ledger.ack_results(None, two, [entries[1].entry_id]))
    assert lane.run(lane.ledger.result_length(None)) == 0
    assert lane.run(lane.ledger.result_lag(None, two)) == 0


def test_what_a_sink_has_before_it_is_never_told_too_low(lane: Lane) -> None:
    lane.run(lane.ledger.ensure_sink(None, "one"))
    lane.submit("a", "b", "c")
    lane.finish(lane.lease())
    entries = lane.run(lane.ledger.read_results(None, "one", "s", 2, 1))
    assert lane.run(lane.ledger.result_lag(None, "one")) == 3
    lane.run(lane.ledger.ack_results(None, "one", [e.entry_id for e in entries]))
    assert lane.run(lane.ledger.result_lag(None, "one")) == 1
    lane.run(lane.ledger.ensure_sink(None, "late"))
    assert lane.run(lane.ledger.result_lag(None, "late")) >= 1
    assert lane.run(lane.ledger.result_lag(None, "nobody")) == 1
    assert lane.run(lane.ledger.result_lag("nothing", "nobody")) == 0
    lane.submit("d", "e")
    lane.finish(lane.lease())
    hole = lane.redis.xrange(lane.ledger.keys.results(None))[1][0]
    lane.redis.xdel(lane.ledger.keys.results(None), hole)
    assert lane.run(lane.ledger.result_lag(None, "late")) >= 2, "with a hole the server does not count"


def test_an_answer_for_an_application_is_kept_by_job_id(lane: Lane) -> None:
    lane.submit("a", reply_to="reply.me")
    lane.submit("b", reply_to="elsewhere")
    leased = lane.lease()
    lane.finish(leased)
    kept = lane.run(lane.ledger.kept("a"))
    assert kept == answer(leased[0]).to_bytes()
    assert lane.run(lane.ledger.kept("b")) is None
    assert 0 < lane.redis.ttl(lane.ledger.keys.results("reply.me")) <= 3600


def test_an_empty_stream_of_a_run_goes_with_its_counters_and_the_lanes_own_stays(lane: Lane) -> None:
    for name, job_id in (("night", "a"), (None, "b")):
        lane.run(lane.ledger.ensure_sink(name, "s"))
        lane.submit(job_id, reply_to=name)
    stream, own = lane.ledger.keys.results("night"), lane.ledger.keys.results(None)
    assert 0 < lane.redis.ttl(stream) <= 7 * 86_400, "nothing was ever written to it"
    lane.finish(lane.lease())
    assert lane.redis.ttl(stream) == -1, "what no sink has taken does not expire"
    for name in ("night", None):
        (taken,) = lane.run(lane.ledger.read_results(name, "s", "c", 10, 1))
        assert lane.run(lane.ledger.ack_results(name, "s", [taken.entry_id])) == 1
    assert 0 < lane.redis.ttl(stream) <= 7 * 86_400
    assert lane.redis.ttl(own) == -1
    lane.submit("c", reply_to="night")
    lane.finish(lane.lease())
    assert lane.redis.ttl(stream) == -1, "it is written to again"
