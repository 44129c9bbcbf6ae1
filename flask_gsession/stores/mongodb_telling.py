"""What the MongoDB store tells those who look for a fault: round trips, and no contents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .base import tell_trip, trips_are_counted


class _NoPayloads(logging.Filter):
    """Keeps the contents of sessions out of the log that the driver itself writes at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = getattr(record.msg, "_kwargs", None)
        if isinstance(told, dict):
            for name in told.keys() & {"command", "reply"}:
                told[name] = _without_payloads(told[name])
        return True


def _without_payloads(told: Any) -> Any:
    if isinstance(told, list):
        return [_without_payloads(item) for item in told]
    if not isinstance(told, Mapping):
        return told
    hidden = {"payload"} if "absolute_expires_at" in told else set()
    if "expires_at" in told or told.keys() == {"_id", "frame"}:
        hidden = {"frame"}
    return {
        name: "(hidden)" if name in hidden else _without_payloads(value)
        for name, value in told.items()
    }


NO_PAYLOADS = _NoPayloads()


class _TellingCollection:
    """A collection that tells of its round trips."""

    _commands = frozenset(
        {
            *("find_one", "insert_one", "update_one", "replace_one", "delete_one"),
            *("find_one_and_update", "find_one_and_delete", "update_many", "delete_many"),
        }
    )

    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def __getattr__(self, name: str) -> Any:
        if name in self._commands:
            tell_trip()
        return getattr(self._collection, name)


def telling(collection: Any) -> Any:
    """The collection; where somebody counts round trips, one that tells of them."""
    return _TellingCollection(collection) if trips_are_counted() else collection
