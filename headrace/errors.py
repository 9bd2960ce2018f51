"""The one exception tree of the client and the contract. Errors name the value, the limit and the fix."""


class HeadraceError(Exception):
    """Base of all errors that headrace raises on purpose."""


class InvalidJob(HeadraceError, ValueError):
    """A job cannot be accepted. `code` is a stable identifier for programs."""

    def __init__(self, message: str, code: str = "invalid_job") -> None:
        super().__init__(message)
        self.code = code


class LaneFull(HeadraceError):
    """The lane stayed at its bound for as long as the caller was willing to wait."""


class StoreError(HeadraceError):
    """The Redis server cannot be reached, started or used."""


class ResultExpired(HeadraceError):
    """The job finished, but its completion is no longer kept for awaiting applications."""
