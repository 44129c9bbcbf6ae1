"""The cost of a typed key above a plain one, relative to marshmallow's own time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from flask import Flask
from marshmallow import Schema, fields
from marshmallow.validate import Length, OneOf, Range

from benchmarks.measure import Effort, Spread, interleave, paired, ratios
from flask_gsession import Session, session
from flask_gsession.typed import SessionKey


class ProfileSchema(Schema):
    """Five fields, as the targets say."""

    name = fields.Str(required=True, validate=Length(max=80))
    theme = fields.Str(validate=OneOf(["light", "dark", "system"]), load_default="system")
    language = fields.Str(validate=OneOf(["de", "en", "fr"]), load_default="en")
    visits = fields.Int(strict=True, validate=Range(min=0), load_default=0)
    notifications = fields.Bool(load_default=True)


PROFILE = {"name": "Ada", "theme": "dark", "language": "en", "visits": 7, "notifications": False}

GET, AGAIN, SET = "get", "get again, unchanged", "set"


@dataclass(frozen=True)
class TypedCost:
    """The extra microseconds of one operation compared with a plain key, for each ``per``.

    ``ratio``: relative to the time that the marshmallow calls in ``per`` add to the plain key:
    called by the view itself, in the same place, because alone and warm they are a third faster.
    """

    operation: str
    per: str
    us: Spread
    ratio: Spread


def typed_keys(effort: Effort) -> list[TypedCost]:
    """Times typed and plain keys in turns, within requests on the memory store."""
    app = Flask(__name__)
    app.secret_key = "benchmark"
    Session(app, store="memory://")
    key = SessionKey("profile", ProfileSchema)
    schema = ProfileSchema()
    with app.test_client() as visitor, visitor.session_transaction() as stored:
        stored["profile"] = PROFILE
    cookie = visitor.get_cookie("session")
    assert cookie is not None
    headers = {"Cookie": f"session={cookie.value}"}
    with app.test_request_context(headers=headers) as context:

        def fresh(then: Callable[[], Any]) -> Callable[[], Any]:
            """A session that was just loaded, then this."""

            def call() -> None:
                context._session = app.session_interface.open_session(app, context.request)
                then()

            return call

        def put() -> None:
            session["profile"] = PROFILE

        def put_checked() -> None:
            session["profile"] = schema.dump(schema.load(PROFILE))

        calls: dict[str, Callable[[], Any]] = {
            "plain get": fresh(lambda: session["profile"]),
            "typed get": fresh(key.get),
            "plain set": fresh(put),
            "typed set": fresh(lambda: key.set(PROFILE)),
            "load": fresh(lambda: schema.load(session["profile"])),
            "load and dump": fresh(put_checked),
        }
        figures = interleave(calls, effort)
        calls["typed get"]()  # the session of this request, from now on
        figures |= interleave({"typed again": key.get}, effort)
        calls["plain get"]()
        figures |= interleave({"plain again": lambda: session["profile"]}, effort)

    def row(operation: str, typed: str, plain: str, per: str) -> TypedCost:
        of_marshmallow = paired(figures, per, minus="plain set" if "dump" in per else "plain get")
        adds = paired(figures, typed, minus=plain)
        found = ratios(adds, of_marshmallow) or [inf]  # all rounds drowned in noise
        return TypedCost(operation, per, Spread.of(adds), Spread.of(found))

    return [
        row(GET, "typed get", "plain get", "load"),
        row(AGAIN, "typed again", "plain again", "load"),
        row(SET, "typed set", "plain set", "load and dump"),
    ]
