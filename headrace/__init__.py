"""What applications import, and the contract all parts share."""

from headrace.client import Client, SyncClient
from headrace.errors import (
    HeadraceError,
    InvalidJob,
    LaneFull,
    ResultExpired,
    SettingsError,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from headrace.ledger import RunProgress
from headrace.messages import Completion, Job, Kind, Message, Priority, SamplingParams, Status

__all__ = [
    "Client",
    "Completion",
    "HeadraceError",
    "InvalidJob",
    "Job",
    "Kind",
    "LaneFull",
    "Message",
    "Priority",
    "ResultExpired",
    "RunProgress",
    "SamplingParams",
    "SettingsError",
    "Status",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "SyncClient",
]
