"""Load, dump and verify the values of a typed key, declared by a schema or by a field.

A value has three forms: input (data for the schema to load), loaded (the result), and stored (the
schema's dump, without computed fields).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from marshmallow import Schema, ValidationError, fields, missing
from marshmallow.decorators import PRE_LOAD
from marshmallow.fields import Field
from werkzeug.exceptions import HTTPException

from ..errors import GSessionError, SettingError
from ..values.codec import IMMUTABLE
from .comparison import Path, common, covers, difference, drops_keys, without
from .dataclasses import schema_of
from .dumping import (
    SHOWN,
    STORED,
    copy_for_dumping,
    field_for_dumping,
    without_computed,
    without_computed_in_field,
)
from .plain import NOT_PLAIN, is_plain_field, is_plain_schema, plain_copy
from .stored import copy_of_containers, from_stored, to_stored

_CHANGED = "The session can't keep this value: it would come back changed."
_NOT_DUMPED = "The session can't keep this value: the schema can't dump it."
_NOT_LOADED = "The session can't keep this value: the schema can't load its own dump. "
# The types of input; a value of another type has been loaded. An iterator can be read only once.
_INPUT: Any = (Mapping, list, tuple, Iterator, type(None), *IMMUTABLE)


class Form:
    """The base of ``SchemaForm`` and ``FieldForm``. All methods raise ``ValidationError``.

    They also let errors from the application's hooks and validators through.
    """

    has_fields = False

    def __init__(self, name: str, schema: Schema, load: Callable[[Any], Any]) -> None:
        self.name = name  # of the key, for messages
        self.schema = schema
        self._load = load

    # -- differs between schemas and fields

    @property
    def is_plain(self) -> bool:
        """Whether the schema has only plain values, and no code of the application."""
        raise NotImplementedError

    @property
    def show(self) -> Callable[[Any], Any]:
        """Dumps a value for clients, with its computed fields."""
        raise NotImplementedError

    @property
    def dumps(self) -> Sequence[Callable[[Any], Any]]:
        """The ways to dump a value for the session; the first that loads again wins."""
        raise NotImplementedError

    def default(self) -> Any:
        raise NotImplementedError

    # -- common

    def load(self, data: Any) -> Any:
        """Load ``data``, protected from changes by hooks."""
        return self._load(data if self.is_plain else copy_of_containers(data))

    def accept(self, value: Any, *, handed_out: bool = False) -> tuple[Any, Any]:
        """The loaded and the stored form of ``value``, verified by loading the stored form.

        ``value`` may be input or a loaded value. If both are possible, it is a loaded value if
        ``handed_out`` is true, and otherwise input, unless that would lose keys.
        """
        if handed_out or not (type(value) is dict or isinstance(value, _INPUT)):
            try:
                return self._verified(value)
            except Exception as error:
                try:
                    return self.accept_input(value)
                except ValidationError:
                    if isinstance(error, ValidationError):
                        raise error from None
                    raise
        try:
            made = self.accept_input(value)
        except Exception as error:
            try:
                return self._verified(value)
            except Exception:
                raise error from None
        if not self.is_plain and drops_keys(from_stored(made[1]), value):
            try:
                return self._verified(value)
            except Exception:  # so ``value`` is input, with fields that the schema excludes
                return made
        return made

    def accept_input(self, value: Any) -> tuple[Any, Any]:
        """Like ``accept``, for input."""
        loaded = self.load(value)
        if self.is_plain:
            copied = plain_copy(value, loaded)
            if copied is not NOT_PLAIN:
                return loaded, copied  # the stored form is the input, which has just been loaded
        return self._verified(loaded, was_loaded=True)

    def read(self, data: Any) -> Any:
        """Load stored data, which must have the form that the schema dumps."""
        data = from_stored(data)
        loaded = self.load(data)
        if self.is_plain and covers(loaded, data):
            return loaded
        for stored in self._all_stored(loaded):
            dumped = from_stored(stored)
            if covers(dumped, data) and covers(data, dumped):
                return loaded
            # The schema may have gained and lost fields since.
            known = common(dumped, data)
            if covers(dumped, known) and (known == data or self._is_loaded_from(known, loaded)):
                return self._verified(loaded)[0]
        raise ValidationError(["Not in the form that the schema dumps."])

    def dumped(self, value: Any) -> Any:
        """The input form of a loaded value."""
        try:
            return self.dumps[0](value if self.is_plain else copy_of_containers(value))
        except (ValidationError, GSessionError, HTTPException):
            raise
        except Exception as error:
            message = f"{_NOT_DUMPED} ({type(error).__name__})"
            raise ValidationError(self._messages(self._not_dumped(value), message)) from error

    def _verified(self, value: Any, *, was_loaded: bool = False) -> tuple[Any, Any]:
        """The loaded and the stored form, if the stored form loads to an equal value.

        Loading may add defaults, which must survive another round trip.
        """
        for _ in range(2):
            again, stored = self._round_trip(value, was_loaded)
            path = difference(again, value)
            if path is None:
                return again, stored
            value, was_loaded = again, True
        raise ValidationError(self._messages(path or ()))

    def _round_trip(self, value: Any, was_loaded: bool) -> tuple[Any, Any]:
        """The loaded and the stored form. The loaded form may contain more than ``value``."""
        failures = []
        for stored in self._all_stored(value):
            try:
                again, stored = self._reloaded(stored)
            except ValidationError as error:
                failures.append(_explained(error.messages) if was_loaded else error.messages)
                continue
            path = difference(value, again)
            if path is None:
                return again, stored
            failures.append(self._messages(path))
        if not failures:
            self.dumped(value)  # raises an error that names the field
        raise ValidationError(failures[0] if failures else self._messages((), _NOT_DUMPED))

    def _all_stored(self, value: Any) -> Iterator[Any]:
        """The results of all ways to dump ``value`` that don't fail."""
        refused: GSessionError | None = None
        found = False
        for dump in self.dumps:
            try:
                copied = value if self.is_plain else copy_of_containers(value)
                stored = to_stored(self.name, dump(copied))
            except HTTPException:
                raise
            except GSessionError as error:
                refused = refused or error
            except Exception:
                continue
            else:
                found = True
                yield stored
        if refused is not None and not found:
            raise refused

    def _is_loaded_from(self, data: Any, loaded: Any) -> bool:
        try:
            again = self.load(data)
        except Exception:  # a hook may need a missing field
            return False
        return difference(loaded, again) is None and difference(again, loaded) is None

    def _reloaded(self, stored: Any) -> tuple[Any, Any]:
        """Load ``stored``; returns the value and the part of ``stored`` that was loaded.

        Marshmallow doesn't validate defaults. So a stored default that doesn't load is left out,
        and the schema fills it in.
        """
        data = from_stored(stored)
        try:
            return self.load(data), stored
        except ValidationError as error:
            loadable = without(data, error.messages)
            if loadable == data:
                raise
            try:
                return self.load(loadable), to_stored(self.name, loadable)
            except ValidationError:
                raise error from None

    def _not_dumped(self, value: Any) -> Path:
        """The path to the part of a value that can't be dumped."""
        return ()

    def _messages(self, path: Path, message: str = _CHANGED) -> Any:
        messages: Any = [message]
        for step in reversed(self._names(path)):
            messages = {step: messages}
        return messages

    def _names(self, path: Path) -> Path:
        return path


