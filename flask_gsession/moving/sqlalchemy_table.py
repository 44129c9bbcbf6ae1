"""The table in which Flask-Session keeps sessions with SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError

from ..errors import StoreUnavailable, UnreadableRecord
from ..stores.base import Clock
from ..stores.foreign import Foreign, ForeignValues


class SQLAlchemyTable(ForeignValues):
    """Rows with ``session_id``, ``data`` and ``expiry``, which is in UTC.

    ``engine`` returns the engine. It is called at each use, since Flask-SQLAlchemy has an engine
    only inside an application context. The engine's connections and timeouts apply.
    """

    def __init__(
        self, engine: Callable[[], Any], table: str, schema: str | None, clock: Clock
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._table = sa.table(
            table,
            sa.column("session_id", sa.String),
            sa.column("data", sa.LargeBinary),
            sa.column("expiry", sa.DateTime),
            schema=schema,
        )

    def load(self, name: str) -> Foreign | None:
        columns = self._table.c
        query = sa.select(columns.data, columns.expiry).where(columns.session_id == name)
        row = self._run("load", query, lambda result: result.first())
        if row is None or row.expiry is None:
            return None
        expiry = row.expiry if row.expiry.tzinfo else row.expiry.replace(tzinfo=UTC)
        if expiry <= datetime.fromtimestamp(self._clock(), UTC):
            return None
        if not isinstance(row.data, (bytes, memoryview)):
            raise UnreadableRecord("corrupt", "missing fields or wrong types")
        return Foreign(bytes(row.data), int(expiry.timestamp() * 1000))

    def delete(self, name: str) -> None:
        self._run("delete", sa.delete(self._table).where(self._table.c.session_id == name))

    def names(self, prefix: str) -> Iterator[str]:
        column = self._table.c.session_id
        after = ""
        while True:
            query = (
                sa.select(column)
                .where(column.startswith(prefix, autoescape=True), column > after)
                .order_by(column)
                .limit(500)
            )
            names = self._run("scan", query, lambda result: list(result.scalars()))
            yield from names
            if not names:
                return
            after = names[-1]

    def _run(
        self, operation: str, statement: Any, read: Callable[[Any], Any] = lambda result: None
    ) -> Any:
        try:
            with self._engine().begin() as connection:
                return read(connection.execute(statement))
        except SQLAlchemyError as error:
            # The message would quote the statement with its parameters.
            cause = getattr(error, "orig", None) or error
            hint = ""
            if isinstance(error, (OperationalError, ProgrammingError)):
                hint = ". Is the database reachable, with the table SESSION_SQLALCHEMY_TABLE?"
            detail = f"sqlalchemy: {operation}: {type(cause).__name__}{hint}"
            raise StoreUnavailable(detail) from None
