"""Plain schemas: their dump equals their input, so it needn't be verified.

For a plain schema, ``set`` costs no more than marshmallow's own ``load`` and ``dump``.
"""

from __future__ import annotations

from typing import Any

from marshmallow import INCLUDE, Schema, fields, missing
from marshmallow.fields import Field
from marshmallow.validate import And

from .dataclasses import StrictBoolean, StrictFloat, StrictString
from .dumping import loads_booleans

#: Returned by ``plain_copy`` if it doesn't apply.
NOT_PLAIN: Any = object()

_PLAIN = {str, int, bool, float, type(None)}
_SCALARS = {
    fields.String,
    fields.Integer,
    fields.Boolean,
    fields.Float,
    fields.Email,
    fields.Url,
    StrictBoolean,
    StrictFloat,
    StrictString,
}
_OF_SCHEMAS = (
    "dict_class",
    "dump",
    "get_attribute",
    "load",
    "_call_and_store",
    "_deserialize",
    "_do_load",
    "_serialize",
)
_OF_FIELDS = {
    "deserialize",
    "get_value",
    "serialize",
    "_deserialize",
    "_serialize",
    "_validate",
    "_validated",
    "_validate_missing",
}


def is_plain_schema(schema: Schema, above: tuple[type, ...] = ()) -> bool:
    """Whether all fields are plain, and no hook or override changes loads or dumps."""
    kind = type(schema)
    if kind in above or schema.unknown == INCLUDE or any(kind._hooks.values()):
        return False
    if any(getattr(kind, name) is not getattr(Schema, name) for name in _OF_SCHEMAS):
        return False
    if not vars(schema).keys().isdisjoint(_OF_SCHEMAS):
        return False
    return all(
        field.data_key in (None, name)
        and field.attribute in (None, name)
        and not field.load_only
        and not field.dump_only
        and is_plain_field(field, (*above, kind))
        for name, field in schema.fields.items()
    )


def is_plain_field(field: Field[Any], above: tuple[type, ...] = ()) -> bool:
    """Whether a field loads and dumps plain values unchanged."""
    kind = type(field)
    if not vars(field).keys().isdisjoint(_OF_FIELDS) or field.dump_default is not missing:
        return False
    if getattr(field, "pre_load", None) or getattr(field, "post_load", None):
        return False
    if not all(map(_is_from_marshmallow, field.validators)):
        return False  # it may change the value, or accept it only once
    if kind in _SCALARS:
        if isinstance(field, fields.Boolean):
            return loads_booleans(field)
        return not getattr(field, "as_string", False)
    if kind is fields.Raw:
        return True
    if isinstance(field, fields.List):
        return kind is fields.List and is_plain_field(field.inner, above)
    if isinstance(field, fields.Nested):
        return (
            kind is fields.Nested
            and field.unknown != INCLUDE
            and is_plain_schema(field.schema, above)
        )
    if isinstance(field, fields.Dict):
        key, value = field.key_field, field.value_field
        return (
            kind is fields.Dict
            and (key is None or (type(key) is fields.String and is_plain_field(key)))
            and (value is None or is_plain_field(value, above))
        )
    return False


def _is_from_marshmallow(validator: Any) -> bool:
    inner = validator.validators if isinstance(validator, And) else ()
    return type(validator).__module__ == And.__module__ and all(map(_is_from_marshmallow, inner))


def plain_copy(value: Any, loaded: Any) -> Any:
    """A copy of ``loaded`` if it equals ``value`` and has only dicts, lists and plain values.

    Otherwise ``NOT_PLAIN``.
    """
    kind = type(loaded)
    if type(value) is not kind:
        return NOT_PLAIN
    if kind in _PLAIN:
        return loaded if value == loaded else NOT_PLAIN
    copied: Any
    if kind is dict:
        if len(value) != len(loaded):
            return NOT_PLAIN
        copied = {}
        for key, item in loaded.items():
            given = value.get(key, NOT_PLAIN)
            kind = type(item)
            if kind in _PLAIN:
                if type(given) is not kind or given != item:
                    return NOT_PLAIN
            else:
                item = plain_copy(given, item)
                if item is NOT_PLAIN:
                    return NOT_PLAIN
            if type(key) is not str:
                return NOT_PLAIN
            copied[key] = item
        return NOT_PLAIN if "\0pairs" in copied else copied
    if kind is list:
        if len(value) != len(loaded):
            return NOT_PLAIN
        copied = []
        for given, item in zip(value, loaded, strict=True):
            item = plain_copy(given, item)
            if item is NOT_PLAIN:
                return NOT_PLAIN
            copied.append(item)
        return copied
    return NOT_PLAIN
