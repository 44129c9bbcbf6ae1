"""Stock and orders. An order takes all of its goods or none, and takes them once."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from .catalogue import Catalogue
from .database import Database


class SoldOut(Exception):
    """There is less in stock than was ordered; `left` says what there is, by SKU."""

    def __init__(self, left: dict[str, int]) -> None:
        super().__init__(", ".join(f"{sku}: {stock}" for sku, stock in left.items()))
        self.left = left


@dataclass(frozen=True, slots=True)
class Line:
    """Pieces of one product at the price of the day, in euro cents."""

    sku: str
    name: str
    price: int
    quantity: int

    @property
    def total(self) -> int:
        return self.price * self.quantity


@dataclass(frozen=True, slots=True)
class Order:
    """A placed order."""

    number: int
    buyer: str
    token: str
    placed_at: datetime
    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        return sum(line.total for line in self.lines)


class Orders:
    """The shop's stock and order book; products new in the catalogue are put on the shelf."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._catalogue = catalogue
        if catalogue.products.keys() - self.stock().keys():
            self._shelve("INSERT OR IGNORE INTO stock VALUES (?, ?)")

    def restock(self) -> None:
        """Bring each product back to what the shop opened with."""
        self._shelve("INSERT OR REPLACE INTO stock VALUES (?, ?)")

    def _shelve(self, statement: str) -> None:
        goods = [(product.sku, product.stock) for product in self._catalogue.products.values()]
        with self._database.writing() as connection:
            connection.executemany(statement, goods)

    def stock(self) -> dict[str, int]:
        """How many pieces of each product there are, by SKU."""
        with self._database.reading() as connection:
            return dict(tuple(row) for row in connection.execute("SELECT sku, stock FROM stock"))

    def place(self, buyer: str, token: str, quantities: Mapping[str, int]) -> Order:
        """Take the goods from the shelf and write the order down, in one transaction.

        The same buyer and token again give the order that was placed, and take nothing.

        :param token: stands for this order; from the cart.
        :param quantities: pieces by SKU of the catalogue, each above 0.

        Raises `SoldOut` when something is short, `ValueError` without anything to order. Nothing
        is taken then.
        """
        if not quantities or min(quantities.values()) < 1:
            raise ValueError("An order needs at least one piece of something")
        with self._database.writing() as connection:
            placed = _find(connection, "buyer = ? AND token = ?", (buyer, token))
            if placed:
                return placed[0]
            wanted = quantities.items()
            short = [sku for sku, pieces in wanted if not _take(connection, sku, pieces)]
            if short:
                raise SoldOut({sku: _left(connection, sku) for sku in short})
            number = connection.execute(
                "INSERT INTO orders (buyer, token, placed_at) VALUES (?, ?, ?)",
                (buyer, token, datetime.now(UTC).isoformat()),
            ).lastrowid
            for sku, pieces in wanted:
                product = self._catalogue.products[sku]
                connection.execute(
                    "INSERT INTO order_lines (number, sku, name, price, quantity)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (number, sku, product.name, product.price, pieces),
                )
            return _find(connection, "number = ?", (number,))[0]

    def placed_by(self, buyer: str) -> list[Order]:
        """Someone's orders, the newest first."""
        with self._database.reading() as connection:
            return _find(connection, "buyer = ?", (buyer,))

    def by_number(self, buyer: str, number: int) -> Order | None:
        """One of someone's orders."""
        return self._one("buyer = ? AND number = ?", (buyer, number))

    def by_token(self, buyer: str, token: str) -> Order | None:
        """The order that someone's cart has become."""
        return self._one("buyer = ? AND token = ?", (buyer, token))

    def _one(self, condition: str, values: tuple[object, ...]) -> Order | None:
        with self._database.reading() as connection:
            found = _find(connection, condition, values)
        return found[0] if found else None


def _take(connection: sqlite3.Connection, sku: str, pieces: int) -> bool:
    statement = "UPDATE stock SET stock = stock - ? WHERE sku = ? AND stock >= ?"
    return connection.execute(statement, (pieces, sku, pieces)).rowcount == 1


def _left(connection: sqlite3.Connection, sku: str) -> int:
    row = connection.execute("SELECT stock FROM stock WHERE sku = ?", (sku,)).fetchone()
    return row["stock"] if row else 0


def _find(
    connection: sqlite3.Connection, condition: str, values: tuple[object, ...]
) -> list[Order]:
    # `condition` is always one of the texts above, never a visitor's.
    orders = connection.execute(
        f"SELECT number, buyer, token, placed_at FROM orders WHERE {condition}"
        " ORDER BY number DESC",
        values,
    ).fetchall()
    return [
        Order(
            number=row["number"],
            buyer=row["buyer"],
            token=row["token"],
            placed_at=datetime.fromisoformat(row["placed_at"]),
            lines=tuple(
                Line(*line)
                for line in connection.execute(
                    "SELECT sku, name, price, quantity FROM order_lines"
                    " WHERE number = ? ORDER BY sku",
                    (row["number"],),
                )
            ),
        )
        for row in orders
    ]
