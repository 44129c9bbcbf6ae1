"""``SessionKey``: a key of the session whose values have a schema."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar, overload

from flask import abort, jsonify, request
from flask import session as flask_session
from marshmallow import Schema, ValidationError
from marshmallow.fields import Field
from werkzeug.exceptions import HTTPException

from ..errors import (
    GSessionError,
    InvalidStoredValue,
    SchemaFailed,
    SessionConflict,
    SettingError,
    UnreadableRecord,
)
from ..events import StoredValueInvalid, logger
from ..request.durations import ttl_in_milliseconds
from ..request.session import SessionData, lifecycle_of, typed_access
from ..users.joins import AT_LOGIN
from ..values.codec import IMMUTABLE, is_valid_text
from ..values.marks import MAX_VERSION, Mark
from ..values.merge import DECLARED, POLICIES, MergeFunction
from ..weak import WeakObjects
from .merging import merge_of_stored, policy_of
from .schemas import FieldForm, SchemaForm, form_of

T = TypeVar("T")
D = TypeVar("D")

_NO_VALUE: Any = object()
_SHARED = IMMUTABLE - {frozenset}  # never copied; a frozenset may hold a mutable object
_HANDED_OUT = 32  # values per request that ``set`` recognises as results of ``get``


class _Found(NamedTuple):
    """The result of a read. If no valid value is ``there``, ``value`` is the default, if any."""

    raw: bytes | None
    value: Any
    there: bool

    def __repr__(self) -> str:
        return f"<_Found: {'a value' if self.there else 'none'}>"


class _KeyState:
    """The state of a key in one request. Threads share it: replace each attribute in one step."""

    __slots__ = ("found", "handed_out")

    def __init__(self) -> None:
        self.found: _Found | None = None
        #: the latest results of ``get`` and ``set``, newest last
        self.handed_out: list[Any] = []

    def hand_out(self, value: Any) -> Any:
        self.handed_out = [*self.handed_out[1 - _HANDED_OUT :], value]
        return value


class SessionKey(Generic[T]):
    """A key of the session whose values are checked when you read and write them.

    ``schema``
        A marshmallow ``Schema`` (class or instance), a field, or a dataclass. The values of a
        schema are dicts, the values of a dataclass are its instances.
    ``default``
        What ``get`` returns if there is no valid value, instead of the schema's defaults.
    ``ttl``
        The seconds, or a ``timedelta``, after which a value expires. None: it lives as long as the
        session.
    ``merge``
        The policy if two requests change the key at once: a name from ``SESSION_MERGE_POLICIES``,
        or a function that takes base, theirs and mine. It gets and returns values as ``get``
        returns them. An invalid result raises ``SessionConflict``.
    ``version``
        The version of the schema, 1 to 65535, stored with each value. Values that were stored
        without a version have version 1.
    ``invalid``
        How ``get`` treats an invalid stored value: ``"default"`` ignores it, ``"raise"`` raises
        ``InvalidStoredValue``. Both log a warning without the data, and emit
        ``StoredValueInvalid``.
    ``session``
        The ``ext.session`` of a second ``Session``. None: ``flask.session``.
    ``scope``
        ``"user"`` for a value of the signed-in user, which is the same on all devices and lives in
        ``session.shared``. Until the user signs in, the session keeps it.
    ``at_login``
        What a sign-in does if the user has a value already: ``"keep"`` (the default) keeps the
        user's, ``"replace"`` takes the session's, ``"merge"`` merges both, by the policy of
        ``merge``, or else entry by entry. ``"discard"`` drops the session's value in any case. Each
        value joins exactly once.

    Raises ``SettingError`` for any other argument. Reading costs the same round trips as reading
    ``session[name]``. A value is checked once per request unless it changes.
    """

    @overload
    def __init__(
        self: SessionKey[dict[str, Any]],
        name: str,
        schema: type[Schema] | Schema,
        *,
        default: dict[str, Any] = ...,
        ttl: float | timedelta | None = ...,
        merge: str | MergeFunction | None = ...,
        version: int = ...,
        invalid: str = ...,
        session: SessionData | None = ...,
        scope: str = ...,
        at_login: str | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        schema: Field[T],
        *,
        default: T = ...,
        ttl: float | timedelta | None = ...,
        merge: str | MergeFunction | None = ...,
        version: int = ...,
        invalid: str = ...,
        session: SessionData | None = ...,
        scope: str = ...,
        at_login: str | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        schema: type[T],
        *,
        default: T = ...,
        ttl: float | timedelta | None = ...,
        merge: str | MergeFunction | None = ...,
        version: int = ...,
        invalid: str = ...,
        session: SessionData | None = ...,
        scope: str = ...,
        at_login: str | None = ...,
    ) -> None: ...

    def __init__(
        self,
        name: str,
        schema: Any,
        *,
        default: Any = _NO_VALUE,
        ttl: float | timedelta | None = None,
        merge: str | MergeFunction | None = None,
        version: int = 1,
        invalid: str = "default",
        session: SessionData | None = None,
        scope: str = "session",
        at_login: str | None = None,
    ) -> None:
        if type(name) is not str or not name or not is_valid_text(name):
            raise SettingError(f"A SessionKey needs a name; got {name!r}")
        if type(version) is not int or not 1 <= version <= MAX_VERSION:
            raise SettingError(f"SessionKey({name!r}): version is {version!r}; allowed: 1 to 65535")
        if invalid not in ("default", "raise"):
            raise SettingError(
                f"SessionKey({name!r}): invalid is {invalid!r}; allowed: 'default' or 'raise'"
            )
        if merge is not None and not callable(merge) and merge not in POLICIES:
            raise SettingError(
                f"SessionKey({name!r}): merge is {merge!r}; allowed: {', '.join(POLICIES)}, or a "
                "function that takes base, theirs and mine"
            )
        _check_scope(name, scope, at_login)
        self.name = name
        self.version = version
        self.scope = scope
        self.at_login = at_login or "keep"
        self._form: SchemaForm | FieldForm = form_of(name, schema)
        self._default = _NO_VALUE
        self._invalid = invalid
        self._merge = None if merge is None else policy_of(merge, self._form, self._run, self)
        self._merge_of_settings: tuple[MergeFunction, MergeFunction] | None = None
        self._target = session
        self._declared = self  # the original, if `of` made this copy
        self._lasting = Mark(0, version)
        self._upgraders: dict[int, Callable[[Any], Any]] = {}
        try:
            self._ttl = None if ttl is None else ttl_in_milliseconds(ttl)
            if default is not _NO_VALUE:
                self._default, _ = self._run(self._form.accept, default)
        except ValidationError as error:
            raise SettingError(f"SessionKey({name!r}): invalid default: {error}") from None
        except (ValueError, GSessionError) as error:
            raise SettingError(f"SessionKey({name!r}): {error}") from None
        DECLARED.setdefault(name, WeakObjects()).add(self)

    def __repr__(self) -> str:
        return f"<SessionKey {self.name!r} version={self.version}>"

    @property
    def schema(self) -> Schema:
        """The marshmallow schema. For a field, a schema with the single field ``value``."""
        return self._form.schema

    @overload
    def get(self) -> T: ...

    @overload
    def get(self, default: D) -> T | D: ...

    def get(self, default: Any = _NO_VALUE) -> Any:
        """A copy of the checked value: store changes with ``set`` or ``update``.

        If there is no valid value, returns ``default``, or else the default of the key, or else
        the default of the schema. Raises ``KeyError`` if there is no default.

        Also raises ``InvalidStoredValue`` if the key has ``invalid="raise"``, and ``SchemaFailed``
        if a validator raises anything but ``ValidationError``.
        """
        session = self._session()
        access = typed_access(session)
        raw = access.raw(self.name)
        state = access.states.get(self._declared) or self._state_of(session)
        found = state.found
        if found is None or found.raw != raw:
            found = state.found = self._look(session, raw)
        if not found.there and default is not _NO_VALUE:
            return default
        if found.value is _NO_VALUE:
            raise KeyError(
                f"session[{self.name!r}] holds no valid value, and its schema has no default: "
                "use get(default), or @require_session"
            )
        value = _fresh(found.value)
        return value if self._form.is_plain else state.hand_out(value)

    def set(self, value: Any) -> T:
        """Check ``value`` and store it, with the ttl and version of the key.

        ``value`` is data for the schema to load, or a result of ``get``. The session stores the
        schema's dump without computed fields. Returns the value as ``get`` will return it. If the
        schema contains code of your own, ``set`` loads the dump again to verify that.

        Raises marshmallow's ``ValidationError``, also if ``get`` would return a different value,
        and ``UnsupportedType`` for a value that no session can store. In both cases nothing
        changes.
        """
        session = self._session()
        if self._form.is_plain:
            return self._put(session, self._run(self._form.accept, value))
        given = any(value is one for one in self._state_of(session).handed_out)
        return self._put(
            session, self._run(lambda value: self._form.accept(value, handed_out=given), value)
        )

    def update(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> T:
        """Change some fields, by the names that the schema loads; check and store the result.

        All other fields keep their values, or get their defaults if there is no valid value.
        Raises what ``set`` and ``get`` raise, and ``TypeError`` if the key has no fields.
        """
        form = self._form
        if isinstance(form, FieldForm) or not form.has_fields:
            raise TypeError(f"session[{self.name!r}] has no fields: use set()")
        sent = {**(changes or {}), **more}
        try:
            before = self.get()
        except KeyError:
            return self._put(self._session(), self._run(form.accept_input, sent))
        return self._put(
            self._session(), self._run(lambda changes: form.accept_changes(before, changes), sent)
        )

    def of(self, session: SessionData) -> SessionKey[T]:
        """This key in another session, such as one from ``ext.open``: ``cart.of(opened).get()``."""
        key = copy.copy(self)
        key._target = session
        return key

    def delete(self) -> bool:
        """Remove the value. Returns whether there was one."""
        return self._session().remove(self.name) == 1

    @property
    def session(self) -> SessionData:
        """The session that the key reads and writes now.

        With ``scope="user"``, these are the values of the signed-in user, if there is one. It is
        for ``key.session.update_atomic(key.name, function)`` and ``key.session.take(key.name)``.
        """
        return self._session()

    def exists(self) -> bool:
        """Whether the session has a value under this key, valid or not."""
        return self.name in self._session()

    def upgrade(self, *, from_version: int) -> Callable[[Callable[[Any], Any]], Any]:
        """Decorator for a function that upgrades stored data from ``from_version`` to the next.

        The function gets the stored data and returns the new data. ``get`` runs the upgraders in
        order and checks the result, and the next ``set`` or ``update`` stores it. Raises
        ``SettingError`` if the version isn't older than the key's, or has an upgrader already.
        """
        if type(from_version) is not int or not 1 <= from_version < self.version:
            raise SettingError(
                f"SessionKey({self.name!r}) has version {self.version}; it can't be upgraded from "
                f"version {from_version!r}"
            )
        if from_version in self._upgraders:
            raise SettingError(
                f"SessionKey({self.name!r}) has an upgrader from version {from_version} already"
            )

        def declare(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self._upgraders[from_version] = function
            return function

        return declare

    def view(self) -> Callable[[], Any]:
        """A view of the value as JSON: ``app.add_url_rule("/x", view_func=key.view())``.

        GET returns the value with its computed fields, or 404 if there is none. PATCH takes an
        object with the fields to change and returns the new value, or 422 with
        ``{"errors": messages}``. Raises ``SettingError`` if the key has no fields.
        """
        if not self._form.has_fields:
            raise SettingError(f"SessionKey({self.name!r}) has no fields: write a view of your own")

        def view() -> Any:
            try:
                value = self._patched() if request.method == "PATCH" else self.get()
            except ValidationError as error:
                return jsonify(errors=error.messages), 422
            except KeyError:
                abort(404)
            return jsonify(_with_text_as_keys(self._run(self._form.show, value)))

        view.__name__ = f"session_{self.name}"
        view.methods = ["GET", "PATCH"]  # type: ignore[attr-defined]  # for add_url_rule
        return view

    # -- helpers

    def _session(self) -> SessionData:
        target: Any = flask_session if self._target is None else self._target
        kind = type(target)
        session = target if issubclass(kind, SessionData) else target._get_current_object()
        if not isinstance(session, SessionData):
            raise SettingError(
                "A SessionKey needs a session of Flask-GSession: call Session(app), and set "
                "app.secret_key"
            )
        declared = self._declared
        repository = lifecycle_of(session).repository
        if repository.typed_keys.setdefault(self.name, declared) is not declared:
            raise SettingError(
                f"Two SessionKeys are named {self.name!r}: declare the key in one module, and "
                "import it elsewhere"
            )
        if self.scope == "user" and type(session) is SessionData:
            repository.user_keys[self.name] = declared
            if session.owner is not None:
                return session.shared
        return session

    def _patched(self) -> T:
        changes = request.get_json()
        if not isinstance(changes, dict):
            raise ValidationError({"_schema": [self.schema.error_messages["type"]]})
        return self.update(changes)

    def _state_of(self, session: SessionData) -> _KeyState:
        states = typed_access(session).states
        state: _KeyState | None = states.get(self._declared)
        if state is None:
            state = states.setdefault(self._declared, _KeyState())
        return state

    def _put(self, session: SessionData, accepted: tuple[Any, Any]) -> T:
        value, stored = accepted
        repository, access = lifecycle_of(session).repository, typed_access(session)
        check = repository.check
        if check is not None and not check.is_by(self._declared):
            check(self.name, stored)
        if type(stored) is not dict or not IMMUTABLE.issuperset(map(type, stored.values())):
            access.encode(self.name, stored)  # raises if it is nested too deep
        policy, merge = repository.merger.policies.get(self.name), None
        if self._merge is not None or policy is not None:
            merge = self.merge_function(policy)
        access.put(self.name, stored, self.mark(repository.now), merge)
        if not self._form.is_plain:
            self._state_of(session).hand_out(value)
        return value  # type: ignore[no-any-return]  # by the schema

    def _run(self, function: Callable[[Any], Any], data: Any) -> Any:
        try:
            return function(data)
        except (ValidationError, GSessionError, HTTPException):
            raise
        except Exception as error:
            hint = "validators must raise ValidationError"
            if isinstance(error, RecursionError):
                hint = "a value is nested too deep, or contains itself"
            raise SchemaFailed(
                f"The schema of session[{self.name!r}] failed with {type(error).__name__}; {hint}"
            ) from error

    def _look(self, session: SessionData, raw: bytes | None) -> _Found:
        value, there = _NO_VALUE, False
        if raw is not None:
            try:
                mark, data = typed_access(session).decode(self.name, raw)
            except KeyError:
                pass
            except UnreadableRecord as error:
                typed_access(session).refuse(error)
            else:
                value = self._loaded(session, mark.version, data)
                there = value is not _NO_VALUE
        if not there:
            value = self._default
        if value is _NO_VALUE:
            with contextlib.suppress(ValidationError):
                value = self._run(lambda _: self._form.default(), None)
        return _Found(raw, value, there)

    def _loaded(self, session: SessionData, version: int, data: Any) -> Any:
        """The value of stored data, or ``_NO_VALUE`` if the data is invalid."""
        messages: Any = None
        data, reason = self._upgrade(version, data)
        if not reason:
            try:
                return self._run(self._form.read, data)
            except ValidationError as error:
                reason, messages = "invalid", error.messages
        handle = session.handle
        logger.warning(
            "Session %s: ignored the stored value of %a: %s", handle, self.name[:60], reason
        )
        lifecycle_of(session).repository.events.emit(StoredValueInvalid, self.name, reason, handle)
        if self._invalid == "raise":
            raise InvalidStoredValue(self.name, reason, messages)
        return _NO_VALUE

    def _upgrade(self, version: int, data: Any) -> tuple[Any, str]:
        """Upgrade stored data to the key's version. Returns it, and why that failed or ""."""
        if version > self.version:
            return data, "newer version"
        for older in range(version, self.version):
            upgrade = self._upgraders.get(older)
            if upgrade is None:
                return data, "no upgrader"
            try:
                data = upgrade(data)
            except Exception as error:
                return data, f"upgrade failed with {type(error).__name__}"
        return data, ""

    # -- for a merge

    def upgraded(self, version: int, data: Any) -> Any:
        """Upgrade stored data to the key's version. Raises ``SessionConflict`` if that fails."""
        data, reason = self._upgrade(version, data)
        if reason:
            raise SessionConflict from ValueError(reason)
        return data

    # -- for a sign-in

    def checked(self, merge: MergeFunction) -> MergeFunction:
        """The same policy for stored data, with its results checked by this key."""
        return merge_of_stored(self._form, merge, self._run, self)

    # -- for the schema of a whole session

    def check_stored(self, data: Any) -> None:
        """Raise ``ValidationError`` unless ``data`` has the stored form of the key."""
        self._run(self._form.read, data)

    def mark(self, now: Callable[[], int]) -> Mark:
        """The expiry and version to store with a new value of this key."""
        return self._lasting if self._ttl is None else Mark(now() + self._ttl, self.version)

    def merge_function(self, of_settings: MergeFunction | None) -> MergeFunction | None:
        """The merge policy of the key, or else of the settings. The key checks its results."""
        if self._merge is not None or of_settings is None:
            return self._merge
        cached = self._merge_of_settings
        if cached is None or cached[0] is not of_settings:
            cached = (of_settings, merge_of_stored(self._form, of_settings, self._run, self))
            self._merge_of_settings = cached
        return cached[1]


