"""Every Redis key, in one place. All keys of a lane share the hash tag `{lane}`, so one script may touch
several of them on a cluster. Names may hold ":", so what they follow is always a whole family's prefix."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.messages import Priority

#: Consumer group of the engines on every job stream.
GROUP = "engines"
#: The field of a completion entry, and of a job entry that holds its payload.
FIELD = "m"
#: Result stream that takes what has no `reply_to`.
DEFAULT_RESULTS = "default"
#: Result streams with this prefix belong to one awaiting application: they expire, nobody groups them,
#: and their completions are also kept by job id for a while.
REPLY_PREFIX = "reply."

#: Mark of a job that is accepted and has not ended. Every other mark but FORGOTTEN is a final status.
QUEUED = "q"
#: Mark of a job that was still queued when its run was forgotten: its end is dropped without a trace.
FORGOTTEN = "x"


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one lane."""

    lane: str

    def _key(self, *parts: str) -> str:
        return ":".join((f"hr:{{{self.lane}}}", *parts))

    def jobs(self, priority: Priority) -> str:
        """Stream of waiting and leased jobs. What is waiting of it is in lists, one for each flow:

        KEY/                sorted set: RUN, or TENANT/ for runs of a tenant -> estimated tokens served
        KEY/RUN             list of entry ids in order
        KEY/TENANT/         sorted set of the tenant's runs
        KEY/TENANT/RUN      list
        KEY#ENTRY           a payload too large to stand in the entry itself
        """
        return self._key("jobs", priority.value)

    @property
    def later(self) -> str:
        """Sorted set: "STREAM-NUMBER ENTRY-ID FLOW" -> unix milliseconds from which a lease may have it."""
        return self._key("jobs", "later")

    @property
    def suspects(self) -> str:
        """List of groups of entries that were in flight together when an engine or a rank died."""
        return self._key("jobs", "suspects")

    @property
    def shares(self) -> str:
        """Hash: stream number -> estimated tokens served by its weight."""
        return self._key("jobs", "shares")

    @property
    def cancels(self) -> str:
        """Sorted set: "RUN" or "RUN ID" -> unix seconds at which somebody asked to cancel it."""
        return self._key("cancels")

    @property
    def crashes(self) -> str:
        """Stream of the last thousand deaths of engines and ranks, with their evidence."""
        return self._key("crashes")

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return self._key("dead")

    def marks(self, run: str) -> str:
        """Hash: job id -> "q" (accepted, not finished), "x" (forgotten) or the status it ended with."""
        return self._key("marks", run)

    def run(self, run: str) -> str:
        """Hash of a run's counters."""
        return self._key("run", run)

    @property
    def runs(self) -> str:
        """Sorted set: run name -> unix seconds of its last submit or finish."""
        return self._key("runs")

    def results(self, name: str | None) -> str:
        """Stream of completions."""
        return self._key("results", name or DEFAULT_RESULTS)

    def kept(self, job_id: str) -> str:
        """Completion kept for a while for applications that ask by job id."""
        return self._key("kept", job_id)

    @property
    def attempts(self) -> str:
        """Hash: "<job stream> <entry id>" -> its failed deliveries by cause, until the job ends. By entry and
        not by job id, so that a payload nobody can read has its counts too; an entry id is added and deleted
        in the same replicated order as its counts, so even an id issued again after a failover is safe."""
        return self._key("attempts")

    @property
    def engines(self) -> str:
        """Hash: engine boot id -> JSON {"at": unix seconds by the server's clock, "state": {...}}."""
        return self._key("engines")
