"""The errors of Flask-GSession. Each message names the problem and the solution.

::

    GSessionError
    ├── SettingError            a setting or a store URL is wrong (stops the app at init_app)
    ├── ValueRefused            a session can't store a value
    │   ├── UnsupportedType     ... because of its type
    │   └── SessionTooLarge     ... because of its size, depth or number of keys
    ├── InvalidStoredValue      the stored value of a typed key is invalid
    ├── ValueLost               a large value is gone, or was altered
    ├── SchemaFailed            the code of a schema raised an error other than ValidationError
    ├── TransactionMisused      you can't do this inside a transaction
    ├── RotationRefused         rotation or sign-in where no response can carry a new token
    ├── LockMisused             lock inside a lock or a transaction, or without a stored session
    ├── ConfirmationRequired    HTTP 401: the user must confirm who they are first
    ├── SessionLocked           HTTP 503 with Retry-After: another request holds the lock
    ├── SignInRefused           HTTP 401: the user's sessions were revoked during the sign-in
    ├── NotSignedIn             HTTP 401: nobody is signed in, so there are no user values to change
    ├── TooManySessions         HTTP 409: the user has as many sessions as allowed
    ├── SessionConflict         HTTP 409: parallel requests changed the same thing
    │   ├── SessionEnded        HTTP 409: the session ended while this request ran
    │   └── LockLost            HTTP 409: the lock expired before its holder was done
    ├── PassportRefused         a passport is invalid
    └── StoreError              the errors that a store raises
        ├── StoreUnavailable    HTTP 503 with Retry-After: the store did not answer in time
        │   ├── LogoutUnconfirmed   ... the logout is not confirmed by enough replicas
        │   ├── RevocationUnfinished    ... sessions are being revoked: repeat it
        │   ├── RosterUnreadable    ... a user's roster is damaged, or of a newer version
        │   └── UserValuesUnreadable    ... a user's values need another key or version
        ├── UnreadableRecord    the key holds no valid record
        ├── KeyTaken            create: the key holds a record already
        ├── Gone                save, replace, delete, acquire: no live record under the key
        ├── Stale               save, replace, delete: another version is stored
        ├── LeaseLost           save, replace, delete: the lease they name is not held
        └── QueueFull           acquire: too many others wait for the lease

No message holds a session token, a stored value or a password.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from werkzeug.exceptions import Conflict, ServiceUnavailable, Unauthorized


class GSessionError(Exception):
    """The base of every error this package raises on purpose."""


class SettingError(GSessionError, ValueError):
    """A setting has a wrong value. The message names the key and what is allowed."""


class ValueRefused(GSessionError):
    """A session can't store a value.

    ``path`` says where it is, for example ``session['cart'][0]['price']``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class UnsupportedType(ValueRefused, TypeError):
    """The value, or something inside it, has a type that would not come back unchanged."""


class SessionTooLarge(ValueRefused, ValueError):
    """The session has too many bytes, keys or levels. The stored session is unchanged."""


class InvalidStoredValue(GSessionError, ValueError):
    """A typed key with ``invalid="raise"`` has an invalid stored value.

    ``key`` is its name. ``reason`` is as in the event ``StoredValueInvalid``. ``messages`` are
    marshmallow's, or None. The text of the error shows neither data nor ``messages``.
    """

    def __init__(self, key: str, reason: str, messages: object = None) -> None:
        super().__init__(f"session[{ascii(key)[:60]}]: {reason}")
        self.key = key
        self.reason = reason
        self.messages = messages


class SchemaFailed(GSessionError, RuntimeError):
    """A validator, or other code of a schema, raised something other than ``ValidationError``.

    The session is unchanged. The original error is the ``__cause__``.
    """


