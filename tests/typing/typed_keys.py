"""The types that mypy infers for typed keys. Checked, never run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, assert_type

from flask import Flask
from marshmallow import Schema, fields

from flask_gsession import Session
from flask_gsession.typed import SessionKey, require_session, use_session


class AddressSchema(Schema):
    street = fields.Str(required=True)


@dataclass(frozen=True)
class Preferences:
    theme: str = "system"
    notifications: bool = True


app = Flask(__name__)
preferences = SessionKey("preferences", Preferences, ttl=timedelta(hours=24), merge="dict")
address = SessionKey("address", AddressSchema)
nickname = SessionKey("nickname", AddressSchema(), default={"street": ""})
user_id = SessionKey("user_id", fields.Int(strict=True))
birthday = SessionKey("birthday", fields.Date(), ttl=60)
Session(app, schema=[preferences, address, user_id])

assert_type(preferences, SessionKey[Preferences])
assert_type(preferences.get(), Preferences)
assert_type(preferences.get().theme, str)
assert_type(preferences.set(Preferences(theme="dark")), Preferences)
assert_type(preferences.update(theme="dark"), Preferences)
assert_type(preferences.get(None), Preferences | None)
assert_type(address.get(), dict[str, Any])
assert_type(nickname.get(), dict[str, Any])
assert_type(user_id, SessionKey[int])
assert_type(user_id.get(), int)
assert_type(user_id.get(None), int | None)
assert_type(birthday.get(), date)
assert_type(preferences.exists(), bool)
assert_type(preferences.delete(), bool)

preferences.get().theme.nothing()  # type: ignore[attr-defined]
SessionKey("user_id", fields.Int(), default="one")  # type: ignore[misc]


@preferences.upgrade(from_version=1)
def from_1(old: dict[str, Any]) -> dict[str, Any]:
    return old


@app.get("/")
@require_session("user", user_id, redirect_to="login")
@use_session(preferences)
def page(preferences: Preferences) -> str:
    return preferences.theme
