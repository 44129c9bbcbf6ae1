"""The SQLite file of a node."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TypeVar

from ...errors import CutOff, StoreUnavailable
from ..sqlite.file import SQLiteFile

T = TypeVar("T")


class NodeUnavailable(StoreUnavailable):
    """The node's own file can't be used."""


class NodeFile(SQLiteFile):
    """The node's file. It has its own error type, to tell its errors from the centre's."""

    def within(self, work: Callable[[sqlite3.Connection], T], **how: bool) -> T:
        try:
            return super().within(work, **how)
        except StoreUnavailable as error:
            if isinstance(error, (CutOff, NodeUnavailable)):
                raise
            raise NodeUnavailable(
                f"the node's file: {error.detail.removeprefix('sqlite: ')}",
                contention=error.contention,
            ) from error