class ValueLost(GSessionError):
    """A large value is missing, truncated or altered.

    ``reason`` is as in the event ``LargeValueLost``. A view sees this error only while it reads the
    file from ``session.open``. Everywhere else, such a value is absent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"a large value is lost: {reason}")
        self.reason = reason


class TransactionMisused(GSessionError, RuntimeError):
    """You can't do this inside a transaction, or in the function that ``update_atomic`` calls.

    Either may run again, so neither allows a second transaction, a rotation, a logout or a reload,
    nor ``update_atomic`` and ``take``, which write at once. Do these before or after.
    """


class RotationRefused(GSessionError, RuntimeError):
    """Code tried to rotate a session from ``ext.open()``, or to sign a user in to it.

    No response can carry the new token there, so the session would be lost to its visitor. Rotate
    it, and sign users in, in an ordinary view. ``session.confirm()`` raises it in a socket handler,
    too.
    """


class LockMisused(GSessionError, RuntimeError):
    """A lock was requested where none can be taken, or released where it isn't held.

    You can't take a lock inside a lock, inside a transaction or the function of ``update_atomic``
    (which may run again), or on a session that isn't stored.
    """


class ConfirmationRequired(GSessionError, Unauthorized):
    """The user must confirm their identity first, for example with a password (HTTP 401).

    ``max_age``: the maximum age of a confirmation, in seconds. ``methods``: the accepted methods;
    empty for any method. ``signed_in`` is False if the request has no session. The response has the
    ``challenge`` of RFC 9470 for API clients: ``WWW-Authenticate: Bearer
    error="insufficient_user_authentication", max_age="600"``, with the methods as ``acr_values``.
    """

    description = "Confirm your identity to continue."

    def __init__(
        self, max_age: int, methods: Collection[str] = (), *, signed_in: bool = True
    ) -> None:
        super().__init__()
        self.max_age = max_age
        self.methods = tuple(methods)
        self.signed_in = signed_in

    @property
    def challenge(self) -> str:
        """``WWW-Authenticate``; without a session there is no error code (RFC 6750, 3.1)."""
        parts = []
        if self.signed_in:
            parts.append('error="insufficient_user_authentication"')
            parts.append('error_description="More recent authentication is required"')
        parts.append(f'max_age="{self.max_age}"')
        if self.methods:
            parts.append(f'acr_values="{" ".join(self.methods)}"')
        return f"Bearer {', '.join(parts)}"

    def get_headers(self, *arguments: Any, **keywords: Any) -> list[tuple[str, str]]:
        """The headers of the response, with the challenge."""
        headers = super().get_headers(*arguments, **keywords)
        return [*headers, ("WWW-Authenticate", self.challenge)]


class SessionLocked(GSessionError, ServiceUnavailable):
    """Another request holds the lock of this session (HTTP 503).

    ``detail`` says whether the wait was over or too many were waiting. The client only sees
    ``description`` and ``Retry-After``.
    """

    description = "Another request is working on this session. Try again shortly."

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(retry_after=retry_after)
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class SignInRefused(GSessionError, Unauthorized):
    """The user's sessions were revoked while this sign-in ran (HTTP 401). Sign in again."""

    description = "You were signed out while you signed in. Sign in again."


class NotSignedIn(GSessionError, Unauthorized):
    """A view wrote to ``session.shared``, but the session isn't bound to a user (HTTP 401).

    Bind the session first. Or use a ``SessionKey`` with ``scope="user"``: it keeps its value in the
    session until the sign-in.
    """

    description = "Sign in first."


class TooManySessions(GSessionError, Conflict):
    """The user has ``SESSION_MAX_PER_USER`` sessions, and the policy is "refuse" (HTTP 409)."""

    description = "You are signed in on as many devices as allowed. Sign out on one of them."


class SessionConflict(GSessionError, Conflict):
    """Parallel requests changed the same session, and the changes can't be merged (HTTP 409).

    Raised for a key whose policy is ``"reject"``, for a write that lost too many races, and for an
    interrupted write of unknown outcome that another request has written over.
    """

    description = "Another request changed this session at the same time. Try again."


class SessionEnded(SessionConflict):
    """The session was logged out, revoked or expired while this request ran (HTTP 409).

    ``ext.open()`` also raises it if the session had ended before.
    """

    description = "The session ended while this request ran."


