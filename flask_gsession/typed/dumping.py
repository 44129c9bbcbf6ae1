"""Copies of a schema whose dump can be loaded again, at every level of nesting.

A schema dumps fields that it doesn't load (computed or ``dump_only``), and doesn't dump fields
that it loads (unknown ones with ``unknown=INCLUDE``). A copy for the session leaves out the former
and includes the latter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from marshmallow import INCLUDE, Schema, fields
from marshmallow.decorators import POST_DUMP, PRE_DUMP
from marshmallow.fields import Field


class Dumping(NamedTuple):
    """Whether a copy of a schema dumps ``computed`` fields, and the hooks it leaves out."""

    computed: bool
    without_hooks: tuple[str, ...] = ()


SHOWN = Dumping(computed=True)
#: The ways to dump a value for the session; the first that loads again wins. Hooks may have been
#: written for clients, so they may drop fields that are None, or mask them.
STORED = (
    Dumping(computed=False),
    Dumping(computed=False, without_hooks=(POST_DUMP,)),
    Dumping(computed=False, without_hooks=(POST_DUMP, PRE_DUMP)),
)


def copy_for_dumping(schema: Schema, dumping: Dumping, unknown: str | None = None) -> Schema:
    """A copy of a schema for its ``dump``, which keeps unknown fields.

    ``unknown`` comes from a ``Nested`` field, and overrides the schema's.
    """
    twin = copy.copy(schema)
    twin.dump_fields = {
        name: field_for_dumping(field, dumping)
        for name, field in schema.dump_fields.items()
        if dumping.computed or not field.dump_only
    }
    if dumping.without_hooks:
        vars(twin)["_hooks"] = _without(schema._hooks, dumping.without_hooks)
    if (unknown or schema.unknown) == INCLUDE:
        vars(twin)["_serialize"] = functools.partial(_serialize_with_unknown, twin)
    return twin


def field_for_dumping(field: Field[Any], dumping: Dumping) -> Field[Any]:
    """Like ``copy_for_dumping``, for a field: a copy if it contains a schema at any depth."""
    twin: Any = copy.copy(field)
    if isinstance(field, fields.Nested):
        kind: Any = type(field)
        twin.__class__ = _nested_for_dumping(kind, dumping)
    elif isinstance(field, fields.List):
        twin.inner = field_for_dumping(field.inner, dumping)
    elif isinstance(field, fields.Tuple):
        twin.tuple_fields = [field_for_dumping(inner, dumping) for inner in field.tuple_fields]
    elif isinstance(field, fields.Mapping) and field.value_field is not None:
        twin.value_field = field_for_dumping(field.value_field, dumping)
    elif isinstance(field, fields.Boolean) and not dumping.computed and not loads_booleans(field):
        words = [_first(field.falsy), _first(field.truthy)]
        twin._serialize = lambda value, *_, **__: None if value is None else words[bool(value)]
    else:
        return field
    return twin  # type: ignore[no-any-return]


def loads_booleans(field: fields.Boolean) -> bool:
    """Whether a field loads the True and False that it dumps, and not only words of its own."""
    return not field.truthy or (True in field.truthy and False in field.falsy)


def without_computed(data: Any, schema: Schema) -> Any:
    """A schema's dump without the computed fields, if no hook changed the names."""
    if isinstance(data, list):
        return [without_computed(item, schema) for item in data]
    if not isinstance(data, Mapping):
        return data
    found = dict(data)
    for name, field in schema.dump_fields.items():
        key = name if field.data_key is None else field.data_key
        if key in found:
            if field.dump_only:
                del found[key]
            else:
                found[key] = without_computed_in_field(found[key], field)
    return found


def without_computed_in_field(data: Any, field: Field[Any]) -> Any:
    """Like ``without_computed``, for the dump of a field."""
    if isinstance(field, fields.Nested):
        return data if isinstance(field, fields.Pluck) else without_computed(data, field.schema)
    if isinstance(field, fields.List) and isinstance(data, list):
        return [without_computed_in_field(item, field.inner) for item in data]
    if isinstance(field, fields.Tuple) and isinstance(data, tuple):
        return tuple(map(without_computed_in_field, data, field.tuple_fields))
    if isinstance(field, fields.Mapping) and field.value_field and isinstance(data, Mapping):
        inner = field.value_field
        return {key: without_computed_in_field(item, inner) for key, item in data.items()}
    return data


@functools.cache
def _nested_for_dumping(kind: Any, dumping: Dumping) -> Any:
    """A class of ``Nested`` fields that copy their schema on the first dump.

    A copy made earlier would fail: a schema may contain itself, or name classes that don't exist
    yet.
    """

    def schema(self: Any) -> Schema:
        if self._for_dumping is None:
            inner = super(made, self).schema
            self._for_dumping = copy_for_dumping(inner, dumping, self.unknown)
        return self._for_dumping  # type: ignore[no-any-return]

    made: Any = type(kind.__name__, (kind,), {"_for_dumping": None, "schema": property(schema)})
    return made


def _serialize_with_unknown(twin: Schema, obj: Any, *, many: bool = False) -> Any:
    data: Any = type(twin)._serialize(twin, obj, many=many)
    if not many and isinstance(obj, Mapping):
        known = {
            (field.attribute or name).partition(".")[0] for name, field in twin.load_fields.items()
        }
        for key, item in obj.items():
            if key not in known:
                data.setdefault(key, item)
    return data


def _without(hooks: Mapping[str, Any], tags: Collection[str]) -> dict[str, Any]:
    found = dict(hooks)
    found.update((tag, []) for tag in (PRE_DUMP, POST_DUMP) if tag in tags or tag not in hooks)
    return found


def _first(words: Any) -> Any:
    """The first word, in an order that is the same in every process."""
    return min(words, key=repr, default=None)
