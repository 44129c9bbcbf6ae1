"""A visitor's preferences: declared once, checked by their schema wherever they come from.

After the sign-in it belongs to the user, and is the same on all their devices.
"""

from collections.abc import Mapping
from typing import Any

from marshmallow import Schema, fields
from marshmallow.validate import OneOf

from flask_gsession.typed import SessionKey

from .formats import LANGUAGES

KEY = "preferences"
THEMES = {"system": "Like my system", "light": "Light", "dark": "Dark"}

Preferences = dict[str, Any]


def _one_of(choices: Mapping[str, str]) -> OneOf:
    return OneOf(choices, error=f"Choose one of: {', '.join(choices.values())}.")


class PreferencesSchema(Schema):
    """The preferences page, and what it keeps."""

    theme = fields.Str(validate=_one_of(THEMES), load_default="system")
    language = fields.Str(validate=_one_of(LANGUAGES), load_default="en")
    notifications = fields.Bool(
        truthy={True, "on"},
        falsy={False, "off"},
        load_default=True,
        error_messages={"invalid": "Tick the box or leave it empty."},
    )


preferences = SessionKey(KEY, PreferencesSchema, scope="user")
DEFAULTS: Preferences = PreferencesSchema().load({})


def current() -> Preferences:
    """This visitor's preferences; the defaults where nothing is kept, or nothing valid."""
    return preferences.get()


def check(form: Mapping[str, str]) -> tuple[Preferences, dict[str, str]]:
    """The preferences that a form asks for, and a message for each field that is wrong."""
    wanted: Preferences = {
        "theme": form.get("theme", ""),
        "language": form.get("language", ""),
        "notifications": form.get("notifications", "off"),  # browsers send nothing for no
    }
    problems = preferences.schema.validate(wanted)
    errors = {name: str(messages[0]) for name, messages in problems.items()}
    return wanted | {"notifications": wanted["notifications"] == "on"}, errors


def keep(wanted: Preferences) -> None:
    """Keep preferences, of the user if there is one."""
    preferences.set(wanted)