class SchemaForm(Form):
    """Values of a schema: dicts, lists of dicts, or objects that its hooks make."""

    def __init__(self, name: str, schema: Schema) -> None:
        super().__init__(name, schema, schema.load)
        self.has_fields = not schema.many

    @cached_property
    def is_plain(self) -> bool:
        return is_plain_schema(self.schema)

    @cached_property
    def show(self) -> Callable[[Any], Any]:
        return copy_for_dumping(self.schema, SHOWN).dump

    @cached_property
    def dumps(self) -> Sequence[Callable[[Any], Any]]:
        if self.is_plain:
            return [self.schema.dump]
        ways = [copy_for_dumping(self.schema, dumping).dump for dumping in STORED]
        # Hooks may need computed fields.
        return [*ways, lambda value: without_computed(self.show(value), self.schema)]

    def default(self) -> Any:
        try:
            return self.load([] if self.schema.many else {})
        except ValidationError:
            raise
        except Exception as error:
            if self.schema._hooks[PRE_LOAD]:  # a hook may need a missing field
                raise ValidationError("no default") from error
            raise

    def accept_changes(self, before: Any, changes: Mapping[str, Any]) -> tuple[Any, Any]:
        """Like ``accept``, for a loaded value with changes to its input form."""
        sent = self._changed(before, changes)
        try:
            return self.accept_input(sent)
        except ValidationError as error:
            # An invalid default may be left out of the input if the result still has it.
            loadable = without(sent, error.messages)
            if not isinstance(before, dict) or any(
                key not in loadable or loadable[key] != item for key, item in changes.items()
            ):
                raise
            try:
                made = self.accept_input(loadable)
            except ValidationError:
                raise error from None
            stays = {key: item for key, item in before.items() if key not in changes}
            if difference(stays, made[0]) is not None:
                raise
            return made

    def _changed(self, value: Any, changes: Mapping[str, Any]) -> Any:
        """The input form of ``value`` with ``changes``."""
        sent = (
            from_stored(self._round_trip(value, True)[1])
            if not self.is_plain
            else self.dumped(value)
        )
        names = {
            field.data_key if field.data_key is not None else name: (field.attribute or name, field)
            for name, field in self.schema.load_fields.items()
        }
        if isinstance(sent, Mapping) and sent and names.keys().isdisjoint(sent):
            # Hooks rename the fields in the input: change the loaded fields instead.
            inner = {key for key in changes if key in names and key not in sent}
            if inner and not isinstance(value, dict):
                raise TypeError(
                    f"session[{self.name!r}]: hooks of its schema change the names of fields: "
                    "use set()"
                )
            for key in inner:
                attribute, field = names[key]
                value = {**value, attribute: field.deserialize(changes[key], key, changes)}
            sent = self.dumped(value) if inner else sent
            changes = {key: item for key, item in changes.items() if key not in inner}
        return {**sent, **changes}

    def _not_dumped(self, value: Any) -> Path:
        for index, one in enumerate(value) if self.schema.many else [(0, value)]:
            for name, field in self.schema.load_fields.items():
                try:
                    field.serialize(name, one, accessor=self.schema.get_attribute)
                except Exception:
                    at = (index,) if self.schema.many else ()
                    return (*at, field.attribute or name)
        return ()

    def _names(self, path: Path) -> Path:
        if not path:
            return ("_schema",)
        at = 1 if self.schema.many else 0
        for name, field in self.schema.fields.items():
            if path[at : at + 1] == (field.attribute or name,):
                key = field.data_key if field.data_key is not None else name
                return (*path[:at], key, *path[at + 1 :])
        return path


