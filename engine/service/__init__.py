"""The long-lived engine process: leases jobs, feeds the core, commits completions.

The one folder of `engine/` that knows Redis. Four threads, each with one duty:

    intake   leases as many jobs as there are free rows plus a small look-ahead, tokenises, hands them over
    step     (the main thread) runs the core's steps; replaces its ranks when one died
    commit   turns finished requests into completions and finishes them in batches, fenced
    keeper   renews leases while steps make progress, reports the heartbeat

A job is *held* from its lease until its completion is committed, fenced off or handed back. What this
process holds may be lost with it: the lease runs out and another engine takes the job.
"""

from engine.service.service import Service, build_executor, serve

__all__ = ["Service", "build_executor", "serve"]
