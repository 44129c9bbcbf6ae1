"""Failures of a command: whether to send it again, and which error or reply the call ends with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...errors import StoreUnavailable, UnreadableRecord
from ..interrupts import reraise_interruption
from .pool import AllInUse, described, hint

T = TypeVar("T")

_WRONG_TYPE = "not a string"
_RETRY_PAUSE = 0.02  # seconds
# A repeat may get these replies although the first attempt was applied, if another request has
# written or rotated the session since, or if there is nothing left to delete.
_OVERTAKEN = (b"S", b"T", b"L", b"G")
_DELETED = (b"D", b"N")
# Temporary errors, while a server starts or the topology changes.
_PASSING = (ReadOnlyError, BusyLoadingError, AskError, TryAgainError, ClusterDownError)


class Failures:
    """The failures of one call, which repeats its command at most ``retries`` times.

    ``in_doubt``: whether an attempt may have been applied, although its reply was lost.
    """

    def __init__(self, retries: int, deadline: float) -> None:
        self.in_doubt = False
        self._retries = retries
        self._deadline = deadline
        self._count = 0
        self._refused = self._has_source = False

    def next_request(
        self, error: Exception, request: bytes, with_source: Callable[[], bytes] | None
    ) -> bytes:
        """Return the command to send after ``error``, once it is time to send it.

        Raises ``UnreadableRecord`` if the stored record is unreadable, and ``StoreUnavailable`` if
        a repeat is useless or there is no time left for one.
        """
        if isinstance(error, NoScriptError) and with_source and not self._has_source:
            self._has_source = True
            return with_source()
        if isinstance(error, UnreadableRecord):  # the connection may have been out of step
            if self._refused:
                raise error
            self._refused = self.in_doubt = True
            return request
        if isinstance(error, (AuthenticationError, ResponseError)):
            if str(error).startswith("WRONGTYPE"):
                raise UnreadableRecord("corrupt", _WRONG_TYPE) from None
            if not isinstance(error, _PASSING):
                raise _unavailable(request, error) from error
        else:
            reraise_interruption(error)
            if not isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError)):
                raise _unavailable(request, error) from error
            self.in_doubt = True
        pause = _RETRY_PAUSE * self._count  # 0 at first: the connection may have been idle too long
        if self._count == self._retries or time.monotonic() + pause >= self._deadline:
            raise _unavailable(request, error) from error
        self._count += 1
        time.sleep(pause)
        return request

    def reply_of_call(self, reply: T) -> T:
        """Return the reply of the call, by the reply to its last attempt.

        Raises ``StoreUnavailable`` if an earlier attempt may have been applied and overwritten.
        """
        if self.in_doubt and reply in _OVERTAKEN:
            raise StoreUnavailable("redis: a reply was lost, and another write followed")
        if self.in_doubt and reply in _DELETED:
            return cast(T, b"K")  # the deleted record is unknown
        return reply


def raise_explained(error: UnreadableRecord | StoreUnavailable, rights: str) -> NoReturn:
    """Raise the error of a script, with the rights that the user lacks, if any."""
    if isinstance(error, StoreUnavailable):
        if rights:
            raise StoreUnavailable(f"{error.detail} (the user lacks {rights})") from error
    elif error.detail != _WRONG_TYPE:  # the server answered twice with something else
        raise StoreUnavailable(f"redis: {error.detail}") from None
    raise error


def _unavailable(request: bytes, error: Exception) -> StoreUnavailable:
    name, advice = request.split(b"\r\n", 3)[2].decode(), hint(error)
    return StoreUnavailable(
        f"redis: {name}: {described(error)}{advice}",
        contention=isinstance(error, AllInUse),
    )
