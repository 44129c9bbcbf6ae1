"""Documents that another package keeps on our MongoDB server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError

from ...errors import UnreadableRecord
from ..base import milliseconds
from ..foreign import Foreign, ForeignValues
from ..support import StoreOptions
from .driver import Driver, call, reraise_interruption
from .round_trips import SessionCollection


class MongoDBDocuments(ForeignValues):
    """Documents of one collection with the fields ``id``, ``val`` and ``expiration``."""

    def __init__(
        self, driver: Driver, options: StoreOptions, database: str, collection: str
    ) -> None:
        self.driver = driver
        self._clock = options.clock
        self._names = database, collection

    def load(self, name: str) -> Foreign | None:
        return self._load(name)

    def delete(self, name: str) -> None:
        self._delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        after = ""
        while True:
            names = self._page(prefix, after)
            yield from names
            if not names:
                return
            after = names[-1]

    @call("load")
    def _load(self, collection: SessionCollection, name: str) -> Foreign | None:
        try:
            document = self._of(collection).find_one({"id": name})
        except BSONError as error:
            reraise_interruption(error)
            raise UnreadableRecord("corrupt", type(error).__name__) from None
        if document is None:
            return None
        value, end = document.get("val"), _milliseconds(document.get("expiration"))
        if end is None or end <= milliseconds(self._clock):
            return None
        if isinstance(value, str):
            value = value.encode()
        if document.get("id") != name or not isinstance(value, bytes):
            raise UnreadableRecord("corrupt", "missing fields or wrong types")
        return Foreign(value, end)

    @call("delete")
    def _delete(self, collection: SessionCollection, name: str) -> None:
        self._of(collection).delete_many({"id": name})

    @call("scan")
    def _page(self, collection: SessionCollection, prefix: str, after: str) -> list[str]:
        names = {"$regex": f"^{re.escape(prefix)}", "$gt": after}
        found = self._of(collection).find({"id": names}, ["id"], sort=[("id", 1)], limit=500)
        return [document["id"] for document in found]

    def _of(self, collection: SessionCollection) -> SessionCollection:
        database, name = self._names
        found = collection.database.client[database][name]
        # Majority, as for our own records: a removal must outlive a failover.
        return collection.of(
            found.with_options(
                codec_options=collection.codec_options,
                read_preference=collection.read_preference,
                write_concern=collection.write_concern,
            )
        )


def _milliseconds(time: Any) -> int | None:
    if isinstance(time, DatetimeMS):
        return int(time)
    if isinstance(time, datetime):
        return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
    return None
