"""The stock in MongoDB. A document is changed as one, so each product's holds its pieces and holds.

An order takes its lines one after the other, and its own document decides what they mean::

    shelf   _id: SKU     left: pieces                held: [{order: number, pieces, until: time}]
    orders  _id: number  lines: [[SKU, pieces], ..]  until: time
            state: "open" while it takes, then "held" or "closed"; "sold" when it is paid

A process that dies in between leaves holds behind. Once their time is over, the next buyer looks up
their orders, and puts back the pieces that were not sold. After a sale, a hold stays for that time
too, so that a copy of the request that a stuck network delivers late finds it and takes nothing. No
step needs a transaction, so a single server will do.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import MongoClient, ReturnDocument
from pymongo.errors import ConnectionFailure, DuplicateKeyError, ExecutionTimeout, WTimeoutError

from .stock import HOLD, MEMORY, TIMEOUT, Order, OrderClosed, SoldOut, persistently

FAILURES = (ConnectionFailure, ExecutionTimeout, WTimeoutError)


class MongoDBStock:
    """The stock in the MongoDB at `url`; see `Stock`.

    :param name: of the database, where the URL names none.
    """

    def __init__(self, url: str, name: str = "cart") -> None:
        self._client: MongoClient[dict[str, Any]] = MongoClient(
            url, timeoutMS=int(TIMEOUT * 1000), retryWrites=False, w="majority", tz_aware=True
        )
        database = self._client.get_default_database(name)
        self._shelf, self._orders = database["shelf"], database["orders"]

    def fill(self, goods: Mapping[str, int]) -> None:
        for sku, pieces in goods.items():
            fresh = {"left": pieces, "held": []}
            self._ask(self._shelf.update_one, {"_id": sku}, {"$setOnInsert": fresh}, True)
        self._ask(self._orders.create_index, "until", expireAfterSeconds=int(MEMORY))

    def left(self) -> dict[str, int]:
        found = self._ask(lambda: list(self._shelf.find({}, {"left": 1})))
        return {product["_id"]: product["left"] for product in found}

    def hold(self, number: str, lines: Mapping[str, int]) -> Order:
        self._tidy()
        until = _now() + timedelta(seconds=HOLD)
        order = self._open(number, {"lines": list(lines.items()), "state": "open", "until": until})
        if order["state"] == "open":
            short = [sku for sku, pieces in order["lines"] if not self._take(order, sku, pieces)]
            left = self.left() if short else {}
            # Only a whole order can be sold; an order that was closed in between takes nothing.
            self._move(number, "open", "closed" if short else "held")
            order = self._find(number)
            if short and order["state"] == "closed":
                self._put_back(order)
                raise SoldOut({sku: left.get(sku, 0) for sku in short})
        if order["state"] == "closed":
            self._put_back(order)
            raise OrderClosed
        return Order(number, dict(order["lines"]), order["state"] == "sold")

    def sell(self, number: str) -> None:
        if not self._move(number, "held", "sold", {"until": {"$gt": _now()}}):
            order = self._find(number)
            if order is None or order["state"] != "sold":
                raise OrderClosed

    def give_up(self, number: str) -> None:
        for state in ("open", "held"):
            self._move(number, state, "closed")
        order = self._find(number)
        if order is not None and order["state"] == "closed":
            self._put_back(order)

    def close(self) -> None:
        self._client.close()

    def _open(self, number: str, fresh: dict[str, Any]) -> dict[str, Any]:
        """The order of this number, or `fresh` if there is no such order yet."""
        try:
            return self._ask(  # type: ignore[no-any-return]  # a document
                self._orders.find_one_and_update,
                {"_id": number},
                {"$setOnInsert": fresh},
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:  # a second click, in the same moment
            return self._find(number)  # type: ignore[no-any-return]

    def _take(self, order: dict[str, Any], sku: str, pieces: int) -> bool:
        """Take one line off the shelf, once however often it is called."""
        number = order["_id"]
        hold = {"order": number, "pieces": pieces, "until": order["until"]}
        taken = self._ask(
            self._shelf.find_one_and_update,
            {"_id": sku, "left": {"$gte": pieces}, "held.order": {"$ne": number}},
            {"$inc": {"left": -pieces}, "$push": {"held": hold}},
        )
        return bool(taken or self._ask(self._shelf.find_one, {"_id": sku, "held.order": number}))

    def _put_back(self, order: dict[str, Any]) -> None:
        for sku, pieces in order["lines"]:
            self._ask(
                self._shelf.find_one_and_update,
                {"_id": sku, "held.order": order["_id"]},
                {"$inc": {"left": pieces}, "$pull": {"held": {"order": order["_id"]}}},
            )

    def _tidy(self) -> None:
        """Bring to an end what others left: over its time, or sold."""
        now = _now()
        late = {"held.until": {"$lte": now}}
        holds = [
            hold
            for each in self._ask(lambda: list(self._shelf.find(late)))
            for hold in each["held"]
        ]
        for number in {hold["order"] for hold in holds if hold["until"] <= now}:
            self.give_up(number)
            if self._find(number)["state"] == "sold":
                forget = {"$pull": {"held": {"order": number}}}
                self._ask(self._shelf.update_many, {"held.order": number}, forget)

    def _move(
        self, number: str, state: str, to: str, condition: Mapping[str, Any] | None = None
    ) -> bool:
        """Bring an order from one state to the next; False where it is in another."""
        which = {"_id": number, "state": state, **(condition or {})}
        moved = self._ask(self._orders.find_one_and_update, which, {"$set": {"state": to}})
        return moved is not None

    def _find(self, number: str) -> Any:
        return self._ask(self._orders.find_one, {"_id": number})

    def _ask(self, command: Any, *arguments: Any, **options: Any) -> Any:
        return persistently(lambda: command(*arguments, **options), FAILURES)


def _now() -> datetime:
    return datetime.now(UTC)
