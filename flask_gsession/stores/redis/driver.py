"""Differences between the versions of redis-py: 5.0 is the oldest that works."""

from __future__ import annotations

import inspect
import select
from collections.abc import Mapping
from typing import Any

import redis

from ...errors import SettingError

_OLDEST = (5, 0)
_BROKEN = {"8.0.0": "it can't poll connections with a file descriptor of 1024 or more"}


def check_version(version: str) -> None:
    """Raise ``SettingError`` if this version of redis-py doesn't work."""
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if number >= _OLDEST and version not in _BROKEN:
        return
    why = f": {_BROKEN[version]}" if version in _BROKEN else ""
    raise SettingError(
        f"SESSION_STORE uses Redis, but redis-py {version} doesn't work{why}. Allowed: 5.0 or "
        f"newer, except {', '.join(_BROKEN)}. Run: pip install --upgrade 'flask-gsession[redis]'"
    )


check_version(redis.__version__)

from redis.connection import AbstractConnection, ConnectionPool  # noqa: E402  # after the check
from redis.exceptions import (  # noqa: E402
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402
from redis.sentinel import SentinelManagedConnection  # noqa: E402

_TRIES = 10  # to get a connection
_TOPOLOGY_ERRORS = {
    "ASK": AskError,
    "CLUSTERDOWN": ClusterDownError,
    "MASTERDOWN": MasterDownError,
    "MOVED": MovedError,
    "TRYAGAIN": TryAgainError,
}

#: Whether a new connection calls ``on_connect_check_health``, not only ``on_connect``.
HAS_HEALTH_HOOK = hasattr(AbstractConnection, "on_connect_check_health")  # from 6.0 on
_CAN_SKIP_CHECK = hasattr(AbstractConnection, "connect_check_health")  # from 6.0 on
_TAKES_TIMEOUT = "timeout" in inspect.signature(AbstractConnection.read_response).parameters  # 8.0
_HIREDIS: Any = vars(redis.connection).get("hiredis")  # where it is installed
#: Messages that the server pushes with RESP3. Before 6.2, the parser returns them as replies.
PUSHED: Any = getattr(_HIREDIS, "PushNotification", ())  # hiredis 3.2
#: Whether the driver's own pools hand out closed connections: 8.0.1 with hiredis.
LENDS_CLOSED = redis.__version__.startswith("8.0.")
_NAMES_COMMAND = (  # before 5.3
    inspect.signature(ConnectionPool.get_connection).parameters["command_name"].default
    is inspect.Parameter.empty
)


def as_driver_error(answer: Any) -> Any:
    """The reply, with a server error converted to the driver's class for it.

    Before 6.0, only connections of the driver's cluster client converted topology errors.
    """
    if type(answer) is ResponseError:
        code, _, rest = str(answer).partition(" ")
        kind = _TOPOLOGY_ERRORS.get(code)
        if kind is not None:
            return kind(rest)
    return answer


def check_client(connection_options: Mapping[str, Any]) -> None:
    """Raise ``SettingError`` if the client would mistake pushed messages for replies."""
    if _HIREDIS is not None and not PUSHED and str(connection_options.get("protocol")) == "3":
        raise SettingError(
            "The Redis client uses RESP3 (protocol=3), for which hiredis "
            f"{_HIREDIS.__version__} mixes up replies. Create the client with protocol=2, or "
            "install hiredis 3.2 or newer: pip install --upgrade 'flask-gsession[redis]'"
        )


def connect(connection: Any) -> None:
    """Connect without a health check."""
    if _CAN_SKIP_CHECK and not isinstance(connection, SentinelManagedConnection):
        connection.connect_check_health(check_health=False)
    else:
        connection.connect()


def lend(pool: Any) -> Any:
    """Get a connection from a pool of the driver's own; release it afterwards.

    Before 6.2, a pool refuses a connection that received a pushed message while it connected: try
    another one.
    """
    for _ in range(_TRIES):
        try:
            return pool.get_connection("_") if _NAMES_COMMAND else pool.get_connection()
        except RedisConnectionError as error:
            if str(error) != "Connection not ready":
                raise
            failure = error
    raise failure


def read_within(connection: Any, seconds: float, **options: Any) -> Any:
    """Read a reply as bytes. ``seconds``: the longest wait for each piece of it."""
    if _TAKES_TIMEOUT:
        return connection.read_response(disable_decoding=True, timeout=seconds, **options)
    socket = connection._sock
    socket.settimeout(seconds)
    try:
        return connection.read_response(disable_decoding=True, **options)
    finally:
        if connection._sock is socket:
            socket.settimeout(connection.socket_timeout)


def is_closed_or_unread(connection: Any) -> bool:
    """Whether the server has closed an idle connection, or sent something that is still unread.

    Versions of the driver differ in the result of ``can_read`` for a closed connection.
    """
    socket = connection._sock
    if socket is None:
        return False
    if hasattr(socket, "pending") and socket.pending():  # decrypted already
        return True
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))
