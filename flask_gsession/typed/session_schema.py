"""``SESSION_SCHEMA``: checks all values that are put into a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError

from ..errors import SettingError
from ..values.marks import Mark
from ..values.merge import MergeFunction
from .keys import SessionKey


class SessionSchema:
    """Checks all values that are put into a session, as ``SESSION_SCHEMA`` declares them."""

    def __init__(self, declared: Any, now: Callable[[], int]) -> None:
        self._now = now
        self._closed = False
        self.keys: dict[str, SessionKey[Any]] = {}
        if isinstance(declared, type) and issubclass(declared, Schema):
            declared = declared()
        if isinstance(declared, Schema):
            self._closed = declared.unknown == RAISE
            for name, field in declared.load_fields.items():
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
            raise SettingError(
                f"SESSION_SCHEMA has two keys named {key.name!r}: remove or rename one"
            )
        self.keys[key.name] = key

    def policies(self, of_settings: Mapping[str, MergeFunction]) -> dict[str, MergeFunction]:
        """The merge policies of the settings and of the keys, with their results checked."""
        found = dict(of_settings)
        for name, key in self.keys.items():
            policy = key.merge_function(of_settings.get(name))
            if policy is not None:
                found[name] = policy
        return found

    @property
    def typed(self) -> dict[str, Any]:
        """The ``SessionKey`` objects that the application declared itself."""
        return dict(self.keys) if self._typed else {}

    def is_by(self, key: SessionKey[Any]) -> bool:
        """Whether ``key`` was declared for its name. If so, it has checked the value itself."""
        return self.keys.get(key.name) is key

    def __call__(self, name: str, value: Any) -> Mark:
        """Check ``session[name] = value`` and return the mark to store with it.

        Raises ``ValidationError``, with its messages under the key's name.
        """
        key = self.keys.get(name)
        if key is None:
            if self._closed and not name.startswith("_"):
                raise ValidationError({name: ["Unknown field."]})
            return Mark()
        try:
            key.check_stored(value)
        except ValidationError as error:
            raise ValidationError({name: error.messages}) from None
        return key.mark(self._now)
