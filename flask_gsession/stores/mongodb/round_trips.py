"""Diagnostics of the MongoDB store: it counts round trips, and keeps contents out of logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..support import count_round_trip


class _NoPayloads(logging.Filter):
    """Keeps the contents of sessions out of the driver's own log at level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        fields = getattr(record.msg, "_kwargs", None)
        if isinstance(fields, dict):
            for name in fields.keys() & {"command", "reply"}:
                fields[name] = _without_payloads(fields[name])
        return True


def _without_payloads(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_payloads(item) for item in content]
    if not isinstance(content, Mapping):
        return content
    hidden = {"payload"} if "absolute_expires_at" in content else set()
    if "expires_at" in content or content.keys() == {"_id", "frame"}:
        hidden = {"frame"}
    return {
        name: "(hidden)" if name in hidden else _without_payloads(value)
        for name, value in content.items()
    }


NO_PAYLOADS = _NoPayloads()


class SessionCollection:
    """A collection whose commands run in one driver session and are counted as round trips."""

    _commands = frozenset(
        {
            *("find_one", "insert_one", "insert_many", "update_one", "replace_one", "delete_one"),
            *("find_one_and_update", "find_one_and_delete", "update_many", "delete_many"),
            "bulk_write",
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
