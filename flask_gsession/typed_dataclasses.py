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

from marshmallow import Schema, fields, post_load
from marshmallow.validate import OneOf

from .errors import SettingError

# Converting nothing but what JSON cannot express: a dataclass says by its types what goes in.
_FIELDS: dict[Any, Any] = {
    str: fields.String,
    int: lambda **how: fields.Integer(strict=True, **how),
    float: fields.Float,
    bool: lambda **how: fields.Boolean(truthy={True}, falsy={False}, **how),
    Decimal: fields.Decimal,
    UUID: fields.UUID,
    dt.datetime: fields.DateTime,
    dt.date: fields.Date,
    dt.time: fields.Time,
    dt.timedelta: lambda **how: fields.TimeDelta(precision="microseconds", **how),
    Any: lambda **how: fields.Raw(**{"allow_none": True, **how}),
}


def schema_of(cls: type[Any]) -> type[Schema]:
    """A schema whose fields are those of a dataclass, and which makes its instances.

    A field's metadata can hold ``"validate"``, validators of marshmallow, or ``"marshmallow"``, a
    field of its own. Raises ``SettingError`` for a type that has no field.
    """
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init:
            made[field.name] = field.metadata.get("marshmallow") or _field_of(
                hints[field.name], f"{cls.__name__}.{field.name}", _arguments(field)
            )

    def make(self: Schema, data: dict[str, Any], **_: Any) -> Any:
        return cls(**data)

    return type(f"{cls.__name__}Schema", (Schema,), {**made, "_make": post_load(make)})


def _arguments(field: dataclasses.Field[Any]) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if field.default is not dataclasses.MISSING:
        how["load_default"] = field.default
    elif field.default_factory is not dataclasses.MISSING:
        how["load_default"] = field.default_factory
    else:
        how["required"] = True
    if "validate" in field.metadata:
        how["validate"] = field.metadata["validate"]
    return how


def _field_of(hint: Any, place: str, how: dict[str, Any]) -> fields.Field[Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) and len(inner) == 2 and type(None) in inner:
        hint = next(kind for kind in inner if kind is not type(None))
        return _field_of(hint, place, {**how, "allow_none": True})
    if hint in _FIELDS:
        return _FIELDS[hint](**how)  # type: ignore[no-any-return]  # a field of each
    if origin is Literal:
        # Beside OneOf, validators of the application.
        more = how.get("validate", [])
        more = list(more) if isinstance(more, (list, tuple)) else [more]
        return fields.Raw(**{**how, "validate": [OneOf(inner), *more]})
    if origin is list:
        return fields.List(_field_of(inner[0], place, {}), **how)
    if origin is dict and inner[0] is str:
        return fields.Dict(fields.String(), _field_of(inner[1], place, {}), **how)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return fields.Enum(hint, by_value=True, **how)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return fields.Nested(schema_of(hint), **how)
    raise SettingError(
        f"{place}: there is no marshmallow field for {hint}; give one by "
        'field(metadata={"marshmallow": fields....})'
    )
