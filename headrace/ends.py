"""Calls that end jobs: the completion goes out and the job leaves, as one change. Part of
`headrace.ledger.Ledger`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from headrace.keys import FIELD, GROUP, REPLY_PREFIX
from headrace.leases import LeaseCalls, Leased
from headrace.messages import Completion
from headrace.parts import batches, numbered, words
from headrace.store import Call, Flow, script

#: Seconds that an answer for an awaiting application is kept.
KEEP_S = 3600


class EndCalls(LeaseCalls):
    """End calls of one lane."""

    retention_s: int

    def finish(
        self,
        consumer: str,
        items: Sequence[tuple[Leased, Completion]],
        letters: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Flow[list[str]]:
        """End jobs. One word each: "done"; or the completion is dropped, because of "fenced" (the lease is
        another's now), "duplicate" (the job had ended before) or "forgotten" (`forget_run`). "cancelled":
        the job still stands, was cancelled meanwhile, and is to be finished with that status.

        `letters`: by entry id, what to say in the dead letters of jobs that are to leave one.
        """
        letters = letters or {}
        states: list[str] = []
        for part in batches([(one, c, c.to_bytes()) for one, c in items]):
            streams = numbered(one.stream for one, _, _ in part)
            runs = numbered(c.run for _, c, _ in part)
            results = numbered(self.keys.results(c.reply_to) for _, c, _ in part)
            kept = numbered(c.id for _, c, _ in part if (c.reply_to or "").startswith(REPLY_PREFIX))
            keys = [self.keys.attempts, self.keys.runs, self.keys.cancels, self.keys.dead, self.keys.crashes]
            keys += streams
            for run in runs:
                keys += (self.keys.marks(run), self.keys.run(run))
            keys += [*results, *map(self.keys.kept, kept)]
            args: list[Any] = [GROUP, consumer, FIELD, self.retention_s, KEEP_S]
            args += (len(streams), len(runs), len(results), *runs)
            for one, c, raw in part:
                usage = c.usage
                args += (streams[one.stream], one.entry_id, runs[c.run], c.id, c.status.value)
                args += (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
                args += (results[self.keys.results(c.reply_to)], kept.get(c.id, 0))
                letter = letters.get(one.entry_id)
                args += (b"" if letter is None else orjson.dumps(dict(letter)), raw)
            states += yield Call(words, script("finish"), tuple(keys), tuple(args))
        return states

    def reject(self, completions: Sequence[Completion]) -> Flow[list[str]]:
        """End rows that could not become jobs. "done" or "duplicate" each."""
        states: list[str] = []
        for part in batches([(c, c.to_bytes()) for c in completions]):
            keys: list[str] = [self.keys.runs]
            args: list[Any] = [FIELD, self.retention_s]
            for c, raw in part:
                keys += (self.keys.marks(c.run), self.keys.run(c.run), self.keys.results(c.reply_to))
                args += (c.id, c.run, c.status.value, raw)
            states += yield Call(words, script("reject"), tuple(keys), tuple(args))
        return states
