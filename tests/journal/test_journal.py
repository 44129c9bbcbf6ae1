"""The journal of an application: the events of its sessions, as consumers read them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry
from redis import Redis

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.errors import SettingError
from flask_gsession.operate.health_journal import check_journal
from flask_gsession.pages.admin import admin_blueprint
from flask_gsession.stores.journals import Journal
from flask_gsession.testing import FakeClock
from flask_gsession.tokens import session_key
from tests.harness.apps import Site, SiteMaker


def kinds(events: list[Any]) -> list[str]:
    return [event.kind for event in events]


@pytest.fixture
def journaled(make_site: SiteMaker) -> Site:
    return make_site(journal=True, idle_timeout=60, renew_interval=0)


def put(session: Any) -> None:
    session["cart"] = "secret-value"


def sign_in(session: Any) -> None:
    session.bind("ada")


def sign_out(session: Any) -> None:
    session.destroy()


def rotate(session: Any) -> None:
    session.rotate()


def events_of(site: Site, name: str = "siem") -> list[Any]:
    with site.app.app_context():
        return list(site.ext.journal(name))


def repository_of(site: Site) -> Any:
    return site.app.extensions["gsession"][site.ext].repository


def journal_of(site: Site) -> Journal:
    journal = site.ext.store(site.app).journal
    assert journal is not None
    return journal


def test_the_life_of_a_session(journaled: Site, clock: FakeClock) -> None:
    visitor = journaled.visitor()
    visitor.run(put)
    visitor.run(sign_in)
    visitor.run(rotate)
    visitor.run(sign_out)
    events = events_of(journaled)
    assert kinds(events) == ["created", "rotated", "bound", "rotated", "ended"]
    created, rotated, bound, again, ended = events
    assert created.owner is None
    assert rotated.previous == created.handle
    assert again.previous == rotated.handle == bound.handle
    assert ended.handle == again.handle
    assert {event.owner for event in events[1:]} == {"ada"}
    assert len({event.device for event in events[1:]}) == 1
    assert (ended.reason, ended.by) == ("logged out", "ada")
    assert all(event.time.timestamp() == int(clock() * 1000) / 1000 for event in events)


def test_a_logout_by_an_old_token(journaled: Site) -> None:
    visitor = journaled.visitor()
    visitor.run(put)
    tab = visitor.another_tab()
    visitor.run(rotate)
    tab.run(sign_out)
    created, rotated, ended = events_of(journaled)
    assert (created.kind, rotated.kind, ended.kind) == ("created", "rotated", "ended")
    assert (rotated.previous, ended.handle) == (created.handle, rotated.handle)


def test_a_session_that_is_bound_and_keeps_its_token(journaled: Site) -> None:
    """As in a socket handler: the entry isn't part of a write."""
    visitor = journaled.visitor()
    visitor.run(put)
    handle = visitor.run(lambda session: session.handle)
    repository_of(journaled).journaling.append_bound(handle, "ada", "laptop")
    visitor.run(sign_out)
    assert kinds(events_of(journaled)) == ["created", "bound", "ended"]


def test_a_logout_of_an_expired_session_leaves_its_end_to_the_sweep(
    make_site: SiteMaker, clock: FakeClock
) -> None:
    site = make_site(journal=True, idle_timeout=5, renew_interval=0, rotation_grace=60)
    visitor = site.visitor()
    visitor.run(sign_in)
    tab = visitor.another_tab()
    visitor.run(rotate)
    clock.advance(6)
    tab.run(sign_out)
    visitor.run(sign_out)
    assert journal_of(site).figures().due == 1
    assert kinds(events_of(site)) == ["created", "bound", "rotated", "expired"]


def test_locked_values_of_a_user_are_not_a_session(journaled: Site, clock: FakeClock) -> None:
    def change(session: Any) -> None:
        with session.shared.lock():
            session.shared["cart"] = ["mug"]

    visitor = journaled.visitor()
    visitor.run(sign_in)
    visitor.run(change)
    clock.advance(400 * 86_400)
    assert kinds(events_of(journaled)) == ["created", "bound", "expired"]


def spoil(site: Site, handle: str) -> None:
    """Damage the session in the store; on Redis, even its type."""
    if site.url.startswith("sqlite"):
        with closing(sqlite3.connect(urlsplit(site.url).path)) as file, file:
            where = (site.prefix + handle,)
            file.execute("UPDATE gsession SET absolute_expires_at = 'x' WHERE key = ?", where)
    elif site.url.startswith("mongodb"):
        found: Any = site.inside
        sessions = found.database["gsession"]
        sessions.update_one({"_id": site.prefix + handle}, {"$set": {"payload": "x"}})
    else:
        with Redis.from_url(site.url) as redis:
            (name,) = redis.scan_iter(f"{site.prefix}{{{handle}}}", count=10_000)
            redis.delete(name)
            redis.rpush(name, "x")


