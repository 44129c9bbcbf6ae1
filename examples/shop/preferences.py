"""What a visitor prefers: checked when it comes in, kept in the session."""

from collections.abc import Mapping
from typing import TypedDict

from flask_gsession import session

from .formats import LANGUAGES

KEY = "preferences"
THEMES = {"system": "Like my system", "light": "Light", "dark": "Dark"}


class Preferences(TypedDict):
    """The kept values."""

    theme: str
    language: str
    notifications: bool


DEFAULTS = Preferences(theme="system", language="en", notifications=True)


def current() -> Preferences:
    """This visitor's preferences; the defaults where nothing is kept."""
    return {**DEFAULTS, **session.get(KEY, {})}


def check(form: Mapping[str, str]) -> tuple[Preferences, dict[str, str]]:
    """The preferences that a form asks for, and a message for each field that is wrong."""
    theme, language = form.get("theme", ""), form.get("language", "")
    notifications = form.get("notifications", "off")
    errors = {}
    if theme not in THEMES:
        errors["theme"] = f"Choose one of: {', '.join(THEMES.values())}."
    if language not in LANGUAGES:
        errors["language"] = f"Choose one of: {', '.join(LANGUAGES.values())}."
    if notifications not in ("on", "off"):
        errors["notifications"] = "Tick the box or leave it empty."
    wanted = Preferences(theme=theme, language=language, notifications=notifications == "on")
    return wanted, errors


def keep(wanted: Preferences) -> None:
    """Keep checked preferences in the session."""
    session[KEY] = wanted
