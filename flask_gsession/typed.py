"""Typed session keys on marshmallow: declared once, checked on the way in and on the way out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, overload

from flask import abort, jsonify, redirect, request, url_for
from flask import session as flask_session
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse

from .codec import IMMUTABLE, is_valid_text
from .data import SessionData, ttl_in_milliseconds
from .errors import (
    GSessionError,
    InvalidStoredValue,
    SchemaFailed,
    SessionConflict,
    SettingError,
    UnreadableRecord,
)
from .events import StoredValueInvalid, logger
from .marks import MAX_VERSION, Mark
from .merge import MISSING, POLICIES, MergeFunction, set_union

try:
    from marshmallow import RAISE, Schema, ValidationError, fields, missing
    from marshmallow.fields import Field

    from .typed_dataclasses import schema_of
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"Typed keys need the package {error.name}: install the extra, flask-gsession[typed]"
    ) from None

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
D = TypeVar("D")

# Fields that dump values of these types as they are, and what of a schema decides how it dumps.
_DUMPED_AS_IT_IS = {fields.String: str, fields.Integer: int, fields.Boolean: bool}
_DUMPING = ("dump", "_serialize", "get_attribute", "dict_class")
_DUMPING_OF_FIELDS = {"serialize", "_serialize", "get_value"}

_NONE: Any = object()  # no value
_OTHER: Any = object()  # a default that no value is


# What a key can be declared by ---------------------------------------------------------------


class _SchemaForm:
    """Values by a schema: dicts, lists of them, or instances of a dataclass."""

    def __init__(self, schema: Schema, kind: type | None = None) -> None:
        self.schema = schema
        self.kind = kind
        self._not_loaded = {
            field.data_key or name for name, field in schema.fields.items() if field.dump_only
        }
        self._plain = _plain_fields(schema)
        self.load: Callable[[Any], Any] = schema.load
        self.dump: Callable[[Any], Any] = self._dump_some if self._not_loaded else schema.dump
        if self._plain:
            self.dump = self._dump_plain

    def given(self, value: Any) -> Any:
        """What ``load`` takes, for a value that a program may give."""
        return self.dump(value) if self.kind is not None and type(value) is self.kind else value

    def _dump_some(self, value: Any) -> Any:
        data = self.schema.dump(value)
        if isinstance(data, dict):
            data = {key: item for key, item in data.items() if key not in self._not_loaded}
        return data

    def _dump_plain(self, value: Any) -> Any:
        data = {}
        if type(value) is dict:
            for name, kind in self._plain:
                item = data[name] = value.get(name)
                if type(item) is not kind:
                    break
            else:
                return data
        return self.schema.dump(value)

    def default(self) -> Any:
        return self.load([] if self.schema.many else {})


class _FieldForm:
    """Values by a single field."""

    def __init__(self, field: Field[Any]) -> None:
        self.schema = Schema.from_dict({"value": field})()  # which binds inner fields
        self._field = self.schema.fields["value"]

    def given(self, value: Any) -> Any:
        """What ``load`` takes: an Enum member or the like in the form in which it is stored."""
        if type(value) not in IMMUTABLE and not isinstance(value, (list, dict, Mapping)):
            try:
                return self.dump(value)
            except (AttributeError, TypeError, ValueError):
                pass  # for load to say what is wrong
        return value

    def load(self, data: Any) -> Any:
        return self._field.deserialize(data, "value", {"value": data})

    def dump(self, value: Any) -> Any:
        return self._field.serialize("value", {"value": value})

    def default(self) -> Any:
        default = self.load(missing)
        if default is missing:
            raise ValidationError("no default")
        return default


def _plain_fields(schema: Schema) -> list[tuple[str, type]]:
    """What a schema dumps as it is, where that is all of it: names of keys, types of values.

    marshmallow takes a third of the time of ``set`` to find that out anew each time.
    """
    kind = type(schema)
    own = any(
        getattr(kind, name) is not getattr(Schema, name) or name in vars(schema)
        for name in _DUMPING
    )
    if own or schema.many or any(kind._hooks[when] for when in ("pre_dump", "post_dump")):
        return []
    found = []
    for name, field in schema.fields.items():
        makes = _DUMPED_AS_IT_IS.get(type(field))
        if makes is None or getattr(field, "as_string", False):
            return []
        if not _DUMPING_OF_FIELDS.isdisjoint(vars(field)):
            return []
        if field.load_only or field.dump_only:
            return []
        if field.data_key not in (None, name) or field.attribute not in (None, name):
            return []
        found.append((name, makes))
    return found


def _form_of(name: str, declared: Any) -> _SchemaForm | _FieldForm:
    if isinstance(declared, type):
        if issubclass(declared, Schema):
            try:
                return _SchemaForm(declared())
            except TypeError as error:
                raise SettingError(
                    f"SessionKey({name!r}): {declared.__name__}() failed ({error}); "
                    "give an instance of the schema"
                ) from error
        if issubclass(declared, Field):
            raise SettingError(
                f"SessionKey({name!r}) got the class {declared.__name__}; give a field, as in "
                f"fields.{declared.__name__}()"
            )
        if dataclasses.is_dataclass(declared):
            return _SchemaForm(schema_of(declared)(), declared)
    elif isinstance(declared, Schema):
        return _SchemaForm(declared)
    elif isinstance(declared, Field):
        return _FieldForm(declared)
    shown = declared.__name__ if isinstance(declared, type) else f"a {type(declared).__name__}"
    raise SettingError(
        f"SessionKey({name!r}) got {shown}; it takes a marshmallow Schema (class or instance), a "
        "field, or a dataclass"
    )


def _agrees(data: Any, made: Any) -> bool:
    """Whether a schema took the data as they are: filling in is allowed, converting is not."""
    if type(data) is dict and type(made) is dict:
        return all(_agrees(item, made[key]) for key, item in data.items() if key in made)
    if type(data) is list and type(made) is list:
        return len(data) == len(made) and all(map(_agrees, data, made))
    if type(data) is float and type(made) is float and math.isnan(data):
        return math.isnan(made)
    return type(data) is type(made) and bool(data == made)


def _fresh(value: Any) -> Any:
    """A copy that its receiver may change."""
    kind = type(value)
    if (kind in IMMUTABLE and kind is not frozenset) or isinstance(value, Enum):
        return value
    if kind is dict:
        return {key: _fresh(item) for key, item in value.items()}
    if kind is list:
        return [_fresh(item) for item in value]
    return copy.deepcopy(value)


# Keys ----------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What a request found: ``value`` is the default, or nothing, where it is not ``there``."""

    raw: bytes | None
    value: Any
    there: bool


