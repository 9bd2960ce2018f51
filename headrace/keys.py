"""Every Redis key, in one place. All keys of a lane share the hash tag `{lane}`, so one script may touch
several of them on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.messages import Priority

#: Consumer group of the engines on every job stream.
GROUP = "engines"
#: Consumer that holds released jobs until an engine leases them.
FREE = "_free"
#: The one field of a job entry and of a completion entry.
FIELD = "m"
#: Result stream that takes what has no `reply_to`.
DEFAULT_RESULTS = "default"


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one lane."""

    lane: str

    def _key(self, *parts: str) -> str:
        return ":".join((f"hr:{{{self.lane}}}", *parts))

    def jobs(self, priority: Priority) -> str:
        """Stream of waiting and leased jobs."""
        return self._key("jobs", priority.value)

    def marks(self, run: str) -> str:
        """Hash: job id -> "q" (accepted, not finished) or the status it ended with."""
        return self._key("run", run, "marks")

    def run(self, run: str) -> str:
        """Hash of a run's counters."""
        return self._key("run", run)

    @property
    def runs(self) -> str:
        """Sorted set: run name -> unix seconds of its first submit."""
        return self._key("runs")

    def results(self, name: str | None) -> str:
        """Stream of completions."""
        return self._key("results", name or DEFAULT_RESULTS)

    def kept(self, job_id: str) -> str:
        """Completion kept for a while for applications that ask by job id."""
        return self._key("kept", job_id)

    @property
    def attempts(self) -> str:
        """Hash: job id -> deliveries beyond the first, until the job ends."""
        return self._key("attempts")

    @property
    def engines(self) -> str:
        """Hash: engine boot id -> JSON of its state and heartbeat."""
        return self._key("engines")