def _check_scope(name: str, scope: str, at_login: str | None) -> None:
    """Raises ``SettingError``."""
    if scope not in ("session", "user"):
        raise SettingError(
            f"SessionKey({name!r}): scope is {scope!r}; allowed: 'session' or 'user'"
        )
    if scope == "user" and name.startswith("_"):
        raise SettingError(
            f"SessionKey({name!r}): with scope='user', a name can't begin with an underscore"
        )
    if at_login is not None and at_login not in AT_LOGIN:
        raise SettingError(
            f"SessionKey({name!r}): at_login is {at_login!r}; allowed: {', '.join(AT_LOGIN)}"
        )
    if at_login is not None and scope != "user":
        raise SettingError(
            f"SessionKey({name!r}): at_login needs scope='user'; other values stay in the session"
        )


def _fresh(value: Any) -> Any:
    """A copy that the caller may change."""
    kind = type(value)
    if kind in _SHARED or isinstance(value, Enum):
        return value
    if kind is dict:
        if _SHARED.issuperset(map(type, value.values())):
            return value.copy()
        return {key: _fresh(item) for key, item in value.items()}
    if kind is list:
        return [_fresh(item) for item in value]
    return copy.deepcopy(value)


def _with_text_as_keys(shown: Any) -> Any:
    """The same data, with text as the keys of dicts, as JSON needs it."""
    if isinstance(shown, dict):
        plain = all(type(key) is str for key in shown)
        return {
            key if plain else _as_text(key): _with_text_as_keys(item) for key, item in shown.items()
        }
    return list(map(_with_text_as_keys, shown)) if isinstance(shown, (list, tuple)) else shown


def _as_text(key: Any) -> str:
    return json.dumps(key) if isinstance(key, (bool, int, float)) or key is None else str(key)