class SessionKey(Generic[T]):
    """A key of the session whose values are checked, on the way in and on the way out.

    ``schema``: a marshmallow ``Schema`` (class or instance), a field, or a dataclass; values of a
    schema are dicts, those of a dataclass its instances.
    ``ttl``: seconds, or a ``timedelta``, after which a value expires; None: with the session.
    ``default``: what ``get`` gives where there is no valid value; otherwise the schema's defaults.
    ``merge``: what is stored when two requests changed the key: a word of
    ``SESSION_MERGE_POLICIES``, or a function of base, theirs and mine, which gets and returns what
    ``get`` does. The result is checked; one that is not valid raises ``SessionConflict``.
    ``version``: of the schema, 1 to 65535; it is stored with each value. What is stored without one
    has version 1.
    ``invalid``: what ``get`` does when the stored value is not valid: ``"default"``, or
    ``"raise"`` for ``InvalidStoredValue``. Both log it, without the data, and emit
    ``StoredValueInvalid``.
    ``session``: the ``ext.session`` of a second ``Session``; None: ``flask.session``.

    Raises ``SettingError`` for any other argument. A read costs what a read of the session costs;
    a value that was checked is not checked again in the same request while it is unchanged.
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
    ) -> None: ...

    def __init__(
        self,
        name: str,
        schema: Any,
        *,
        default: Any = _NONE,
        ttl: float | timedelta | None = None,
        merge: str | MergeFunction | None = None,
        version: int = 1,
        invalid: str = "default",
        session: SessionData | None = None,
    ) -> None:
        if type(name) is not str or not name or not is_valid_text(name):
            raise SettingError(f"A SessionKey has a name, not {name!r}")
        if type(version) is not int or not 1 <= version <= MAX_VERSION:
            raise SettingError(f"SessionKey({name!r}): version is {version!r}; allowed: 1 to 65535")
        if invalid not in ("default", "raise"):
            raise SettingError(
                f"SessionKey({name!r}): invalid is {invalid!r}; allowed: 'default' or 'raise'"
            )
        if merge is not None and not callable(merge) and merge not in POLICIES:
            raise SettingError(
                f"SessionKey({name!r}): merge is {merge!r}; allowed: {', '.join(POLICIES)}, or a "
                "function of base, theirs and mine"
            )
        self.name = name
        self.version = version
        self._form = _form_of(name, schema)
        self._default = default
        self._invalid = invalid
        self._merge = merge
        self._target = session
        self._lasting = Mark(0, version)
        self._upgraders: dict[int, Callable[[Any], Any]] = {}
        try:
            self._ttl = None if ttl is None else ttl_in_milliseconds(ttl)
            if default is not _NONE:
                self._form.load(self._form.given(default))
        except ValidationError as error:
            raise SettingError(f"SessionKey({name!r}): its default is not valid: {error}") from None
        except ValueError as error:
            raise SettingError(f"SessionKey({name!r}): {error}") from None

    def __repr__(self) -> str:
        return f"<SessionKey {self.name!r} version={self.version}>"

    @property
    def schema(self) -> Schema:
        """The marshmallow schema; for a field, one with the single field ``value``."""
        return self._form.schema

    @overload
    def get(self) -> T: ...

    @overload
    def get(self, default: D) -> T | D: ...

    def get(self, default: Any = _NONE) -> Any:
        """The checked value, a copy of your own: write changes with ``set`` or ``update``.

        Where there is none, or none that is valid: ``default``, else the default of the key, else
        that of the schema; ``KeyError`` where there is none of these either.

        Raises ``InvalidStoredValue`` where the key was declared so, ``SchemaFailed`` where a
        validator raises something else than ``ValidationError``.
        """
        session = self._session()
        raw = session._raw(self.name)
        known = session._typed.get(self)
        if known is None or known.raw != raw:
            known = self._look(session, raw)
            session._typed[self] = known
        if not known.there and default is not _NONE:
            return default
        if known.value is _NONE:
            raise KeyError(
                f"session[{self.name!r}] holds no valid value, and its schema has no default: "
                "use get(default), or @require_session"
            )
        return _fresh(known.value)

    def set(self, value: Any) -> T:
        """Check ``value`` and put it into the session, with the ttl and version of the key.

        ``value`` is what the schema loads, or an instance of the dataclass. What is stored is what
        the schema dumps. Returns the value as ``get`` does.

        Raises marshmallow's ``ValidationError`` with its messages; nothing is changed then.
        """
        session = self._session()
        loaded, data = self._checked(value)
        check = session._keeper.check
        if check is not None and not check.is_by(self):
            check(self.name, data)
        session._put(self.name, data, self._mark(session))
        if self._merge is not None:
            session._merges[self.name] = self._merged
        return loaded  # type: ignore[no-any-return]  # by the schema

    def update(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> T:
        """Change some fields, by the names that the schema loads; the whole is checked and set.

        Fields that are not named keep their values; where there is no valid value, their defaults.
        Raises what ``set`` and ``get`` raise, ``TypeError`` for a key that has no fields.
        """
        if not self._has_fields():
            raise TypeError(f"session[{self.name!r}] has no fields: use set()")
        try:
            before = self.get()
        except KeyError:
            return self.set({**(changes or {}), **more})
        return self.set({**self._run(self._form.dump, before), **(changes or {}), **more})

    def delete(self) -> bool:
        """Remove the value; whether there was one."""
        return self._session().remove(self.name) == 1

    def exists(self) -> bool:
        """Whether the session has a value under this key. It may be one that is not valid."""
        return self.name in self._session()

    def upgrade(self, *, from_version: int) -> Callable[[Callable[[Any], Any]], Any]:
        """Declare what makes of stored data of ``from_version`` such of the version after it.

        A decorator for a function of the stored data that returns the new ones. Upgraders run one
        after the other when the value is read; the result is checked, and stored with the next
        ``set`` or ``update``. Raises ``SettingError`` for a version that is not an older one, or
        has an upgrader.
        """
        if type(from_version) is not int or not 1 <= from_version < self.version:
            raise SettingError(
                f"SessionKey({self.name!r}) has version {self.version}; there is nothing to "
                f"upgrade from {from_version!r}"
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
        """A view for the value as JSON: ``app.add_url_rule("/x", view_func=key.view())``.

        GET answers the value. PATCH takes an object with the fields to change and answers the new
        value, or 422 with ``{"errors": messages}``. Where there is no value, GET is a 404. Raises
        ``SettingError`` for a key that has no fields.
        """
        if not self._has_fields():
            raise SettingError(f"SessionKey({self.name!r}) has no fields: write a view of your own")

        def view() -> Any:
            try:
                value = self._patched() if request.method == "PATCH" else self.get()
            except ValidationError as error:
                return jsonify(errors=error.messages), 422
            except KeyError:
                abort(404)
            return jsonify(self._run(self._form.dump, value))

        view.__name__ = f"session_{self.name}"
        view.methods = ["GET", "PATCH"]  # type: ignore[attr-defined]  # for add_url_rule
        return view

    # -- helpers

    def _session(self) -> SessionData:
        proxy: Any = flask_session if self._target is None else self._target
        session = proxy._get_current_object()
        if not isinstance(session, SessionData):
            raise SettingError(
                "A SessionKey needs a Session(app) on the application and a SECRET_KEY"
            )
        if session._keeper.typed_keys.setdefault(self.name, self) is not self:
            raise SettingError(f"Two SessionKeys are named {self.name!r}: declare each once")
        return session

    def _patched(self) -> T:
        changes = request.get_json()
        if not isinstance(changes, dict):
            raise ValidationError({"_schema": [self.schema.error_messages["type"]]})
        return self.update(changes)

    def _has_fields(self) -> bool:
        return isinstance(self._form, _SchemaForm) and not self._form.schema.many

    def _mark(self, session: SessionData) -> Mark:
        if self._ttl is None:
            return self._lasting
        return Mark(session._keeper.now() + self._ttl, self.version)

    def _run(self, function: Callable[[Any], Any], data: Any) -> Any:
        try:
            return function(data)
        except (ValidationError, GSessionError, HTTPException):
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SchemaFailed:
        return SchemaFailed(
            f"The schema of session[{self.name!r}] failed with {type(error).__name__}; "
            "validators say what is wrong by ValidationError"
        )

    def _checked(self, value: Any) -> tuple[Any, Any]:
        """The value as the schema makes it, and as it is stored. Raises ``ValidationError``."""
        form = self._form
        try:
            loaded = form.load(form.given(value))
            return loaded, form.dump(loaded)
        except (ValidationError, GSessionError, HTTPException):
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _as_is(self, data: Any) -> Any:
        """The value of ``data`` that need no conversion. Raises ``ValidationError``."""
        loaded = self._run(self._form.load, data)
        if not (_agrees(data, loaded) or _agrees(data, self._run(self._form.dump, loaded))):
            raise ValidationError(["Not in the form in which the schema stores it."])
        return loaded

    def _look(self, session: SessionData, raw: bytes | None) -> _Known:
        if raw is not None:
            try:
                mark, data = session._decoded(self.name, raw)
            except KeyError:
                pass
            except UnreadableRecord as error:
                session._refuse(error.reason, error.detail)
            else:
                value = self._loaded(session, mark.version, data)
                if value is not _NONE:
                    return _Known(raw, value, True)
        if self._default is not _NONE:
            return _Known(raw, self._default, False)
        try:
            return _Known(raw, self._run(lambda _: self._form.default(), None), False)
        except ValidationError:
            return _Known(raw, _NONE, False)

    def _loaded(self, session: SessionData, version: int, data: Any) -> Any:
        """The value of stored data; ``_NONE`` where they are not valid."""
        messages: Any = None
        reason = "newer version" if version > self.version else ""
        while not reason and version < self.version:
            upgrade = self._upgraders.get(version)
            if upgrade is None:
                reason = "no upgrader"
                break
            try:
                data = upgrade(data)
            except Exception as error:
                reason = f"upgrade failed with {type(error).__name__}"
            version += 1
        if not reason:
            try:
                return self._as_is(data)
            except ValidationError as error:
                reason, messages = "invalid", error.messages
        handle = session.handle
        logger.warning(
            "Session %s: what is stored under %a is not used: %s", handle, self.name[:60], reason
        )
        session._keeper.events.emit(StoredValueInvalid, self.name, reason, handle)
        if self._invalid == "raise":
            raise InvalidStoredValue(self.name, reason, messages)
        return _NONE

    def _merged(self, base: Any, theirs: Any, mine: Any) -> Any:
        """The merge policy of the key, between stored values. Its result is checked."""
        merge = POLICIES[self._merge] if isinstance(self._merge, str) else self._merge
        assert merge is not None  # or this is not asked
        try:
            if merge is set_union and list in (type(theirs), type(mine)):
                merged = _list_union(base, theirs, mine)
            elif merge in POLICIES.values():
                merged = merge(base, theirs, mine)
            else:
                values = [
                    side if side is MISSING else self._run(self._form.load, side)
                    for side in (base, theirs, mine)
                ]
                merged = merge(*values)
            return self._checked(merged)[1]
        except ValidationError as error:
            raise SessionConflict from error


def _list_union(base: Any, theirs: Any, mine: Any) -> list[Any]:
    """``set_union`` for lists, as which schemas store sets: their order, then what is new."""
    before, stored, wanted = ([] if side is MISSING else side for side in (base, theirs, mine))
    kept = [item for item in stored if item in wanted or item not in before]
    return kept + [item for item in wanted if item not in before and item not in kept]


# The whole session ---------------------------------------------------------------------------


class SessionSchema:
    """Checks what is put under the keys of a session; made by the setting ``SESSION_SCHEMA``."""

    def __init__(self, declared: Any, now: Callable[[], int]) -> None:
        self._now = now
        self._closed = False
        self.keys: dict[str, SessionKey[Any]] = {}
        if isinstance(declared, type) and issubclass(declared, Schema):
            declared = declared()
        if isinstance(declared, Schema):
            self._closed = declared.unknown == RAISE
            for name, field in declared.fields.items():
                self._add(SessionKey(field.data_key or name, field))
        elif isinstance(declared, (list, tuple)) and all(
            isinstance(key, SessionKey) for key in declared
        ):
            for key in declared:
                self._add(key)
        else:
            raise SettingError(
                f"SESSION_SCHEMA is {repr(declared)[:80]}; allowed: a marshmallow "
                "Schema (class or instance) whose fields are the session's keys, or a list of "
                "SessionKey"
            )
        self._typed = not isinstance(declared, Schema)

    def _add(self, key: SessionKey[Any]) -> None:
        if key.name in self.keys:
            raise SettingError(f"SESSION_SCHEMA has two keys named {key.name!r}")
        self.keys[key.name] = key

    @property
    def policies(self) -> dict[str, MergeFunction]:
        """The merge policies of the keys that have one."""
        return {name: key._merged for name, key in self.keys.items() if key._merge is not None}

    @property
    def typed(self) -> dict[str, Any]:
        """The declared keys that an application has at hand."""
        return dict(self.keys) if self._typed else {}

    def is_by(self, key: SessionKey[Any]) -> bool:
        """Whether ``key`` itself is what is declared under its name, so that it checks."""
        return self.keys.get(key.name) is key

    def __call__(self, name: str, value: Any) -> Mark:
        """Check ``session[name] = value``; the mark it is to have.

        Raises ``ValidationError``, its messages under the key's name.
        """
        key = self.keys.get(name)
        if key is None:
            if self._closed and not name.startswith("_"):
                raise ValidationError({name: ["Unknown field."]})
            return Mark()
        try:
            key._as_is(value)
        except ValidationError as error:
            raise ValidationError({name: error.messages}) from None
        return Mark(0 if key._ttl is None else self._now() + key._ttl, key.version)


# Views ---------------------------------------------------------------------------------------


def use_session(*keys: SessionKey[Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a view the values of typed keys, as keyword arguments of the keys' names.

    Put it below ``@app.route``. Works on async views too. Raises what ``SessionKey.get`` raises,
    ``SettingError`` at once for what is no key.
    """
    for key in keys:
        if not isinstance(key, SessionKey):
            raise SettingError(f"use_session takes SessionKeys, not a {type(key).__name__}")

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        def values() -> dict[str, Any]:
            return {key.name: key.get() for key in keys}

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                return await function(*args, **values(), **kwargs)

            return run_async  # type: ignore[return-value]  # the coroutine function R stands for

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> R:
            return function(*args, **values(), **kwargs)

        return run

    return decorate


def require_session(
    *keys: SessionKey[Any] | str, redirect_to: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a view only where the session has these keys, typed ones with valid values.

    Otherwise the answer is 401, or with ``redirect_to``, the name of an endpoint, a redirect
    there. Put it below ``@app.route``. Works on async views too.
    """
    if not keys:
        raise SettingError("require_session takes the keys that a session must have")

    def refusal() -> BaseResponse | None:
        if all(_is_there(key) for key in keys):
            return None
        if redirect_to is None:
            abort(401)
        return redirect(url_for(redirect_to))

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                refused = refusal()
                return await function(*args, **kwargs) if refused is None else refused

            return run_async  # type: ignore[return-value]  # the coroutine function R stands for

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            refused = refusal()
            return function(*args, **kwargs) if refused is None else refused

        return run

    return decorate


def _is_there(key: SessionKey[Any] | str) -> bool:
    if isinstance(key, str):
        return key in flask_session
    return key.get(_OTHER) is not _OTHER
