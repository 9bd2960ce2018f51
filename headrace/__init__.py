"""What applications import, and the contract all parts share.

Names are loaded when they are first used (PEP 562), so that `headrace --help` does not import redis and
pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client import Client
    from headrace.errors import (
        HeadraceError,
        InvalidJob,
        LaneFull,
        NotDurable,
        ResultExpired,
        SettingsError,
        StoreError,
        StoreFull,
        StoreUnavailable,
    )
    from headrace.ledger import RunProgress
    from headrace.messages import Completion, Job, Kind, Message, Priority, SamplingParams, Status
    from headrace.sync import SyncClient

__all__ = [
    "Client",
    "Completion",
    "HeadraceError",
    "InvalidJob",
    "Job",
    "Kind",
    "LaneFull",
    "Message",
    "NotDurable",
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

#: Where the names live, the cheapest to import first.
_HOMES = ("errors", "messages", "ledger", "client", "sync")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"headrace.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
