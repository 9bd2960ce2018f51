"""A step that has been handed to the device, and its result, which may be read later.

On a GPU everything up to the sampled ids is queued and nobody has waited; the next plan can be launched
while this one computes. Knows nothing of models or plans.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.exec.wire import StepResult
from engine.request import TokenLogprobs
from engine.sample.output import SampleOutput


@dataclass(frozen=True, slots=True)
class PendingStep:
    """Rank 0's answer to one plan, on its way."""

    step: int
    out: SampleOutput | None  # None where no row was sampled
    prompt_logprobs: list[tuple[int, int, TokenLogprobs]]
    began: float
    allreduces: int

    def result(self) -> StepResult:
        """Waits for the device to finish this step, and for no later one unless log-probabilities are asked
        for."""
        out = self.out
        if out is None:
            return StepResult(
                self.step, [], prompt_logprobs=self.prompt_logprobs, seconds=self._seconds(),
                allreduces=self.allreduces,
            )  # fmt: skip
        return StepResult(
            self.step,
            list(zip(out.rows, out.ids(), strict=True)),
            out.logprobs,
            self.prompt_logprobs,
            out.bad_rows,
            self._seconds(),
            self.allreduces,
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self.began
