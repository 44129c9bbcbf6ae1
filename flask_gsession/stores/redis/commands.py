"""One command to Redis at a time: retries, answers that got mixed up, replicas, lost servers."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar, cast

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...errors import (
    Gone,
    KeyTaken,
    LeaseLost,
    QueueFull,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ..base import Record, milliseconds
from ..interrupts import reraise_interruption
from ..support import StoreOptions, count_round_trip, deadline
from .layout import Names
from .pool import AllInUse, Node, hint, packed, said

T = TypeVar("T")

_STATUSES = (b"K", b"G", b"S", b"T", b"P", b"N", b"L", b"F", b"W", b"D", b"R")
_ERRORS = {b"G": Gone, b"D": Gone, b"S": Stale, b"T": KeyTaken, b"L": LeaseLost, b"F": QueueFull}
# Replies that a repeat may get although its first try was applied: others wrote since then, or
# rotated the session, or there is nothing left to delete.
_OVERTAKEN = (b"S", b"T", b"L", b"G")
_DELETED = (b"D", b"N")
_WRITE_SOMETHING = b"redis.call('SET', KEYS[1], '', 'PX', 1) return redis.call('DEL', KEYS[1])"
_WRONG_TYPE = "not a string"
_RETRY_PAUSE = 0.02  # seconds
_ASKING = packed(b"ASKING")
# Temporary errors, while a server starts or the topology changes.
_PASSING = (ReadOnlyError, BusyLoadingError, AskError, TryAgainError, ClusterDownError)


class Script:
    """A Lua script of this folder, and the SHA-1 under which servers know it."""

    def __init__(self, name: str) -> None:
        self.of(files(__package__).joinpath(f"{name}.lua").read_bytes())

    def of(self, source: bytes) -> None:
        self.source = source
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def lacked(self, error: str) -> str:
        """The right that the user lacks. Redis only names the line, which may need two rights."""
        line = re.search(r"@user_script: ?(\d+)", error)
        if line is None or "can't run this command" not in error:
            return ""
        calls = self.source.decode().splitlines()[int(line[1]) - 1]
        return " or ".join(f"+{name.lower()}" for name in re.findall(r"call\('(\w+)'", calls))


class Confirmation:
    """Whether ``replicas`` have the end of a session; ``missing`` says why too few have it."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.missing = ""

    def ask(self, slot: Any, name: bytes, answer: Any, again: bool, deadline: float) -> None:
        """Wait until the replicas have confirmed the write, with Redis' ``WAIT``.

        It covers all writes of this connection so far. A call that had nothing to do, or that
        repeats a write of another connection, has written nothing.
        """
        status = answer[:1]
        if status not in (b"K", b"N", b"D" if again else b"N"):
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
            self.missing = f"redis: WAIT: {said(error)}"