@pytest.mark.parametrize("store_url", ["sqlite", "redis", "mongodb"], indirect=True)
def test_a_damaged_session_ends_once_and_stops_no_sweep(journaled: Site, clock: FakeClock) -> None:
    visitor, other = journaled.visitor(), journaled.visitor()
    visitor.run(put)
    other.run(put)
    handle = session_key(visitor.token)
    spoil(journaled, handle)
    for _ in range(2):
        visitor.another_tab().run(sign_out)
    clock.advance(70)
    _, _, *ends = events_of(journaled)
    assert kinds(ends) == ["expired", "expired"]
    assert handle in {end.handle for end in ends}
    assert journal_of(journaled).due(10) == []


@pytest.mark.parametrize("store_url", ["sqlite", "redis", "mongodb"], indirect=True)
def test_a_prefix_that_begins_with_another(
    store_url: str, store_prefix: str, clock: FakeClock
) -> None:
    for prefix in (store_prefix, f"{store_prefix}0", f"{store_prefix}admin:"):
        with Site(store_url, prefix, clock, journal=True, idle_timeout=60) as site:
            site.visitor().run(sign_in)
            visitor = site.visitor()
            visitor.run(sign_in)
            visitor.run(sign_out)
    clock.advance(70)
    for prefix in (store_prefix, f"{store_prefix}0", f"{store_prefix}admin:"):
        with Site(store_url, prefix, clock, journal=True, idle_timeout=60) as site:
            assert journal_of(site).figures().due == 1
            found = sorted(kinds(events_of(site)))
            assert found == ["bound", "bound", "created", "created", "ended", "expired"]


def test_an_expiry_is_entered_with_its_owner(journaled: Site, clock: FakeClock) -> None:
    visitor = journaled.visitor()
    visitor.run(sign_in)
    clock.advance(61)
    *_, expired = events_of(journaled)
    assert (expired.kind, expired.owner, expired.reason) == ("expired", "ada", "idle timeout")
    assert expired.time.timestamp() == pytest.approx(clock() - 1)
    assert events_of(journaled)[-1].number == expired.number


def test_a_revocation_says_why_and_by_whom(journaled: Site) -> None:
    for _ in range(2):
        journaled.visitor().run(sign_in)
    with journaled.app.app_context():
        journaled.ext.users.revoke_all("ada", reason="stolen laptop", by="grace")
    ends = [event for event in events_of(journaled) if event.kind == "ended"]
    assert [(end.owner, end.reason, end.by) for end in ends] == [
        ("ada", "stolen laptop", "grace")
    ] * 2


def test_acknowledged_events_do_not_come_again(journaled: Site) -> None:
    for _ in range(3):
        journaled.visitor().run(put)
    first, second, third = events_of(journaled)
    second.ack()
    assert [event.number for event in events_of(journaled)] == [third.number]
    assert next(iter(events_of(journaled, "other"))).number == first.number
    third.ack()
    first.ack()  # late: never moves back
    assert events_of(journaled) == []


def test_a_consumer_that_falls_behind_gets_one_gap(make_site: SiteMaker) -> None:
    site = make_site(journal=True, journal_events=1000)
    site.visitor().run(put)
    (event,) = events_of(site)
    event.ack()
    journal_of(site).append([b'{"at":1,"kind":"ended"}'] * 1600)
    gap, *rest = events_of(site)
    assert gap.kind == "gap"
    assert gap.missed + len(rest) == 1600
    assert len(rest) >= 1000
    assert "gap" not in kinds(rest)
    gap.ack()
    assert events_of(site)[0].number == rest[0].number
    rest[-1].ack()
    assert events_of(site) == []


def test_no_token_and_no_value_is_entered(journaled: Site) -> None:
    visitor = journaled.visitor()
    visitor.run(put)
    visitor.run(sign_in)
    token = visitor.token
    visitor.run(sign_out)
    text = b"".join(entry for _, entry in journal_of(journaled).read(0, 100).entries).decode()
    assert "secret-value" not in text
    assert token not in text


def test_the_journal_is_off_by_default(site: Site) -> None:
    assert type(site.ext.store(site.app)).__name__ != "JournalingStore"
    with site.app.app_context(), pytest.raises(SettingError, match="SESSION_JOURNAL is off"):
        site.ext.journal("siem")


