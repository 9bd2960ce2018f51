"""The engine's one exception tree. Every error names the value, the limit and the fix."""


class EngineError(Exception):
    """Base of all errors that the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """The engine cannot be built from these settings (the user mends a flag or the model folder)."""


class CheckpointError(EngineError):
    """A checkpoint is missing, not safetensors, or its tensors do not match the model, by name."""


class InvalidRequest(EngineError, ValueError):
    """One request cannot be run; it ends as an `error` completion and hurts nobody else.

    `code` is a stable identifier for programs (`prompt_too_long`, `token_out_of_range`, ...).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CapacityError(EngineError):
    """The machine has no room for what the settings ask (for example not one KV block)."""


class WorkerDied(EngineError):
    """A rank died, hung or failed a step. Everything in flight goes back to the queue.

    `rank` is the first culprit, `evidence` its own traceback or exit cause.
    """

    def __init__(self, rank: int, evidence: str) -> None:
        super().__init__(f"rank {rank} died: {evidence}")
        self.rank = rank
        self.evidence = evidence
