"""Asks replicas to confirm that they have received the end of a session."""

from __future__ import annotations

import time
from typing import Any

from redis.exceptions import RedisError

from ..interrupts import reraise_interruption
from ..support import count_round_trip
from .commands import packed
from .pool import described

_WRITE_SOMETHING = b"redis.call('SET', KEYS[1], '', 'PX', 1) return redis.call('DEL', KEYS[1])"


class Confirmation:
    """Asks whether enough ``replicas`` have a write. If not, ``missing`` says why."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.missing = ""

    def ask(self, slot: Any, name: bytes, reply: Any, again: bool, deadline: float) -> None:
        """Wait with Redis' ``WAIT`` until the replicas have confirmed the write.

        ``WAIT`` covers the earlier writes of its own connection. A call that had nothing to do, or
        that repeated a write of another connection, wrote nothing there. So this first writes a
        short-lived key.
        """
        status = reply[:1]
        if not self.replicas or status not in (b"K", b"N", b"D" if again else b"N"):
            return
        span = b"%d" % max(1, int((deadline - time.monotonic()) * 800))
        self.missing = ""
        try:
            if again or status != b"K":
                count_round_trip()
                slot.ask(packed(b"EVAL", _WRITE_SOMETHING, b"1", name + b":wait"))
            count_round_trip()
            confirmed = slot.ask(packed(b"WAIT", b"%d" % self.replicas, span))
            if type(confirmed) is not int or confirmed < self.replicas:
                why = f"{confirmed} of {self.replicas} replicas answered in time"
                self.missing = f"redis: WAIT: {why}"
        except (RedisError, OSError) as error:
            slot.connection.disconnect()
            reraise_interruption(error)
            self.missing = f"redis: WAIT: {described(error)}"
