"""``SessionData``: the object behind ``flask.session``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping, Sequence, ValuesView
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, NoReturn

from flask import Flask, Request, has_request_context
from flask.sessions import SessionMixin

from ..errors import (
    LogoutUnconfirmed,
    NotSignedIn,
    RotationRefused,
    SessionEnded,
    UnreadableRecord,
    UnsupportedType,
    ValueLost,
)
from ..repository.permanent import PERMANENT
from ..repository.repository import Repository
from ..values.codec import is_valid_text
from ..values.large_values import ValueReader, reader_of
from ..values.marks import PLAIN, Mark, marked, split
from ..values.merge import MergeFunction, encode_within
from ..values.references import reference_in, refers
from .checks import call_retried, check_not_in_retried_code, check_store
from .confirming import (
    SIGN_IN,
    checked_method,
    checked_methods,
    confirmed_at,
    note_confirmation,
    report_confirmation,
)
from .durations import grace_in_seconds, lifetime_in_milliseconds, ttl_in_milliseconds
from .ending import destroy, refuse
from .joining import join_early, signs_in
from .large import SessionLargeValues
from .lifecycle import CONFIRMED, ONE_KEY, Lifecycle
from .loading import load, open_for_writing, open_from_store, reload
from .locking import Lock
from .own_session import rotate_soon
from .ownership import bind, device_id_of, signed_in_at, unbind, user_id_of
from .rebasing import drop, set_stored, undecoded
from .rewriting import NotStored, rewrite
from .saving import is_modified
from .site_data import checked_kinds, clear_with_response
from .state import IN_RESPONSE, IN_VIEW, SAVED, Presented
from .tracking import TrackedValues
from .transactions import Transaction
from .user_values import UserLifecycle, values_of

_RAISE: Any = object()


class SessionData(SessionMixin):
    """A session: a dict of str to values, loaded at the first look and saved with the response.

    The first look costs one round trip to the store, and later looks cost none. If the request
    changes something, the save costs one more. The session also notices changes inside lists, dicts
    and sets. Methods that use the store at once say so; all of them may raise ``StoreUnavailable``
    (HTTP 503).

    For the types that you can store, see :doc:`/how-to/values`.
    """

    accessed = False  # Flask's mixin has True before 3.1.3

    # For this package. Made at the first look, since most requests never look at their session.
    lifecycle: Lifecycle | None = None
    _phase: str = IN_VIEW  # how far the request is, until the first look
    _further: Sequence[SessionData] = ()

    def __init__(
        self,
        repository: Repository,
        present: Callable[[Flask, Any], Presented],
        app: Flask,
        request: Request | None,
        hooks: list[Any] | None = None,
    ) -> None:
        began = repository.clock(), repository.rosters.own.count
        self._start = repository, present, app, request, began
        self._hooks = hooks

    @property
    def _life(self) -> Lifecycle:
        life = self.lifecycle
        if life is None:
            made = Lifecycle(*self._start, self._phase)
            if self._hooks is not None:  # first, since a signal may interrupt in between
                self._hooks.append(made.begin_response)
            # An atomic step, so that all threads of the request get the same one.
            life = self.__dict__.setdefault("lifecycle", made)
        return life

    def _open(self) -> TrackedValues:
        self.accessed = True
        return load(self.lifecycle or self._life)

    def _open_for_writing(self, what: str, *details: str) -> TrackedValues:
        self.accessed = True
        return open_for_writing(self._life, what, *details)

    # -- the mapping

    def __getitem__(self, key: str) -> Any:
        life = self.lifecycle
        values = self._open() if life is None or not life.opened else life.values
        try:
            return values[key]
        except (UnreadableRecord, ValueLost) as error:
            return self._recover(key, values, error)

    def _recover(self, key: str, values: TrackedValues, error: UnreadableRecord | ValueLost) -> Any:
        """The value of a key that couldn't be read, if another request has replaced it."""
        if isinstance(error, UnreadableRecord):
            refuse(self._life, error.reason, error.detail)
            raise KeyError(key) from None
        raw = undecoded(values, key)
        if raw is not None:  # otherwise, another thread has found it
            self._large.lost(key, raw, error)
        return self[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._check_key(key)
        self.accessed = True
        life = self.lifecycle or self._life
        values, repository = open_for_writing(life, ONE_KEY, key), life.repository
        if repository.check is not None:
            self._put(key, value, repository.check(key, value))
            return
        if repository.settings.debug:
            values.encode(key, value)
        values[key] = value

    def _set(self, key: str, value: Any, mark: Mark) -> None:
        """Check and set a value, with a mark."""
        self._check_key(key)
        check = self._life.repository.check
        if check is not None:
            mark = mark._replace(version=check(key, value).version)
        self._put(key, value, mark)

    def _put(self, key: str, value: Any, mark: Mark) -> None:
        """Set a checked value under a checked key, with a mark."""
        values = self._open_for_writing(ONE_KEY, key)
        life = self._life
        repository = life.repository
        if repository.settings.debug:
            values.encode(key, value)
        if mark == PLAIN:
            values[key] = value
        else:
            values.set(key, value, mark, repository.now)
        if repository.check is not None:
            life.vetted[key] = values.encode(key, value)

    @cached_property
    def _typed(self) -> dict[object, Any]:
        """State of typed keys in this session."""
        return {}

    @cached_property
    def _large(self) -> SessionLargeValues:
        return SessionLargeValues(self._life)

    @property
    def permanent(self) -> bool:
        """Whether the cookie stays after the browser closes, for ``PERMANENT_SESSION_LIFETIME``.

        False by default; ``SESSION_PERMANENT`` sets the default of new sessions.
        """
        life = self._life
        default = life.repository.settings.permanent and life.seen.record is None
        return bool(self.get(PERMANENT, default))

    @permanent.setter
    def permanent(self, value: bool) -> None:
        self[PERMANENT] = bool(value)

    def __delitem__(self, key: str) -> None:
        del self._open_for_writing(ONE_KEY, key)[key]

    def __iter__(self) -> Iterator[str]:
        values = self._open()
        try:
            values.check()
        except UnreadableRecord as error:
            refuse(self._life, error.reason, error.detail)
            return iter(())
        return iter(list(values))

    def __len__(self) -> int:
        return len(self._open())

    def __bool__(self) -> bool:
        try:
            self._open().newest()
        except KeyError:
            return False
        return True

    def __contains__(self, key: object) -> bool:
        return key in self._open()

    def items(self) -> ItemsView[str, Any]:
        """The keys and values. Reads large values, and leaves out lost ones."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """The values. Reads large values, and leaves out lost ones."""
        return _Values(self)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self.items()) | dict(other)

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | dict(self.items())

    def __ior__(self, other: Mapping[str, Any]) -> SessionData:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __repr__(self) -> str:
        life: Lifecycle | None = vars(self).get("lifecycle")  # __init__ may have been interrupted
        if life is None or not life.opened:
            return "<SessionData not loaded>"
        return f"<SessionData handle={life.handle!r} keys={len(life.values)}>"

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the newest key and its value, as a dict does."""
        key = self._open().newest()
        return key, self.pop(key)

    def copy(self) -> dict[str, Any]:
        """A plain dict of all values (shallow)."""
        return dict(self.items())

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)

    def clear(self) -> None:
        """Remove every key.

        If you set nothing afterwards, the session ends with the response: it leaves the store, and
        the response deletes its cookie. If the session is bound to a user, this unbinds it, unless
        you bind it again. Removing all keys one by one ends an unbound session as well. If a
        parallel request stores a key before the session ends, the key and the session stay. To log
        a user out, use ``destroy``. Costs no round trip besides the save.
        """
        values = self._open_for_writing("The session")
        life = self._life
        with life.mutex:
            bound = user_id_of(life) is not None
            for key in list(values):
                del values[key]
            life.wish(cleared=True)
            if bound:
                unbind(life)

    def set_many(self, values: Mapping[str, Any]) -> None:
        """Set several keys, all or none. Raises ``ValueRefused`` before it sets anything.

        Costs no round trip besides the save.
        """
        repository = self._life.repository
        for key, value in values.items():
            self._check_key(key)
            self._open().encode(key, value)
            if repository.check is not None:
                repository.check(key, value)
        self.update(values)

    def set(self, key: str, value: Any, ttl: float | timedelta | None = None) -> None:
        """Set a key whose value expires after ``ttl`` seconds, or with the session.

        ``ttl``: more than 0 seconds, at most ten years, or a ``timedelta``. None, the default, sets
        the key as ``session[key] = value`` does. From its expiry on, the value is absent, and the
        next write removes it from the store. If you set the key again without a ``ttl``, it no
        longer expires. A change inside the value, or ``update_atomic``, keeps the expiry.

        Raises ``ValueError`` for any other ``ttl``, and ``ValueRefused`` for a value that the
        schema refuses. Costs no round trip besides the save.
        """
        if ttl is None:
            self[key] = value
        else:
            self._set(key, value, Mark(self._life.repository.now() + ttl_in_milliseconds(ttl)))

    def attach(self, key: str, file: Any, ttl: float | timedelta | None = None) -> int:
        """Set a key to the bytes of a binary file, read from its current position.

        This writes the file to the store at once, 256 KB at a time, so it need not fit into memory.
        Other requests see the value after the next save. ``session[key]`` returns all of it as
        bytes. A small file stays in the record, as if you had assigned its bytes. If the session
        has a schema, the schema checks only the first piece of a large file.

        ``file``: anything with ``read(size)``, such as ``request.files["photo"]``. ``ttl`` as in
        ``set``. Returns the number of bytes. Raises ``SessionTooLarge`` beyond
        ``SESSION_MAX_VALUE_BYTES``, ``SettingError`` if the store has no place for large values,
        ``TypeError`` for a text file. One round trip for each 256 KB, and at most one more with the
        save.
        """
        self._check_key(key)
        mark = (
            PLAIN if ttl is None else Mark(self._life.repository.now() + ttl_in_milliseconds(ttl))
        )
        self.accessed = True
        written = self._large.attach(key, file, mark)
        if isinstance(written, int):
            return written
        if mark == PLAIN:
            self[key] = written
        else:
            self._set(key, written, mark)
        return len(written)

    def open(self, key: str) -> ValueReader:
        """The bytes under ``key`` as a binary file, read 256 KB at a time: see ``ValueReader``.

        Raises ``KeyError`` if there is no such key, and ``TypeError`` if its value isn't bytes. One
        round trip for each 256 KB, the first one now; none for a value in memory.
        """
        if key not in self._open():
            raise KeyError(key)
        reader = self._large.reader(key)
        if reader is not None:
            return reader
        value = self[key]
        if type(value) is not bytes:
            raise TypeError(f"session[{ascii(key)[:60]}] isn't bytes: only bytes can be opened")
        return reader_of(value)

    def ttl(self, key: str) -> float | None:
        """The seconds until the value of ``key`` expires by itself, or None if it doesn't.

        Every value ends with the session anyway. Raises ``KeyError`` if there is no such key. Costs
        no round trip.
        """
        values = self._open()
        if key not in values:
            raise KeyError(key)
        try:
            end = values.mark(key).expires_at
        except UnreadableRecord as error:
            refuse(self._life, error.reason, error.detail)
            raise KeyError(key) from None
        return (end - self._life.repository.now()) / 1000 if end else None

    def remove(self, *keys: str) -> int:
        """Remove these keys, as far as they exist, and return how many did."""
        values = self._open()
        present = [key for key in dict.fromkeys(keys) if key in values]
        for key in present:
            del self[key]
        return len(present)

    def get_or_set(self, key: str, default: Any) -> Any:
        """The value of ``key``. If there is none, sets it to ``default`` first.

        ``default``: a value, or a function that returns it.
        """
        try:
            return self[key]
        except KeyError:
            self[key] = default() if callable(default) else default
        return self[key]

    # -- about the session

    @property
    def new(self) -> bool:  # type: ignore[override]  # Flask has a class attribute
        """Whether the store doesn't hold this session yet."""
        self._open()
        return self._life.seen.record is None

    @property
    def modified(self) -> bool:
        """Whether this request changed the session. Setting it to True forces a save.

        Code that saves by hand, as Flask-SocketIO does, checks only ``flask.session``. So for
        ``flask.session``, this includes the sessions of further ``Session`` objects, which are
        saved with it.
        """
        if any(session.modified for session in self._further):
            return True
        life = self.lifecycle
        if life is None:
            return False
        return life.was_modified if life.is_late else is_modified(life)

    @modified.setter
    def modified(self, value: bool) -> None:
        if value:
            self._open_for_writing("session.modified")
        if value or self.lifecycle is not None:
            self._life.wish(forced=bool(value))

    @property
    def handle(self) -> str | None:
        """The public name of the session, or None before it is stored.

        It is the SHA-256 of the token: safe to show and to log, and useless as a token. It changes
        when the session is rotated.
        """
        self._open()
        return self._life.handle

    @property
    def sid(self) -> str | None:
        """The same as ``handle``, under the name that Flask-Session gives it."""
        return self.handle

    def bind(
        self, user_id: str | int, label: str | None = None, tags: Collection[str] | None = None
    ) -> None:
        """Bind the session to the user who has just signed in; see ``ext.users``.

        The session gets a new token with the save, and the old one stops working at once. With
        Flask-Login and Flask-Security, a sign-in calls this for you. If the session is bound to
        this user already, this is a fresh sign-in of the same device, which keeps its id and label.
        If it is bound to another user, it leaves that user's list.

        ``user_id``: 1 to 256 characters, or an int, which becomes a string. ``label``: a name for
        the device in the user's list, at most 100 characters; by default one from the user
        agent, such as "Firefox on Windows". ``tags``: at most 10 strings of at most 100 characters.
        Raises ``ValueError`` for other arguments.

        Raises ``SignInRefused`` (401) if the user's sessions were revoked since the request began,
        or since ``ext.users.login``, and ``TooManySessions`` (409) if ``SESSION_MAX_POLICY`` is
        "refuse" and the user has as many sessions as allowed. The save may raise them as well. One
        round trip, and one more with the save.
        """
        self.accessed = True
        if bind(self._life, user_id, label, tags):
            report_confirmation(self._life, SIGN_IN)

    def unbind(self) -> None:
        """Keep the session, but no longer bind it to its user. Two round trips with the save."""
        self.accessed = True
        unbind(self._life)
        self.pop(CONFIRMED, None)

    @property
    def owner(self) -> str | None:
        """The id of the user that the session is bound to, as text; None if it isn't bound."""
        self._open()
        return user_id_of(self._life)

    @property
    def device_id(self) -> str | None:
        """The id of this device among its user's; None if the session isn't bound.

        It stays the same through rotations, and isn't secret.
        """
        self._open()
        return device_id_of(self._life)

    @property
    def created_at(self) -> datetime | None:
        """When the session was first stored (UTC); None before that."""
        self._open()
        record = self._life.seen.record
        return _utc(record.created_at) if record else None

    @property
    def expires_at(self) -> datetime | None:
        """When the session ends unless it is used again (UTC); None before it is stored."""
        self._open()
        record = self._life.seen.record
        return _utc(record.idle_expires_at) if record else None

    @property
    def size(self) -> int:
        """The number of bytes of the stored keys and values, large values included.

        0 before the session is stored.
        """
        stored = self._open().stored
        large = sum(reference_in(raw).length for raw in stored.values() if refers(raw))
        return large + sum(len(key.encode()) + len(raw) for key, raw in stored.items())

    @property
    def shared(self) -> UserValues:
        """The values of the signed-in user, the same on all devices: see ``UserValues``.

        Empty if the session isn't bound to a user; writing then raises ``NotSignedIn``. A sign-in
        or sign-out in this request takes effect at once. One round trip at the first look at a
        value, and one more after the save of the session if the request changes something.
        """
        self._open()
        life = self._life
        user_id = signs_in(life)
        if user_id is None:
            user_id = user_id_of(life)
        else:
            join_early(life, user_id)
        values = values_of(life, user_id)
        shared: dict[object, UserValues] = vars(self).setdefault("_shared", {})
        found = shared.get(values)
        if found is None:
            found = shared.setdefault(values, UserValues(values))
            add_further(self, found)
        return found

    # -- the session's lifecycle

    def rotate(self, grace: float | timedelta | None = None) -> None:
        """Give the session a new token and keep its data. Call it wherever privileges change.

        The rotation happens with the response, or at the end of a lock. For ``grace`` seconds
        (default ``SESSION_ROTATION_GRACE``), the old token still leads to the session, to serve
        parallel requests. With 0, it stops working at once: use that at every login.

        If the request came with an old token, only ``grace=0`` has an effect: it starts a new
        session with the keys that this request assigned. Raises ``ValueError`` for a grace outside
        0 to 3600. Costs no round trip besides the save. Source: OWASP ASVS 7.2.4.
        """
        if grace is None:
            grace = self._life.repository.settings.rotation_grace
        seconds = grace_in_seconds(grace)
        self.accessed = True
        check_not_in_retried_code(self._life, "A rotation")
        rotate_soon(self._life, seconds)

    def confirm(self, method: str = "password") -> None:
        """Record that the user has just confirmed who they are, and rotate without grace.

        Call it after you have checked the password, a second factor or a passkey, also at the
        sign-in. ``method`` names it for ``require_fresh`` and ``confirmed_at``. Parallel requests
        can't undo the confirmation. A later sign-in, sign-out or ``rotate(grace=0)`` ends it. The
        absolute timeout stays where it is.

        Raises ``ValueError`` for a method that isn't 1 to 40 printable ASCII characters, and
        ``RotationRefused`` in a socket handler. Costs no round trip besides the save. Source: OWASP
        ASVS 7.2.4, 7.5.1.
        """
        checked_method(method)
        self.accessed = True
        life = self._life
        if life.is_in_socket and has_request_context():  # not a test that prepares a session
            raise RotationRefused(
                "A socket handler can't confirm who the user is: no response would carry a new "
                "token, so the old one would count as confirmed. Call confirm() in a view."
            )
        open_from_store(life, "a confirmation")
        rotate_soon(life, 0, confirms=True)
        note_confirmation(self, life, method)
        if life.repository.on_confirm is not None:
            life.repository.on_confirm(self)

    def confirmed_at(self, method: str | Collection[str] | None = None) -> datetime | None:
        """When the user last confirmed who they are (UTC), or None.

        ``method``: one method, a list of methods, or None for any. A sign-in by ``bind``,
        Flask-Login or Flask-Security counts as well, under the method ``"sign-in"``; a remember-me
        cookie doesn't.
        """
        self._open()
        at = confirmed_at(self, signed_in_at(self._life), checked_methods(method))
        return None if at is None else _utc(at)

    def destroy(self, clear: str | Collection[str] = ()) -> None:
        """End the session. When this returns, the store no longer has it.

        The response deletes the cookie. If you write afterwards, a new session starts with a new
        token. One round trip. No parallel request can bring the session back.

        ``clear``: the other data that the browser deletes, with the header ``Clear-Site-Data``:
        ``"cache"``, ``"storage"``, ``"executionContexts"``, ``"cookies"``, ``"clientHints"``,
        ``"prefetchCache"``, ``"prerenderCache"``, or several. Browsers obey it over HTTPS only.
        ``"cookies"`` also deletes the cookies of all subdomains of the site. Raises ``ValueError``
        for any other kind, and where no response follows, as in ``ext.open()``; then the session
        doesn't end.
        """
        self.accessed = True
        kinds, life = checked_kinds(clear), self._life
        if not kinds:
            destroy(life)
            return
        if life.request is None or life.is_in_socket:
            raise ValueError(
                "clear is sent with a response, and none follows here: call destroy() without it, "
                "or in a view"
            )
        try:
            destroy(life)
        except LogoutUnconfirmed:  # the session has ended
            clear_with_response(life.request, kinds)
            raise
        clear_with_response(life.request, kinds)

    def reload(self) -> None:
        """Discard this request's changes, and load the stored state. One round trip."""
        self.accessed = True
        life = self._life
        with life.mutex:
            check_not_in_retried_code(life, "A reload")
            reload(life)

    def set_lifetime(self, seconds: float | timedelta) -> None:
        """End this session ``seconds`` after its last use, whatever the settings say.

        ``seconds``: from 1 to ``SESSION_ABSOLUTE_TIMEOUT``, or a ``timedelta``; any other raises
        ``ValueError``. It takes effect with the next save, stays through rotations, and never
        extends the absolute timeout. Costs no round trip besides the save.
        """
        life = self._life
        lifetime = lifetime_in_milliseconds(seconds, life.repository.settings.absolute_timeout)
        self._open_for_writing("The lifetime of the session")
        life.wish(lifetime=lifetime)

    def skip_renewal(self) -> None:
        """Don't count this request as use of the session: its idle expiry stays where it is.

        Call it in requests that a page sends by itself, such as polling, before anything writes to
        the store. Changes are saved as usual. ``set_lifetime`` and a change of ``permanent`` still
        set the expiry. Costs no round trip. Source: OWASP ASVS 7.3.1.
        """
        self._life.renews = False

    def transaction(self) -> Transaction[SessionData]:
        """A block whose changes are stored together, on the state it saw, or not at all.

        Use it in a ``with`` block, or call its ``run``: see ``Transaction``.
        """
        self.accessed = True
        return Transaction(self, self._life)

    def lock(
        self, timeout: float | timedelta | None = None, wait: float | timedelta | None = None
    ) -> Lock[SessionData]:
        """The lock of this session, for a ``with`` or ``async with`` block: see ``Lock``.

        ``timeout``: the seconds after which others get the lock if this process dies or is paused
        (default ``SESSION_LOCK_TIMEOUT``; 0.1 to 3600). While the process lives, it holds the lock
        for as long as the block runs. ``wait``: how many seconds to wait for the lock (default
        ``SESSION_LOCK_WAIT``; 0 to 3600).

        Raises ``ValueError`` for other times. Entering raises ``SessionLocked`` (503) if the lock
        isn't free in time, ``SessionEnded`` if the session ended, and ``LockMisused`` inside a lock
        or a transaction, or if the session isn't stored yet. Leaving raises ``LockLost`` (409) if
        the lock expired, ``SessionEnded`` if the session ended, and any error of a save; then
        nothing of the block is stored.
        """
        self.accessed = True
        return Lock(self, self._life, timeout, wait)

    def update_atomic(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace the value of ``key`` with ``function(value)``, store it now, and return it.

        ``function`` gets a fresh copy of the stored value, or of ``default`` if there is none. It
        runs again if another request was faster, so it must have no side effects. The key keeps its
        expiry. This request's other changes stay pending; if it changed this very key, all of its
        changes are stored first. An object that you got from this key before is no longer part of
        the session. If the session isn't stored yet, the value is stored with the response.

        Raises ``SessionEnded`` if the session has ended, ``SessionConflict`` after too many lost
        races, ``ValueRefused`` for a result that can't be stored, ``TransactionMisused`` if
        ``function`` uses the session in a way that can't be undone. One round trip, two more for
        each lost race.
        """
        self._check_key(key)
        life = self._life
        check_not_in_retried_code(life, "update_atomic")
        values = self._open()
        check_store(life)
        codec, check = life.repository.codec, life.repository.check
        value: Any = None

        def replace(raw: bytes | None) -> bytes:
            nonlocal value
            mark, plain = (PLAIN, None) if raw is None else split(raw)
            before = copy.deepcopy(default) if plain is None else codec.decode(plain)
            value = call_retried(life, function, before)
            if check is not None:
                mark = mark._replace(version=check(key, value).version)
            return marked(encode_within(codec, key, value, raw), mark)

        if life.seen.record is None and not life.ended:
            return self._update_unstored(key, function, default)

        def settle(raw: bytes | None) -> None:
            assert raw is not None
            set_stored(values, key, value, raw)

        recover = self._large.recover(key)
        try:
            rewrite(life, key, replace, "update_atomic", settle=settle, recover=recover)
        except NotStored:
            return self._update_unstored(key, function, default)
        return value

    def _update_unstored(self, key: str, function: Callable[[Any], Any], default: Any) -> Any:
        """``update_atomic`` on a session that isn't stored yet."""
        life, values = self._life, self._open_for_writing(ONE_KEY, key)
        while True:
            before = values.raw(key)
            value = call_retried(life, function, copy.deepcopy(self.get(key, default)))
            with life.mutex:
                if values.raw(key) == before:  # else another thread has set it
                    self._set(key, value, values.mark(key) if key in values else PLAIN)
                    return value

    def take(self, key: str, default: Any = _RAISE) -> Any:
        """Remove ``key`` and return its value, once: only one of several parallel requests gets it.

        When this returns, the value has left the store, whatever happens to the request. This
        request's other changes stay pending; if it changed this very key, all of its changes are
        stored first. If there is no value, returns ``default`` or raises ``KeyError``.

        Raises ``SessionEnded`` if the session has ended, ``SessionConflict`` after too many lost
        races, and ``StoreUnavailable`` if it is unknown whether the value was removed. One round
        trip, two more for each lost race; none if there is no value, or the session isn't stored
        yet.
        """
        life = self._life
        check_not_in_retried_code(life, "take")
        values = self._open()
        check_store(life)
        if life.ended:
            raise SessionEnded
        if life.seen.record is None:
            return self._take_unstored(key, default)
        codec = life.repository.codec
        value: Any = default

        def replace(raw: bytes | None) -> None:
            nonlocal value
            value = default if raw is None else codec.decode(split(raw)[1])

        recover = self._large.recover(key)
        try:
            rewrite(life, key, replace, "take", settle=lambda _: drop(values, key), recover=recover)
        except NotStored:
            return self._take_unstored(key, default)
        if value is _RAISE:
            raise KeyError(key)
        return value

    def _take_unstored(self, key: str, default: Any) -> Any:
        """``take`` from a session that isn't stored yet."""
        with self._life.mutex:
            return self.pop(key) if default is _RAISE else self.pop(key, default)

    # -- for the rest of the package

    def _check_key(self, key: object) -> None:
        if type(key) is not str:
            raise UnsupportedType(
                f"session[{ascii(key)[:60]}]",
                f"session keys are str, not {type(key).__qualname__}",
            )
        if not (key.isascii() or is_valid_text(key)):
            raise UnsupportedType(
                f"session[{ascii(key)[:60]}]", "a key with lone surrogates isn't valid text"
            )


class TypedAccess:
    """Gives typed keys the encoded values of a session, with their marks.

    ``states``: the state of each typed key in this session.
    """

    __slots__ = ("_session", "states")

    def __init__(self, session: SessionData) -> None:
        self._session = session
        self.states = session._typed

    def raw(self, key: str) -> bytes | None:
        """The encoded value, mark included; None if absent."""
        return self._session._open().raw(key)

    def decode(self, key: str, raw: bytes) -> tuple[Mark, Any]:
        """The mark and the value. Raises ``KeyError`` if a large value is lost."""
        return self._session._large.decoded(key, raw)

    def encode(self, key: str, value: Any) -> bytes:
        """The encoded value. Raises ``ValueRefused``."""
        return self._session._open().encode(key, value)

    def put(self, key: str, value: Any, mark: Mark, merge: MergeFunction | None) -> None:
        """Set a checked value, and how to merge it; None follows the settings."""
        if merge is not None:  # first, since another thread may save in between
            self._session._life.merge_by({key: merge})
        self._session._put(key, value, mark)

    def refuse(self, error: UnreadableRecord) -> None:
        """Continue with a new session, since a value can't be read."""
        refuse(self._session._life, error.reason, error.detail)


def typed_access(session: SessionData) -> TypedAccess:
    """The access of typed keys to this session.

    The session doesn't keep it: a reference cycle would keep both until a garbage collection.
    """
    return TypedAccess(session)


def lifecycle_of(session: SessionData) -> Lifecycle:
    """The session's ``lifecycle``, which this call makes if necessary."""
    return session.lifecycle or session._life


def repository_of(session: SessionData) -> Repository:
    """The repository of the interface that opened the session."""
    return session._start[0]


def begin_error_page(session: SessionData) -> None:
    """Called when Flask begins to make an error page for an unhandled exception."""
    session._phase = IN_RESPONSE
    if session.lifecycle is not None:
        session.lifecycle.begin_error_page()


def add_further(session: SessionData, further: SessionData) -> None:
    """Save the session of a further ``Session`` together with this one."""
    vars(session).setdefault("_further", []).append(further)


def begin_response(session: SessionData, response: Any) -> Any:
    """Called when Flask begins to process the response, before any hook of the application."""
    session._phase = IN_RESPONSE
    if session.lifecycle is not None:
        session.lifecycle.begin_response(response)
    return response


def close_unused(session: SessionData) -> None:
    """Called once the response is sent, if the request never looked at the session."""
    session._phase = SAVED
    if session.lifecycle is not None:
        session.lifecycle.phase = SAVED


class UserValues(SessionData):
    """The values of a user: a dict like a session, but the same in all sessions of the user.

    You get them from ``session.shared`` and ``ext.open_user``. If one device stores a value, the
    next request of every other device sees it. Types, merging, expiry, large values, limits, locks
    and transactions work as they do in sessions. Keys can't begin with an underscore.

    The values stay in the store for ``SESSION_USER_VALUES_LIFETIME`` after their last use. Signing
    out and ``ext.users.revoke_all`` leave them there; ``ext.users.forget`` deletes them.
    """

    def __init__(self, life: UserLifecycle) -> None:
        started = (0.0, 0)
        self._start = (life.repository, life.present, life.app, life.request, started)
        self._hooks = None
        self._phase = life.phase
        self.lifecycle: UserLifecycle = life

    @property
    def user_id(self) -> str | None:
        """The id of the user; None if nobody is signed in."""
        return self.lifecycle.user_id

    owner = user_id

    def __repr__(self) -> str:
        life = vars(self).get("lifecycle")
        if life is None or not life.opened:
            return "<UserValues not loaded>"
        return f"<UserValues keys={len(life.values)}>"

    def transaction(self) -> Transaction[SessionData]:
        self.lifecycle.ensure_stored()
        return super().transaction()

    def lock(
        self, timeout: float | timedelta | None = None, wait: float | timedelta | None = None
    ) -> Lock[SessionData]:
        self._check_user()
        self.lifecycle.ensure_stored()
        return super().lock(timeout, wait)

    def update_atomic(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        self._check_key(key)
        self.lifecycle.ensure_stored()
        return super().update_atomic(key, function, default)

    def reload(self) -> None:
        if self.lifecycle.user_id is not None:
            super().reload()

    def _check_user(self) -> None:
        if self.lifecycle.user_id is None:
            raise NotSignedIn

    def _open_for_writing(self, what: str, *details: str) -> TrackedValues:
        self._check_user()
        return super()._open_for_writing(what, *details)

    def _check_key(self, key: object) -> None:
        self._check_user()
        super()._check_key(key)
        if str(key).startswith("_"):
            raise UnsupportedType(
                f"session.shared[{ascii(key)[:60]}]",
                "keys of a user's values can't begin with an underscore",
            )

    def _refuse_session_method(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "The values of a user have no token, device or timeout: call this method on the session"
        )

    bind = unbind = rotate = confirm = confirmed_at = _refuse_session_method
    destroy = set_lifetime = _refuse_session_method
    shared = device_id = property(_refuse_session_method)


class _Items(ItemsView[str, Any]):
    def __iter__(self) -> Iterator[tuple[str, Any]]:
        session: Any = self._mapping  # type: ignore[attr-defined]  # of the base class
        for key in session:
            try:
                value = session[key]
            except KeyError:
                continue
            yield key, value


class _Values(ValuesView[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _Items(self._mapping))  # type: ignore[attr-defined]


def _utc(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
