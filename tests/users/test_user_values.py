"""``session.shared`` and ``ext.open_user``: the values of a user, on each store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from marshmallow import Schema, fields

from flask_gsession import (
    NotSignedIn,
    SessionEnded,
    SessionTooLarge,
    SettingError,
    StoreUnavailable,
    UnsupportedType,
    UserValuesUnreadable,
)
from flask_gsession.events import Event, SessionCreated, UserValuesForgotten, WriteDropped
from flask_gsession.repository.user_values import values_key
from flask_gsession.stores.base import is_session_key, new_version
from flask_gsession.typed import SessionKey
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.console import Console

from .test_devices import signed_in

YEAR = 365 * 86400.0
KEYS = b"a" * 32, b"b" * 32


@pytest.fixture
def ada(site: Site) -> Iterator[tuple[Visitor, Visitor]]:
    """Two devices of ada, in an application context."""
    with site.app.app_context():
        yield signed_in(site), signed_in(site)


def shared(visitor: Visitor) -> Any:
    return visitor.run(lambda session: dict(session.shared))


def put(visitor: Visitor, **values: Any) -> None:
    visitor.run(lambda session: session.shared.update(values))


def visits(settings: dict[str, Any] | None = None) -> SessionKey[int]:
    return SessionKey("visits", fields.Int(), default=0, merge="counter", scope="user")


# Behaviour
# -----------------------------------------------------------------------------------------


def test_all_devices_have_the_values(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    put(phone, theme="dark", price=Decimal("9.90"), tags={"a"}, nested={"list": [1]})
    assert shared(laptop) == {
        "theme": "dark", "price": Decimal("9.90"), "tags": {"a"}, "nested": {"list": [1]}
    }  # fmt: skip
    assert phone.run(dict) == {}, "not in the session"
    laptop.run(lambda session: session.shared["nested"]["list"].append(2))
    assert shared(phone)["nested"] == {"list": [1, 2]}
    put(signed_in(site, "bob"), theme="light")
    assert shared(phone)["theme"] == "dark"
    phone.run(lambda session: session.destroy())
    site.ext.users.revoke_all("ada")
    assert shared(signed_in(site))["theme"] == "dark", "they outlive all sessions"
    keys = {key.strip("{}").rpartition(":")[2].strip("{}") for key in site.stored()}
    assert values_key("ada") in keys
    assert not is_session_key(values_key("ada"))
    assert len(site.sessions()) == 2, "of bob, and the last one of ada"
    assert {key for key in map(type, site.events) if "Created" in key.__name__} == {SessionCreated}


def test_what_concerns_sessions_only_leaves_them_alone(site: Site) -> None:
    repository = site.app.extensions["gsession"][site.ext].repository
    for_sessions = mock.Mock(side_effect=AssertionError)
    repository.before_create = repository.check = for_sessions
    repository.imports = for_sessions
    with site.app.app_context():
        with site.ext.open_user("ada") as user:
            user["theme"] = "dark"
        with site.ext.open_user("ada") as user:
            assert dict(user) == {"theme": "dark"}
        assert site.ext.users.forget("ada")
    assert for_sessions.mock_calls == []


def test_parallel_requests_lose_nothing(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    counter, parcels = visits(), SessionKey("parcels", fields.Raw(), merge="set", scope="user")

    def beside(session: Any) -> None:
        put(laptop, b=1)
        laptop.run(lambda _: (counter.set(counter.get() + 1), parcels.set({2})))
        laptop.run(lambda session: session.shared.update_atomic("n", lambda n: (n or 0) + 1))

    def view(session: Any) -> None:
        session.shared["a"] = 1
        counter.set(counter.get() + 1)
        parcels.set({1})
        assert session.shared.get("n") is None
        site.store.before("create", lambda: beside(session))
        session.shared.update_atomic("n", lambda n: (n or 0) + 1)

    phone.run(view)
    assert shared(phone) == {"a": 1, "b": 1, "visits": 2, "parcels": {1, 2}, "n": 2}

    def within(session: Any) -> None:
        with session.shared.transaction():
            session.shared["a"] += 1
            session.shared["b"] += 1
        with session.shared.lock():
            session.shared["n"] += 1

    phone.run(within)
    assert laptop.run(lambda session: session.shared.take("n")) == 3
    assert shared(phone) == {"a": 2, "b": 2, "visits": 2, "parcels": {1, 2}}


def test_values_expire_and_may_be_large(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    picture, film = bytes(40_000), bytes(range(250)) * 160

    def view(session: Any) -> None:
        session["draft"] = bytes(reversed(picture))
        session.shared["picture"] = picture
        session.shared.attach("film", BytesIO(film))
        session.shared.set("code", 1234, ttl=60)

    phone.run(view)
    assert shared(laptop) == {"picture": picture, "film": film, "code": 1234}
    phone.run(lambda session: session.clear())
    assert len(site.inside.blobs()) == 2
    site.clock.advance(61)
    assert shared(laptop) == {"picture": picture, "film": film}
    assert site.ext.users.forget("ada")
    assert not site.inside.blobs()


def test_jobs_open_the_values(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, _ = ada
    with site.ext.open_user("ada") as values:
        values["inbox"] = 1
        assert (values.user_id, values.new) == ("ada", True)
    with pytest.raises(ZeroDivisionError), site.ext.open_user("ada") as values:
        values["inbox"] = 1 / 0

    async def job() -> int:
        async with site.ext.open_user("ada") as values:
            values["inbox"] += 1
            return int(values.update_atomic("atomic", lambda n: (n or 0) + 1))

    assert asyncio.run(job()) == 1
    assert shared(phone) == {"inbox": 2, "atomic": 1}
    with site.ext.open_user(7) as values:
        assert dict(values) == {}, "of any id"
    for wrong in ("", "a\0b", None):
        with pytest.raises(ValueError, match="user_id"):
            site.ext.open_user(wrong)
    block = site.ext.open_user("ada")
    with pytest.raises(SessionEnded), block as values:  # noqa: PT012
        values["late"] = 1
        site.ext.users.forget("ada")
    assert shared(phone) == {}


def test_values_are_kept_as_long_as_they_are_used(make_site: SiteMaker) -> None:
    site = make_site(absolute_timeout=9 * YEAR, idle_timeout=9 * YEAR, user_values_lifetime=YEAR)
    phone = signed_in(site)
    put(phone, theme="dark")
    for _ in range(3):
        site.clock.advance(YEAR - 1)
        phone.run(lambda session: None)
        assert shared(phone) == {"theme": "dark"}
    site.clock.advance(YEAR + 86_400)
    assert shared(phone) == {}
    put(phone, theme="light")
    assert shared(phone) == {"theme": "light"}


def test_round_trips(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    put(phone, theme="dark")
    theme = SessionKey("theme", fields.Str(), scope="user")
    for function, calls in (
        (lambda session: None, []),
        (lambda session: session.get("theme"), ["load"]),
        (lambda session: session.shared, ["load"]),
        (lambda session: (session.shared["theme"], theme.get()), ["load", "load"]),
        (lambda session: theme.set("light"), ["load", "load", "save"]),
    ):
        with site.counted() as count:
            laptop.run(function)
        assert list(count.calls) == calls
    site.clock.advance(86_401)
    visitor = signed_in(site)
    for calls in (["load", "load", "renew"], ["load", "load"]):
        with site.counted() as count:
            assert shared(visitor) == {"theme": "light"}
        assert list(count.calls) == calls


# Nobody ------------------------------------------------------------------------------------------


def test_a_visitor_has_no_values(site: Site) -> None:
    visitor = site.visitor()

    def view(session: Any) -> None:
        values = session.shared
        assert (dict(values), values.get("theme"), "theme" in values, values.user_id) == (
            {}, None, False, None,
        )  # fmt: skip
        for write in (
            lambda: values.update(theme="dark"),
            lambda: values.set("theme", "dark", ttl=5),
            lambda: values.update_atomic("theme", lambda _: "dark"),
            values.clear,
            values.lock,
        ):
            with pytest.raises(NotSignedIn):
                write()
        values.reload()

    with site.counted() as count:
        visitor.run(view)
        assert visitor.ask(lambda session: session.shared.update(a=1)).status_code == 401
    assert not count.calls
    assert visitor.cookie is None


def test_methods_that_only_a_session_has_are_refused(
    site: Site, ada: tuple[Visitor, Visitor]
) -> None:
    def view(session: Any) -> None:
        values = session.shared
        for name in ("bind", "unbind", "rotate", "confirm", "destroy", "set_lifetime"):
            with pytest.raises(TypeError, match="call this method on the session"):
                getattr(values, name)()
        for write in (
            lambda: values.update(_user_id="eve"),
            lambda: setattr(values, "permanent", True),
        ):
            with pytest.raises(UnsupportedType, match="underscore"):
                write()
        assert "ada" not in repr(values)

    ada[0].run(view)
    for options, match in (
        ({"scope": "site"}, "scope is 'site'"),
        ({"scope": "user", "at_login": "join"}, "at_login is 'join'"),
        ({"at_login": "merge"}, "scope='user'"),
    ):
        with pytest.raises(SettingError, match=match):
            SessionKey("k", fields.Int(), **options)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="underscore"):
        SessionKey("_k", fields.Int(), scope="user")


def test_signing_out_and_in_counts_at_once(site: Site) -> None:
    def view(session: Any) -> None:
        session.shared["a"] = 1
        session.destroy()
        assert dict(session.shared) == {}
        session.bind("bob")
        session.shared["b"] = 1

    ada = signed_in(site)
    ada.run(view)
    assert shared(ada) == {"b": 1}
    assert shared(signed_in(site)) == {"a": 1}


# Bad input ---------------------------------------------------------------------------------------


def test_values_beyond_the_limits_are_refused(make_site: SiteMaker) -> None:
    site = make_site(max_bytes=2000, spill_bytes=None)
    site.app.errorhandler(SessionTooLarge)(lambda error: ("too large", 413))
    phone = signed_in(site)

    class Small(Schema):
        n = fields.Int(strict=True)

    key = SessionKey("small", Small, scope="user")
    put(phone, a=1)
    response = phone.ask(lambda session: session.shared.update(b="x" * 2000))
    assert response.status_code == 413
    assert phone.ask(lambda session: key.set({"n": "many"})).status_code == 500
    put(phone, small={"n": "forged"})
    assert phone.run(lambda session: key.get()) == {}, "its schema reads nothing invalid"
    assert shared(phone)["a"] == 1
    assert phone.run(lambda session: session.owner) == "ada", "still signed in"


def test_damaged_values_count_as_absent(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    put(phone, a=1)
    record = site.store.load(values_key("ada"))
    assert record is not None
    spoilt = record._replace(version=new_version(), payload=b"\x02\x00" + b"x" * 40)
    site.store.save(spoilt, record.version)
    assert shared(phone) == {}
    assert phone.run(lambda session: session.owner) == "ada"
    put(laptop, b=2)
    assert shared(phone) == {"b": 2}, "written again"


def test_without_the_key_they_are_neither_shown_nor_replaced(make_site: SiteMaker) -> None:
    before = make_site(encryption_keys=[KEYS[0]])
    put(signed_in(before), a=1)
    site = make_site(store=before.store, encryption_keys=[KEYS[1]])
    key = SessionKey("cart", fields.List(fields.Int()), default=[], scope="user", at_login="merge")
    with site.app.app_context():
        site.store.delete(roster(site))
        visitor = site.visitor()
        visitor.run(lambda session: key.set([1]))
        visitor.run(lambda session: session.bind("ada"))
        assert (shared(visitor), visitor.run(dict)) == ({}, {"cart": [1]}), "stays in the session"
        assert visitor.ask(lambda session: session.shared.update(b=1)).status_code == 503
        assert visitor.ask(lambda session: key.session.update_atomic("b", str)).status_code == 503
        with pytest.raises(UserValuesUnreadable, match="forget"), site.ext.open_user("ada") as all_:
            all_["b"] = 1
        both = make_site(store=before.store, encryption_keys=[KEYS[1], KEYS[0]])
        assert shared(both.visitor(visitor.cookie)) == {"a": 1}
        site.ext.users.forget("ada")
        site.clock.advance(301)  # a touch is due
        visitor.run(dict)
        assert (shared(visitor), visitor.run(dict)) == ({"cart": [1]}, {})


def roster(site: Site) -> str:
    from flask_gsession.users.rosters import roster_key

    return roster_key("ada")


def test_an_outage_of_the_values_is_an_outage(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada

    def down() -> None:
        raise StoreUnavailable("down")

    def lost(session: Any) -> None:
        session["seen"] = 1
        session.shared["a"] = 1
        site.store.before("save", lambda: site.store.after("create", down))

    def fails(session: Any) -> None:
        session.get("seen")
        site.store.before("load", down)
        session.shared.get("a")

    assert phone.ask(fails).status_code == 503
    assert phone.ask(lost).status_code == 503, "perhaps stored"
    assert (shared(laptop), phone.run(dict)) == ({"a": 1}, {"seen": 1})
    assert phone.run(lambda session: session.owner) == "ada"


# Deleting, counting, moving ----------------------------------------------------------------------


def test_an_account_is_forgotten(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada
    put(phone, a=1)

    def view(session: Any) -> None:
        session.shared["b"] = 1
        laptop.run(lambda _: site.ext.users.forget("ada"))

    phone.run(view)
    assert shared(phone) == {}, "a request that ran beside brings nothing back"
    assert site.happened(WriteDropped)
    assert site.happened(UserValuesForgotten) == [UserValuesForgotten("ada", "ada")]
    assert not site.ext.users.forget("ada")
    put(phone, c=1)

    def own(session: Any) -> Any:
        assert session.shared["c"] == 1
        site.ext.users.forget("ada")
        return dict(session.shared)

    assert phone.run(own) == {}
    assert shared(phone) == {}
    assert all(isinstance(event, Event) for event in site.events)


def test_a_session_that_ended_writes_no_values(site: Site, ada: tuple[Visitor, Visitor]) -> None:
    phone, laptop = ada

    def view(session: Any) -> None:
        session["a"] = session.shared["a"] = 1
        laptop.run(lambda _: site.ext.users.revoke_others())

    phone.run(view)
    assert shared(laptop) == {}


def test_an_export_moves_them(site: Site, tmp_path: Path) -> None:
    phone, _ = signed_in(site), signed_in(site)
    put(phone, theme="dark", picture=bytes(40_000))
    theirs = shared(phone)
    file = tmp_path / "all.jsonl"
    source = Console(site.store.store, clock=site.clock)
    assert "3 records exported" in source.done("export", str(file))
    with Site("memory://", "", site.clock) as other:
        target = Console(other.store.store, clock=site.clock)
        assert "2 imported, the values of 1 user" in target.done("import", str(file))
        assert shared(other.visitor(phone.cookie)) == theirs
        assert "there already" in target.done("import", str(file))
        assert '"sessions": 2' in target.done("stats", "--json"), "they count as no session"
        assert len(target.done("list", "--json").splitlines()) == 2
        other.clock.advance(timedelta(days=100).total_seconds())
        assert shared(signed_in(other)) == theirs, "not capped to the life of a session"