class SevenVerbs:
    """A store without parts."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("create", "load", "save", "renew", "replace", "delete", "close"):
            return lambda *_: None
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("store", "advice"),
    [
        (SevenVerbs(), "a journal part"),
        ("grpcs://localhost:50051", "flask gsession serve"),
        (
            "edge+sqlite:///edge.sqlite3?remote=redis%3A%2F%2Flocalhost",
            "The centre keeps the journal",
        ),
    ],
)
def test_a_store_without_a_journal_is_refused(store: object, advice: str, tmp_path: Any) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.secret_key = "key"
    with pytest.raises(SettingError, match=advice):
        Session(app, store=store, journal=True)


def test_impossible_names_of_consumers_are_refused(journaled: Site) -> None:
    with journaled.app.app_context():
        for name in ("", "a b", "x" * 65, "-a", None):
            with pytest.raises(ValueError, match="the consumer is"):
                journaled.ext.journal(name)  # type: ignore[arg-type]


def run_command(site: Site, *arguments: str) -> Any:
    return site.app.test_cli_runner().invoke(gsession, ["events", *arguments])


def test_the_command_prints_and_acknowledges(journaled: Site) -> None:
    journaled.visitor().run(sign_in)
    result = run_command(journaled, "--consumer", "siem", "--json", "--no-ack")
    created, bound = map(json.loads, result.stdout.splitlines())
    assert (created["kind"], bound["kind"], bound["owner"]) == ("created", "bound", "ada")
    assert created["time"].endswith("Z")
    result = run_command(journaled, "--consumer", "siem")
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["created", "bound"]
    assert run_command(journaled, "--consumer", "siem").stdout == ""
    state = json.loads(run_command(journaled, "--json").stdout)
    assert state["consumers"]["siem"]["behind"] == 0
    assert (state["kept"], state["expired_waiting"]) == (2, 0)
    assert run_command(journaled, "--consumer", "siem", "--forget").exit_code == 0
    assert run_command(journaled, "--consumer", "siem", "--forget").exit_code == 1
    assert len(run_command(journaled, "--consumer", "siem").stdout.splitlines()) == 2


def test_wrong_uses_of_the_command_are_refused(journaled: Site) -> None:
    assert run_command(journaled, "--follow").exit_code == 2
    assert run_command(journaled, "--consumer", "a b").exit_code == 2


def test_the_doctor_names_late_consumers(make_site: SiteMaker, clock: FakeClock) -> None:
    journaled = make_site(journal=True, journal_events=1000, idle_timeout=60)

    def found() -> str:
        with journaled.app.app_context():
            findings = check_journal(repository_of(journaled))
        return " ".join(f"{each.severity} {each.found}" for each in findings)

    journaled.visitor().run(put)
    assert "no consumer has read it yet" in found()
    first = events_of(journaled)[0]
    first.ack()
    assert found() == "ok "
    clock.advance(3600)
    assert "1 expired sessions wait for their event, for up to 58 min" in found()
    events_of(journaled)[-1].ack()
    journal_of(journaled).append([b"{}"] * 600)
    assert "the consumer siem is 600 events behind" in found()
    journal_of(journaled).append([b"{}"] * 1000)
    assert "the consumer siem has missed" in found()


def test_administrators_see_the_journal(journaled: Site) -> None:
    journaled.app.register_blueprint(admin_blueprint(allow=lambda: True, by=lambda: "eve"))
    visitor = journaled.visitor()
    visitor.run(sign_in)
    assert len(events_of(journaled)) == 2
    assert "/admin/sessions/events" in visitor.get("/admin/sessions").text
    page = visitor.get("/admin/sessions/events").text
    assert page.index("Bound") < page.index("Created")
    assert "ada" in page
    assert visitor.get("/admin/sessions/events?before=x").status_code == 400
    first = events_of(journaled)[0].number
    assert "Bound" not in visitor.get(f"/admin/sessions/events?before={first + 1}").text


def test_the_metrics_show_the_journal(journaled: Site) -> None:
    journal_of(journaled).append([b"{}"] * 2)
    registry = CollectorRegistry()
    SessionMetrics(journaled.app, registry=registry)
    journaled.visitor().get("/untouched")
    assert registry.get_sample_value("gsession_journal_events", {"session": "session"}) == 2


def test_a_clean_up_enters_the_expired(journaled: Site, clock: FakeClock) -> None:
    for _ in range(3):
        journaled.visitor().run(put)
    clock.advance(61)
    result = journaled.app.test_cli_runner().invoke(gsession, ["cleanup"])
    assert "3 expired sessions removed" in result.output
    with journaled.app.app_context():
        events = list(journaled.ext.journal("siem", sweep=False))
    assert kinds(events) == ["created"] * 3 + ["expired"] * 3
