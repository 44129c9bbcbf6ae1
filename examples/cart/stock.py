"""The stock, in the server that keeps the sessions: held for an order, then sold or given up.

An order has a number before it reaches the stock. Each step names it, is atomic in the server, and
may be repeated: after a lost answer, ask again, and nothing is taken twice.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

HOLD = 15 * 60.0  # seconds in which an order must be paid, or its goods go back
MEMORY = 30 * 86400.0  # seconds for which the number of an order is remembered
TIMEOUT = 1.0  # seconds for one step
ATTEMPTS = 5


class SoldOut(Exception):
    """There is less than was ordered; `left` says what there is, by SKU. Nothing was taken."""

    def __init__(self, left: Mapping[str, int]) -> None:
        super().__init__(", ".join(f"{sku}: {pieces} left" for sku, pieces in left.items()))
        self.left = left


class OrderClosed(Exception):
    """It was given up, or not paid in time: its goods went back. A new order needs a new number."""


class TooManyRetries(Exception):
    """The stock did not answer, however often it was asked. The same order may be sent again."""


class Order(NamedTuple):
    """Pieces by SKU that belong to one order: held for it, or sold."""

    number: str
    lines: dict[str, int]
    sold: bool


class Stock(Protocol):
    """Each step raises `TooManyRetries` when it could not be done, or it is not known whether."""

    def fill(self, goods: Mapping[str, int]) -> None:
        """Put goods on the shelf that were never there."""

    def left(self) -> dict[str, int]:
        """How many pieces are free, by SKU."""

    def hold(self, number: str, lines: Mapping[str, int]) -> Order:
        """Set all of `lines` aside for `HOLD` seconds, or nothing.

        What is held or sold under this number already is returned as it is. Raises `SoldOut`, after
        which the number is closed, and `OrderClosed`.
        """

    def sell(self, number: str) -> None:
        """Sell the held pieces for good. Raises `OrderClosed` if they are not held any more."""

    def give_up(self, number: str) -> None:
        """Put the held pieces back. A sold order stays."""

    def close(self) -> None:
        """Release the connections."""


def persistently(step: Callable[[], T], failures: tuple[type[Exception], ...]) -> T:
    """The result of `step`, tried again after random pauses, each up to twice as long."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
        try:
            return step()
        except failures as error:
            failure = error
    raise TooManyRetries from failure