class FieldForm(Form):
    """Values of a single field."""

    def __init__(self, name: str, field: Field[Any]) -> None:
        if field.parent is None:
            try:
                schema = Schema.from_dict({"value": field})()  # binds inner fields
            except AttributeError as error:
                raise SettingError(
                    f"SessionKey({name!r}): fields.{type(field).__name__} needs a schema with its "
                    f"methods ({error})"
                ) from None
            self._field = schema.fields["value"]
        else:  # the field stays bound to its own schema
            schema = Schema.from_dict({"value": fields.Raw()})()
            self._field = schema.fields["value"] = field
        super().__init__(name, schema, self._deserialize)

    @cached_property
    def is_plain(self) -> bool:
        return is_plain_field(self._field)

    @cached_property
    def show(self) -> Callable[[Any], Any]:
        return _serializer(field_for_dumping(self._field, SHOWN))

    @cached_property
    def dumps(self) -> Sequence[Callable[[Any], Any]]:
        field = self._field
        if self.is_plain:
            return [_serializer(field)]
        ways = [_serializer(field_for_dumping(field, dumping)) for dumping in STORED]
        return [*ways, lambda value: without_computed_in_field(self.show(value), field)]

    def default(self) -> Any:
        default = self.load(missing)
        if default is missing:
            raise ValidationError("no default")
        return default

    def _deserialize(self, data: Any) -> Any:
        return self._field.deserialize(data, "value", {"value": data})


def form_of(name: str, declared: Any) -> SchemaForm | FieldForm:
    """The form of a declared schema, field or dataclass. Raises ``SettingError``."""
    if isinstance(declared, type):
        if issubclass(declared, Schema):
            try:
                return SchemaForm(name, declared())
            except TypeError as error:
                raise SettingError(
                    f"SessionKey({name!r}): {declared.__name__}() failed ({error}); "
                    "pass an instance of the schema"
                ) from error
        if issubclass(declared, Field):
            raise SettingError(
                f"SessionKey({name!r}) got the class {declared.__name__}; pass a field, as in "
                f"fields.{declared.__name__}()"
            )
        if dataclasses.is_dataclass(declared):
            return SchemaForm(name, schema_of(declared)())
    elif isinstance(declared, Schema):
        return SchemaForm(name, declared)
    elif isinstance(declared, Field):
        return FieldForm(name, declared)
    shown = declared.__name__ if isinstance(declared, type) else f"a {type(declared).__name__}"
    raise SettingError(
        f"SessionKey({name!r}) got {shown}; it takes a marshmallow Schema (class or instance), a "
        "field, or a dataclass"
    )


def _serializer(field: Field[Any]) -> Callable[[Any], Any]:
    return lambda value: field.serialize("value", {"value": value}, accessor=lambda *_: value)


def _explained(messages: Any) -> Any:
    """The messages of the second load, with a hint that they aren't about the input."""
    if isinstance(messages, dict):
        return {key: _explained(inner) for key, inner in messages.items()}
    if isinstance(messages, list):
        return [_explained(inner) for inner in messages]
    return f"{_NOT_LOADED}({messages})"
