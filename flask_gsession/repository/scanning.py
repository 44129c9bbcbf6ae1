"""Iterates over all sessions of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import StoreUnavailable
from ..stores.base import is_session_key
from ..stores.parts import Page, Scans

T = TypeVar("T")

_PAUSES = (0.2, 1.0)  # seconds; long enough for most failovers
_FIRST_PAGE, _MAX_PAGE = 10, 200  # records
_MAX_PAGE_BEGINS = 2000  # records examined per call if only those with a prefix are returned
_PAGE_BYTES = 2 * 2**20  # of payloads, roughly, since a page must arrive within one store timeout


class Retry:
    """Retries store calls after a short outage, once a first call has succeeded."""

    def __init__(self) -> None:
        self._pauses: tuple[float, ...] = ()

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        for pause in self._pauses:
            try:
                return function(*arguments)
            except StoreUnavailable:
                time.sleep(pause)
        result = function(*arguments)
        self._pauses = _PAUSES
        return result


def all_pages(
    scans: Scans, begins: str = "", wanted: Callable[[str], bool] = is_session_key
) -> Iterator[Page]:
    """Yield all sessions of a store, page by page, without other records. Survives a short outage.

    ``begins``: the prefix of the keys to return. ``wanted``: whether to return a key. Larger
    sessions make smaller pages. One round trip or a few for each page.
    """
    cursor, retry = "", Retry()
    limit, longest = _FIRST_PAGE, _MAX_PAGE_BEGINS if begins else _MAX_PAGE
    while True:
        page = retry(scans.scan, cursor, limit, begins)
        size = sum(len(record.payload) for record in page.records)
        limit = max(1, min(2 * limit, longest, limit * _PAGE_BYTES // max(1, size)))
        records = [each for each in page.records if wanted(each.key)]
        unreadable = [key for key in page.unreadable if wanted(key)]
        yield page._replace(records=records, unreadable=unreadable)
        cursor = page.cursor
        if not cursor:
            return
