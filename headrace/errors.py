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


class StoreUnavailable(StoreError):
    """The server does not answer just now (down, loading, failing over, refusing writes). Whether the last
    command ran is unknown; every ledger call may be made again."""


class StoreFull(StoreError):
    """The server is at its `maxmemory` and takes no new data. Finishing and acking jobs still work."""


class NotDurable(StoreError):
    """What was submitted is accepted, but not yet as durable as was asked. Submit it again to wait again."""


class ResultExpired(HeadraceError):
    """The job finished, but its completion is no longer kept for awaiting applications."""


class SettingsError(HeadraceError, ValueError):
    """A setting is unknown or has a value that cannot be used."""
