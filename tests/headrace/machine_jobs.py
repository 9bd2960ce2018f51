"""The few jobs that the ledger's state machine plays with: what they are follows from their names."""

from __future__ import annotations

from hypothesis import strategies as st

from headrace.messages import Job, Priority, Status
from tests.headrace.servers import Lane

JOBS = st.integers(0, 15).map(lambda i: f"j{i}")
ENGINES = st.sampled_from(["e0", "e1", "e2"])
ENDS = st.sampled_from([Status.OK, Status.ERROR, Status.DEAD])
PRIORITIES = list(Priority)
#: Owners that are no engines: in the list of its flow, later, in a group of suspects, in
#: a stream whose group was lost and has not got so far again.
WAITING, LATER, SUSPECT, UNREAD = "waiting", "later", "suspect", "unread"


def priority_of(job_id: str) -> Priority:
    return PRIORITIES[int(job_id[1:]) % 3]


def flow_of(job_id: str) -> tuple[str, str | None]:
    """Run and tenant."""
    n = int(job_id[1:])
    return f"r{n // 8}", "t" if n % 8 > 5 else None


def job_of(job_id: str, lane: Lane) -> Job:
    run, tenant = flow_of(job_id)
    prompt = "x" * (70_000 if job_id == "j3" else 1)  # one that is kept beside its entry
    return Job.build({
        "id": job_id, "run": run, "tenant": tenant, "lane": lane.ledger.lane, "kind": "completion",
        "prompt": prompt, "priority": priority_of(job_id),
    })  # fmt: skip
