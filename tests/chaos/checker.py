"""What a history of submits and sinks proves. A pure function, in Jepsen's terms (jepsen checker.clj,
total-queue), for each sink:

    lost        acknowledged to a producer, and never written
    duplicated  written more than once
    unexpected  written, and never even attempted
    recovered   outcome unknown to the producer (the reply was lost), and written once: allowed

A history must end with a drain; without one, what is still on its way would count as lost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class History:
    """`attempted` and `acknowledged` are job ids, `sinks` what each sink holds in order of its rows, `ends`
    how a job ended, `poison` jobs that may not end ok, `recovery_s` for each dead engine the time until
    nothing was held in its name."""

    attempted: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    sinks: dict[str, list[str]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    poison: set[str] = field(default_factory=set)
    runs_again: dict[str, int] = field(default_factory=dict)  # id -> deliveries beyond the first
    recovery_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SinkVerdict:
    lost: list[str]
    duplicated: list[str]
    unexpected: list[str]
    recovered: list[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    sinks: dict[str, SinkVerdict]
    condemned: list[str]  # innocent jobs that did not end ok
    spared: list[str]  # poison that ended ok
    executions: int  # deliveries beyond the first
    recovery_s: list[float]  # sorted

    @property
    def valid(self) -> bool:
        bad = any(s.lost or s.duplicated or s.unexpected for s in self.sinks.values())
        return bool(self.sinks) and not bad and not self.condemned and not self.spared

    def figures(self) -> dict[str, object]:
        """For the JSON line: sums over sinks, and percentiles."""
        sums = {
            name: sum(len(getattr(s, name)) for s in self.sinks.values())
            for name in ("lost", "duplicated", "unexpected", "recovered")
        }
        times = self.recovery_s
        return sums | {
            "condemned": len(self.condemned),
            "spared": len(self.spared),
            "re_executions": self.executions,
            "recovery_p50_s": round(times[len(times) // 2], 2) if times else None,
            "recovery_p99_s": round(times[len(times) * 99 // 100], 2) if times else None,
        }


def check(h: History) -> Verdict:
    sinks = {}
    for name, ids in h.sinks.items():
        written = Counter(ids)
        sinks[name] = SinkVerdict(
            lost=sorted(h.acknowledged - written.keys()),
            duplicated=sorted(i for i, n in written.items() if n > 1),
            unexpected=sorted(written.keys() - h.attempted),
            recovered=sorted((h.attempted - h.acknowledged) & written.keys()),
        )
    return Verdict(
        sinks,
        condemned=sorted(i for i, end in h.ends.items() if end != "ok" and i not in h.poison),
        spared=sorted(i for i, end in h.ends.items() if end == "ok" and i in h.poison),
        executions=sum(h.runs_again.values()),
        recovery_s=sorted(h.recovery_s),
    )
