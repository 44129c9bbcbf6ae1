"""Converts a store's errors to gRPC statuses and back, without loss.

A status alone proves nothing, since gRPC itself and proxies use the same codes. So each error is
also sent as an ``Error`` in a trailer, and a status without one counts as an outage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc

from ..errors import (
    CutOff,
    Gone,
    KeyTaken,
    LeaseLost,
    LogoutUnconfirmed,
    QueueFull,
    Stale,
    StoreError,
    StoreUnavailable,
    UnreadableRecord,
)
from . import gsession_pb2 as pb

ERROR_KEY = "gsession-error-bin"  # the key of the trailer with an ``Error``

_CODES: dict[type[StoreError], grpc.StatusCode] = {
    KeyTaken: grpc.StatusCode.ALREADY_EXISTS,
    Gone: grpc.StatusCode.NOT_FOUND,
    Stale: grpc.StatusCode.ABORTED,
    LeaseLost: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnreadableRecord: grpc.StatusCode.DATA_LOSS,
    LogoutUnconfirmed: grpc.StatusCode.UNAVAILABLE,
    CutOff: grpc.StatusCode.UNAVAILABLE,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
}
_MAKERS: dict[str, Callable[[pb.Error], StoreError]] = {
    "KeyTaken": lambda error: KeyTaken(),
    "Gone": lambda error: Gone(),
    "Stale": lambda error: Stale(),
    "LeaseLost": lambda error: LeaseLost(),
    "QueueFull": lambda error: QueueFull(),
    "UnreadableRecord": lambda error: UnreadableRecord(error.reason, error.detail),
    "LogoutUnconfirmed": lambda error: LogoutUnconfirmed(error.detail),
    "CutOff": lambda error: CutOff(error.detail, error.retry_after or 1),
    "StoreUnavailable": lambda error: StoreUnavailable(
        error.detail,
        error.retry_after or 1,
        # An open circuit breaker on the other side says nothing about the session server itself.
        contention=error.contention or not error.asked,
    ),
}


def status_of(error: StoreError) -> tuple[grpc.StatusCode, str, pb.Error]:
    """The code, the details and the trailer for an error that a store raised."""
    kind = next(kind for kind in type(error).__mro__ if kind in _CODES or kind is StoreError)
    if kind is StoreError:  # from a third-party store
        kind, error = StoreUnavailable, StoreUnavailable(f"{type(error).__name__}: {error}")
    message = pb.Error(kind=kind.__name__, detail=getattr(error, "detail", ""))
    if isinstance(error, UnreadableRecord):
        message.reason = error.reason
    if isinstance(error, StoreUnavailable):
        wait = error.retry_after
        message.retry_after = wait if isinstance(wait, int) else 1
        message.contention, message.asked = error.contention, error.asked
    return _CODES[kind], message.detail or kind.__name__, message


def error_in(trailers: Iterable[tuple[str, Any]] | None) -> StoreError | None:
    """The error that a server's store raised; None if the trailers hold no such error."""
    for key, value in trailers or ():
        if key == ERROR_KEY:
            try:
                error = pb.Error.FromString(value)
            except Exception:  # the decoder's errors have no base class of their own
                return None
            make = _MAKERS.get(error.kind)
            return None if make is None else make(error)
    return None
