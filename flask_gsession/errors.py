"""The errors of Flask-GSession; each says what was wrong and what to do.

::

    GSessionError
    ├── SettingError            a setting or a store URL is wrong (stops the app at init_app)
    ├── ValueRefused            a value cannot be kept in a session
    │   ├── UnsupportedType     ... because of its type
    │   └── SessionTooLarge     ... because of its size, depth or number of keys
    ├── InvalidStoredValue      what is stored under a typed key is not valid
    ├── ValueLost               a large value is not there any more, or was altered
    ├── SchemaFailed            the code of a schema raised something else than ValidationError
    ├── TransactionMisused      something that cannot be done inside a transaction
    ├── LockMisused             a lock in a lock, in a transaction, or on no stored session
    ├── SessionLocked           HTTP 503 with Retry-After: another request holds the lock
    ├── SessionConflict         HTTP 409: parallel requests changed the same thing
    │   ├── SessionEnded        HTTP 409: the session ended while this request ran
    │   └── LockLost            HTTP 409: the lock ran out before its holder was done
    └── StoreError              what a store tells the session
        ├── StoreUnavailable    HTTP 503 with Retry-After: the store did not answer in time
        │   └── LogoutUnconfirmed   ... the session ended, and too few replicas have that yet
        ├── UnreadableRecord    what is stored under the key is not a record of that key
        ├── KeyTaken            create: the key holds a record already
        ├── Gone                save, replace, delete, acquire: no live record under the key
        ├── Stale               save, replace, delete: another version is stored
        ├── LeaseLost           save, replace, delete: the lease that they name is not held
        └── QueueFull           acquire: enough others wait for the lease already

No message holds a session token, a stored value or a password.
"""

from __future__ import annotations

import logging

from werkzeug.exceptions import Conflict, ServiceUnavailable


class GSessionError(Exception):
    """The base of every error this package raises on purpose."""


class SettingError(GSessionError, ValueError):
    """A setting has a value it cannot have; the message names the key and what is allowed."""


class ValueRefused(GSessionError):
    """A value cannot be kept in a session.

    ``path`` says where it is, for example ``session['cart'][0]['price']``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class UnsupportedType(ValueRefused, TypeError):
    """The value, or something inside it, is of a type that would not come back as it was."""


class SessionTooLarge(ValueRefused, ValueError):
    """The session has too many bytes, keys or levels; the stored state is left as it was."""


class InvalidStoredValue(GSessionError, ValueError):
    """What is stored under a typed key with ``invalid="raise"`` is not valid.

    ``key`` is its name, ``reason`` as in ``StoredValueInvalid``, ``messages`` those of marshmallow,
    or None. The message shows neither data nor ``messages``.
    """

    def __init__(self, key: str, reason: str, messages: object = None) -> None:
        super().__init__(f"session[{ascii(key)[:60]}]: {reason}")
        self.key = key
        self.reason = reason
        self.messages = messages


class SchemaFailed(GSessionError, RuntimeError):
    """A validator, or other code of a schema, raised something else than ``ValidationError``.

    The session is not changed. What was raised is the ``__cause__``.
    """


class ValueLost(GSessionError):
    """A large value, or the rest of it, is not in its place any more, or not as it was written.

    ``reason`` as in ``LargeValueLost``. A view meets it only while it reads from what
    ``session.open`` gave: before that, such a value is absent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"a large value is lost: {reason}")
        self.reason = reason


class TransactionMisused(GSessionError, RuntimeError):
    """Inside a transaction: another one, a rotation, a logout, a reload, or a write at once.

    Likewise in the function that ``update_atomic`` calls, which may run again, too. Writes at once
    are ``update_atomic`` and ``take``.
    """


class LockMisused(GSessionError, RuntimeError):
    """A lock that cannot be: inside a lock or what may run again, on a session that is not stored,
    or released by who does not hold it.
    """


class SessionLocked(GSessionError, ServiceUnavailable):
    """Another request holds the lock of this session (HTTP 503).

    ``detail`` says whether the wait ran out or whether too many waited already; the client only
    sees ``description`` and ``Retry-After``.
    """

    description = "Another request is working on this session. Try again shortly."

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(retry_after=retry_after)
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class SessionConflict(GSessionError, Conflict):
    """Parallel requests changed the same session and the changes cannot both stand (HTTP 409).

    Raised for keys whose policy is ``"reject"``, and when a write lost the race too many times.
    """

    description = "Another request changed this session at the same time. Try again."


class SessionEnded(SessionConflict):
    """The session was logged out, revoked or expired while this request ran (HTTP 409)."""

    description = "The session ended while this request ran."


class LockLost(SessionConflict):
    """The lock ran out before its holder was done, as when a process is paused (HTTP 409).

    Somebody else may have worked on the session meanwhile: what was not stored yet is not stored.
    """

    description = "This request took too long, and lost its hold on the session. Try again."


class StoreError(GSessionError):
    """The base of what a store may raise."""


class StoreUnavailable(StoreError, ServiceUnavailable):
    """The store could not be reached, or did not answer within its time (HTTP 503).

    ``detail`` is for logs: which operation failed and how. The client only sees
    ``description`` and ``Retry-After``. ``contention`` says that the store is well, and only
    served others first: that is no reason to leave it alone. ``asked`` is False where the circuit
    breaker left the store alone, which is logged once, and then not as an error for each request.
    """

    description = "The session store is not available at the moment. Try again shortly."

    def __init__(
        self, detail: str, retry_after: int = 1, *, contention: bool = False, asked: bool = True
    ) -> None:
        super().__init__(retry_after=retry_after)
        self.detail = detail
        self.contention = contention
        self.asked = asked

    @property
    def log_level(self) -> int:
        """At which it is logged that a request met this."""
        return logging.ERROR if self.asked else logging.INFO

    def __str__(self) -> str:
        return self.detail


class LogoutUnconfirmed(StoreUnavailable):
    """The session is ended, but too few replicas said in time that they have that (HTTP 503).

    Raised with ``SESSION_LOGOUT_REPLICAS``, by a logout and by a rotation without grace. The
    primary has done it; if that is lost now, a replica that takes over may not know of it.
    """

    description = "The end of the session is not safely stored yet. Try again shortly."

    def __init__(self, detail: str) -> None:
        super().__init__(detail, contention=True)  # the store itself answers


class UnreadableRecord(StoreError):
    """What is stored under a key is not a record of that key that this version can read.

    ``reason`` is ``"corrupt"``, ``"newer format"`` or ``"unknown encryption key"``.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    @property
    def for_others(self) -> bool:
        """Whether a worker of a newer version, or with other keys, may be able to read it."""
        return self.reason in ("newer format", "unknown encryption key")


class KeyTaken(StoreError):
    """``create`` found a record under the key."""


class Gone(StoreError):
    """There is no live record under the key: ended, expired, or rotated away."""


class Stale(StoreError):
    """The stored record has another version than the expected one."""


class LeaseLost(StoreError):
    """The lease that a write names has run out, or is held by somebody else."""


class QueueFull(StoreError):
    """``acquire``: somebody holds the lease, and enough others wait for it."""
