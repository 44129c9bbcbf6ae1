"""What the MongoDB store tells those who look for a fault: round trips, and no contents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..support import count_round_trip


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


class SessionCollection:
    """A collection whose commands run in one driver session, and tell of their round trips."""

    _commands = frozenset(
        {
            *("find_one", "insert_one", "update_one", "replace_one", "delete_one"),
            *("find_one_and_update", "find_one_and_delete", "update_many", "delete_many"),
        }
    )
    _more = frozenset({"find", "aggregate", "count_documents", "create_index"})

    __slots__ = ("_collection", "_session")

    def __init__(self, collection: Any, session: Any) -> None:
        self._collection = collection
        self._session = session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._collection, name)
        if name in self._commands:
            count_round_trip()
        elif name not in self._more:
            return found
        return partial(found, session=self._session)

    def of(self, collection: Any) -> SessionCollection:
        """Another collection, in the same session."""
        return SessionCollection(collection, self._session)
