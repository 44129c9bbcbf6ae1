"""Marshmallow schemas of dataclasses."""

from __future__ import annotations

import dataclasses
import datetime as dt
import types
import typing
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, Union
from uuid import UUID

from marshmallow import Schema, ValidationError, fields, post_load
from marshmallow.validate import OneOf

from ..errors import SettingError


class StrictString(fields.String):
    """Refuses bytes."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(value, str):
            raise self.make_error("invalid")
        return super()._deserialize(value, *args, **kwargs)


class StrictFloat(fields.Float):
    """Refuses text."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> float:
        if not isinstance(value, (int, float)):
            raise self.make_error("invalid")
        return super()._deserialize(value, *args, **kwargs)


class StrictBoolean(fields.Boolean):
    """Accepts only True and False."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> bool:
        if type(value) is not bool:
            raise self.make_error("invalid")
        return value


class _StrictEnum(fields.Enum):  # type: ignore[type-arg]  # not generic before 4.0
    """An enum member by its value, which must have the exact type."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        member = super()._deserialize(value, *args, **kwargs)
        if value is not member and type(value) is not type(member.value):
            raise self.make_error("unknown", choices=self.choices_text)
        return member


class _OneOfTypes(OneOf):
    """Compares types too: 1 is not True."""

    def __call__(self, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in self.choices):
            raise ValidationError(self._format_error(value))
        return value


class _StrictDecimal(fields.Decimal):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Decimal:
        if not isinstance(value, (int, float, str, Decimal)):
            raise self.make_error("invalid")
        return super()._deserialize(value, *args, **kwargs)


class _StrictUUID(fields.UUID):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> UUID:
        if not isinstance(value, (str, UUID)):
            raise self.make_error("invalid_uuid")
        return super()._deserialize(value, *args, **kwargs)


class _ExactTimeDelta(fields.TimeDelta):
    """Microseconds, as a float if that is exact, otherwise as an int."""

    def __init__(self, **how: Any) -> None:
        super().__init__(precision="microseconds", **how)

    def _serialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if value is None:
            return None
        exact = value // dt.timedelta(microseconds=1)
        return float(exact) if int(float(exact)) == exact else exact

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> dt.timedelta:
        if isinstance(value, dt.timedelta):
            return value
        if type(value) not in (int, float):
            raise self.make_error("invalid")
        try:
            exact = int(value) if value == int(value) else value
            return dt.timedelta(microseconds=exact)
        except (OverflowError, ValueError) as error:
            raise self.make_error("invalid") from error


class _IntegerKey(fields.Integer):
    """An integer as the key of a dict; JSON has only text there."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        if not isinstance(value, (int, str)):
            raise self.make_error("invalid")
        return super()._deserialize(value, *args, **kwargs)


# These convert only types that JSON lacks. Everything else must have the declared type.
_FIELDS: dict[Any, Any] = {
    str: StrictString,
    int: lambda **how: fields.Integer(strict=True, **how),
    float: StrictFloat,
    bool: StrictBoolean,
    Decimal: _StrictDecimal,
    UUID: _StrictUUID,
    dt.datetime: fields.DateTime,
    dt.date: fields.Date,
    dt.time: fields.Time,
    dt.timedelta: _ExactTimeDelta,
    Any: lambda **how: fields.Raw(**{"allow_none": True, **how}),
}

# The schema classes made so far, by dataclass.
_Known = dict[type[Any], type[Schema]]


def schema_of(cls: type[Any], known: _Known | None = None) -> type[Schema]:
    """A schema with the fields of a dataclass, which loads to its instances.

    A field's metadata may hold ``"validate"`` (marshmallow validators) or ``"marshmallow"`` (a
    field to use instead). A dataclass may contain itself. Raises ``SettingError`` for a type
    without a field.
    """
    known = {} if known is None else known
    known[cls] = Schema  # a placeholder, since the dataclass may contain itself
    made: dict[str, Any] = {}
    hints = _hints_of(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            made[field.name] = field.metadata.get("marshmallow") or _field_of(
                hints[field.name], f"{cls.__name__}.{field.name}", _arguments(field), known
            )

    def make(self: Schema, data: dict[str, Any], **_: Any) -> Any:
        return cls(**data)

    # Unregistered, since the application may have a schema of this name.
    made |= {"_make": post_load(make), "Meta": type("Meta", (), {"register": False})}
    known[cls] = type(f"{cls.__name__}Schema", (Schema,), made)
    return known[cls]


def _hints_of(cls: type[Any]) -> dict[str, Any]:
    # A dataclass defined in a function can refer to itself by name.
    try:
        return typing.get_type_hints(cls, localns={cls.__name__: cls})
    except NameError as error:
        raise SettingError(
            f"{cls.__name__}: {error}; define the dataclass at module level, where its types are "
            "known"
        ) from error


def _arguments(field: dataclasses.Field[Any]) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if field.default is not dataclasses.MISSING:
        default = field.default  # may be a function, which marshmallow would call
        how["load_default"] = (lambda: default) if callable(default) else default
    elif field.default_factory is not dataclasses.MISSING:
        how["load_default"] = field.default_factory
    else:
        how["required"] = True
    if "validate" in field.metadata:
        how["validate"] = field.metadata["validate"]
    return how


def _field_of(hint: Any, place: str, how: dict[str, Any], known: _Known) -> fields.Field[Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) and len(inner) == 2 and type(None) in inner:
        hint = next(kind for kind in inner if kind is not type(None))
        return _field_of(hint, place, {**how, "allow_none": True}, known)
    if hint in _FIELDS:
        return _FIELDS[hint](**how)  # type: ignore[no-any-return]
    if origin is Literal:
        more = how.get("validate", [])
        more = list(more) if isinstance(more, (list, tuple)) else [more]
        return fields.Raw(**{**how, "validate": [_OneOfTypes(inner), *more]})
    if origin is list:
        return fields.List(_field_of(inner[0], place, {}, known), **how)
    if origin is dict:
        key = _IntegerKey() if inner[0] is int else _field_of(inner[0], place, {}, known)
        return fields.Dict(key, _field_of(inner[1], place, {}, known), **how)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _StrictEnum(hint, by_value=True, **how)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint not in known:
            schema_of(hint, known)
        return fields.Nested(lambda: known[hint](), **how)
    raise SettingError(
        f"{place}: there is no marshmallow field for {hint}; set one with "
        'field(metadata={"marshmallow": fields....})'
    )