class LockLost(SessionConflict):
    """The lock expired before its holder was done, for example in a paused process (HTTP 409).

    Another request may have changed the session since, so the changes of the block are not stored.
    """

    description = "This request took too long, and lost its hold on the session. Try again."


class PassportRefused(GSessionError, ValueError):
    """A passport is invalid.

    ``reason``: ``"not signed by a known key"``, ``"not a passport"``, ``"another issuer"``,
    ``"another audience"``, ``"from the future"``, ``"expired"`` or ``"replayed"``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreError(GSessionError):
    """The base of the errors that a store may raise."""


class StoreUnavailable(StoreError, ServiceUnavailable):
    """The store could not be reached, or did not answer in time (HTTP 503).

    ``detail`` is for logs: which operation failed, and how. The client only sees ``description``
    and ``Retry-After``. ``contention`` says that the store is healthy, but served others first:
    such a failure doesn't open the circuit breaker. ``asked`` is False if an open circuit breaker
    stopped the call. That is logged once as an error, and not again for each request.
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
        """The level at which a request that met this error logs it."""
        return logging.ERROR if self.asked else logging.INFO

    def __str__(self) -> str:
        return self.detail


class CutOff(StoreUnavailable):
    """An edge node that can't reach its centre can't do this alone (HTTP 503).

    ``detail`` says what the node can't do, and what you can do. The centre was not asked.
    """

    description = (
        "This site has no connection to its centre at the moment, and can't do this without it. "
        "Try again later."
    )

    def __init__(self, detail: str, retry_after: int = 5) -> None:
        super().__init__(detail, retry_after, asked=False)


class LogoutUnconfirmed(StoreUnavailable):
    """The session has ended, but too few replicas confirmed it in time (HTTP 503).

    With ``SESSION_LOGOUT_REPLICAS``, a logout and a rotation without grace raise this. The primary
    has ended the session. If the primary is lost now, the replica that takes over may still hold
    the session.
    """

    description = "The end of the session is not safely stored yet. Try again shortly."

    def __init__(self, detail: str) -> None:
        super().__init__(detail, contention=True)  # the store itself answers


class RevocationUnfinished(StoreUnavailable):
    """Sessions of a user are being revoked, but not all of them have ended yet (HTTP 503).

    It is safe to repeat. Otherwise the next sign-in of the user, or the next use of one of the
    sessions, finishes it.
    """

    description = "Not all sessions have ended yet. Try again shortly."


class RosterUnreadable(StoreUnavailable):
    """A user's roster is damaged, or was written by a newer version (HTTP 503).

    The user's sessions are neither served on trust nor ended. ``ext.users.rebuild`` repairs a
    damaged roster.
    """

    description = "The list of your sessions can't be read. Try again later."

    def __init__(self, detail: str, *, for_others: bool = False) -> None:
        super().__init__(detail, contention=True)  # the store itself answers
        #: whether a worker of a newer version, or with other keys, may be able to read it
        self.for_others = for_others


class UserValuesUnreadable(StoreUnavailable):
    """The values of a user can't be read, so they can't be changed either (HTTP 503).

    They need another encryption key, or a newer version. Damaged values don't raise this: they
    count as absent.
    """

    description = "Your stored values can't be read. Try again later."

    def __init__(self, detail: str) -> None:
        super().__init__(detail, contention=True)  # the store itself answers


class UnreadableRecord(StoreError):
    """The key holds something that isn't a record of that key, or that this version can't read.

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
    """``create`` found a live record under the key."""


class Gone(StoreError):
    """There is no live record under the key: ended, expired, or rotated away."""


class Stale(StoreError):
    """The version of the stored record isn't the expected one."""


class LeaseLost(StoreError):
    """The lease that a write names has expired, or has another owner."""


class QueueFull(StoreError):
    """``acquire``: another owner holds the lease, and too many wait for it."""
