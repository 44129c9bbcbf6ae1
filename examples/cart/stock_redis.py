"""The stock in Redis. A script runs alone in the server, so it may look first and take then.

`{stock}left` is a hash of pieces by SKU. `{stock}held` has the orders that wait for their payment,
by the time when their wait is over. `{stock}order:NUMBER` is a hash of an order's pieces by SKU,
and its state. The braces keep them together in a cluster.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .stock import HOLD, MEMORY, TIMEOUT, Order, OrderClosed, SoldOut, persistently

HERE = Path(__file__).parent
STATE = "#state"


class RedisStock:
    """The stock in the Redis at `url`; see `Stock`.

    :param prefix: what the names of its keys begin with.
    """

    def __init__(self, url: str, prefix: str = "cart:") -> None:
        # The client's own retries are off: ours wait between the tries, and come to an end.
        self._redis = Redis.from_url(
            url,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._name = f"{prefix}{{stock}}"
        self._hold, self._sell, self._give_up = (
            self._redis.register_script((HERE / f"{name}.lua").read_text(encoding="utf-8"))
            for name in ("hold", "sell", "give_up")
        )

    def fill(self, goods: Mapping[str, int]) -> None:
        for sku, pieces in goods.items():
            self._ask(self._redis.hsetnx, f"{self._name}left", sku, pieces)

    def left(self) -> dict[str, int]:
        found = self._ask(self._redis.hgetall, f"{self._name}left")
        return {sku: int(pieces) for sku, pieces in found.items()}

    def hold(self, number: str, lines: Mapping[str, int]) -> Order:
        overdue = self._ask(self._redis.zrangebyscore, f"{self._name}held", 0, time.time())
        for late in overdue:
            self.give_up(late)
        wanted = [part for line in lines.items() for part in line]
        state, *rest = self._run(
            self._hold, number, time.time() + HOLD, int(MEMORY), number, *wanted
        )
        found = {sku: int(pieces) for sku, pieces in zip(rest[::2], rest[1::2], strict=True)}
        if state == "short":
            raise SoldOut(found)
        if state == "closed":
            raise OrderClosed
        return Order(number, found, state == "sold")

    def sell(self, number: str) -> None:
        if self._run(self._sell, number, number, time.time()) != "sold":
            raise OrderClosed

    def give_up(self, number: str) -> None:
        self._run(self._give_up, number, number)

    def close(self) -> None:
        self._redis.close()

    def _run(self, script: Any, number: str, *arguments: Any) -> Any:
        keys = [f"{self._name}left", f"{self._name}held", f"{self._name}order:{number}"]
        return self._ask(script, keys, arguments)

    def _ask(self, command: Any, *arguments: Any) -> Any:
        failures = (RedisConnectionError, RedisTimeoutError)
        return persistently(lambda: command(*arguments), failures)