class Commands:
    """Sends commands over ``pool``, each within the time of one call of the store.

    ``retries``: how often a command is sent again that may not have been served.
    """

    def __init__(self, pool: Any, options: StoreOptions, retries: int = 3) -> None:
        self.pool = pool
        self.clock = options.clock
        self.timeout = options.timeout
        #: returns when a call that begins now has to end
        self.deadline: Callable[[], float] = partial(deadline, options.timeout)
        self.names = Names(options.prefix)
        self.retries = retries

    def now(self) -> int:
        """The time in milliseconds."""
        return milliseconds(self.clock)

    def now_text(self) -> bytes:
        """The same as scripts take it."""
        return b"%d" % int(self.clock() * 1000)

    def life(self, record: Record) -> bytes:
        """The milliseconds to keep the record for, at least 1."""
        return b"%d" % max(1, record.idle_expires_at - int(self.clock() * 1000))

    def servers(self) -> dict[bytes, str]:
        """The address of each server that holds sessions, by a name that it stores."""
        return {b"": ""}

    def nodes(self, deadline: float) -> list[Node]:
        """The servers that have our keys."""
        return [Node(0, self.pool, lambda: None)]

    def run(
        self,
        deadline: float,
        script: Script,
        keys: list[bytes],
        arguments: list[bytes],
        echo: bytes = b"",
        confirmation: Confirmation | None = None,
        also: bytes | None = None,
    ) -> bytes:
        """Run a script; its first answering byte says how it went.

        A success must end with ``echo``, such as the written version, or equal ``also``. That
        detects a reply to another command. Then replicas are asked for their ``confirmation``.
        """

        def parse(reply: Any) -> bytes:
            if type(reply) is bytes:
                status = reply[:1]
                if status in _ERRORS or (status in _STATUSES and reply.endswith(echo)):
                    return reply
                if reply == also:
                    return reply
            raise UnreadableRecord("corrupt", "reply to another command")

        parts = (b"%d" % len(keys), *keys, *arguments)
        try:
            reply = self.call(
                deadline,
                parse,
                keys[0],
                packed(b"EVALSHA", script.sha, *parts),
                lambda: packed(b"EVAL", script.source, *parts),
                confirmation,
            )
        except UnreadableRecord as error:
            if error.detail == _WRONG_TYPE:
                raise
            raise StoreUnavailable(f"redis: {error.detail}") from None
        except StoreUnavailable as error:
            rights = script.lacked(error.detail)
            if not rights:
                raise
            raise StoreUnavailable(f"{error.detail} (the user lacks {rights})") from error
        if reply in _ERRORS:
            raise _ERRORS[reply]
        return reply

    def call(
        self,
        deadline: float,
        parse: Callable[[Any], T],
        name: bytes,
        request: bytes,
        with_source: Callable[[], bytes] | None = None,
        confirmation: Confirmation | None = None,
    ) -> T:
        """Send one command and return its parsed reply, before ``deadline``.

        ``name`` is the key of the command. ``with_source`` makes the same command with the source
        of the script, for a server that doesn't know it. If ``parse`` refuses the reply, the
        command is repeated on another connection, since this one may be out of step. That is safe:
        every command here recognises its own earlier effect.
        If another writer came in between, a repeat can't distinguish a write that was applied and
        overwritten from one that was never applied: that raises ``StoreUnavailable`` too.
        """
        tries = 0
        refused = in_doubt = False
        while True:
            try:
                answer = self.attempt(name, request, parse, deadline, confirmation, in_doubt)
                if in_doubt and answer in _OVERTAKEN:
                    raise StoreUnavailable("redis: an answer was lost, then another write came")
                if in_doubt and answer in _DELETED:
                    answer = cast(T, b"K")  # the deleted record is unknown
                return answer
            except NoScriptError:
                if with_source is None:
                    raise
                request, with_source = with_source(), None
                continue
            except UnreadableRecord:
                if refused:
                    raise
                refused = in_doubt = True
                continue
            except (AuthenticationError, ResponseError) as error:
                if str(error).startswith("WRONGTYPE"):
                    raise UnreadableRecord("corrupt", _WRONG_TYPE) from None
                if not isinstance(error, _PASSING):
                    raise _unavailable(request, error) from error
                failure: Exception = error
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                reraise_interruption(error)
                failure = error
                in_doubt = True
            except RedisError as error:
                reraise_interruption(error)
                raise _unavailable(request, error) from error
            pause = _RETRY_PAUSE * tries  # at first none: the connection may have been idle long
            if tries == self.retries or time.monotonic() + pause >= deadline:
                raise _unavailable(request, failure) from failure
            tries += 1
            time.sleep(pause)

    def attempt(
        self,
        name: bytes,
        request: bytes,
        parse: Callable[[Any], T],
        deadline: float,
        confirmation: Confirmation | None,
        again: bool,
        pool: Any = None,  # of any kind, with slots of its own kind
        *,
        asking: bool = False,
    ) -> T:
        if pool is None:
            pool = self.pool
        slot = pool.take(deadline)
        try:
            try:
                if asking:
                    count_round_trip()
                    slot.ask(_ASKING)
                count_round_trip()
                answer = parse(slot.ask(request))
                if confirmation is not None and confirmation.replicas:
                    confirmation.ask(slot, name, answer, again, deadline)
                return answer
            except ReadOnlyError:
                # After a failover: look the primary up again, for every connection.
                slot.connection.disconnect()
                pool.invalidate()
                raise
            except ResponseError:
                raise
            except BaseException as error:
                # Interrupted, or answered with another call's reply: never reuse this connection.
                slot.connection.disconnect()
                timed_out = isinstance(error, TimeoutError)  # the others may be well
                if isinstance(error, (RedisConnectionError, OSError)) and not timed_out:
                    pool.invalidate()
                raise
        finally:
            pool.give(slot)


def unparsed(answer: Any) -> Any:
    """For ``Commands.call``: any answer will do."""
    return answer


def _unavailable(request: bytes, error: Exception) -> StoreUnavailable:
    name, advice = request.split(b"\r\n", 3)[2].decode(), hint(error)
    return StoreUnavailable(
        f"redis: {name}: {said(error)}{advice}",
        contention=isinstance(error, AllInUse),
    )
