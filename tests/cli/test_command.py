"""`flask gsession list, show, revoke, stats` on every store, and their error messages."""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from pymongo import MongoClient
from redis import Redis
from redis.sentinel import Sentinel

from flask_gsession import Session, StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.cli.common import client_location, store_location
from flask_gsession.contrib.ratelimit import SessionLimits
from flask_gsession.errors import StoreError, UnreadableRecord
from flask_gsession.events import SessionRevoked
from flask_gsession.stores import Record
from flask_gsession.stores.base import Deleted
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.parts import Page, parts_of
from flask_gsession.testing import HookedStore, a_record
from flask_gsession.values.codec import Codec
from tests.harness.apps import Site
from tests.harness.console import ROOT, Console
from tests.harness.servers import free_port
from tests.test_docs import FOLDER_STORE

SECRET = "a canary that nobody may see"


@pytest.fixture
def console(site: Site) -> Console:
    return Console(site.store.store, clock=site.clock)


def handles(site: Site, number: int) -> list[str]:
    """The handles of so many new sessions."""
    made = []
    for _ in range(number):
        visitor = site.visitor()
        visitor.run(lambda session: session.update(a=1, secret=SECRET))
        made.append(visitor.run(lambda session: session.handle))
    return made


# -- list and show


@pytest.mark.parametrize(("target", "why"), [("&-", "is closed"), ("/dev/full", "No space left")])
def test_output_that_nobody_reads(sqlite_url: str, target: str, why: str) -> None:
    console = Console(sqlite_url)
    with console.app.test_client().session_transaction() as session:
        session["a"] = 1
    code = (
        "import sys; from flask.cli import ScriptInfo; "
        "from tests.harness.console import Console, gsession; "
        "console = Console(sys.argv[1]); "
        "info = ScriptInfo(create_app=lambda: console.app); "
        "gsession.main(['list'], 'gsession', obj=info)"
    )
    run = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" "$2" >{target}', sys.executable, code, sqlite_url],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert why in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_key_that_holds_a_secret(site: Site, console: Console) -> None:
    visitor = site.visitor()
    state = "Ab1" + "x9Y" * 10
    names = [f"_state_google_{state}{last}" for last in "12"]
    visitor.run(lambda session: session.update(dict.fromkeys(names, 1)))
    handle = visitor.run(lambda session: session.handle)
    for options in ((), ("--json",)):
        assert state not in console.done("show", handle, *options)
    keys = json.loads(console.done("show", handle, "--json"))["keys"]
    assert len(keys) == 2
    assert all(name.startswith("_state_google_"[:4]) for name in keys)


def test_the_help_names_each_command_in_whole_sentences() -> None:
    text = Console("memory://").done("--help")
    for name in gsession.commands:
        assert re.search(rf"^  {name} +[A-Z].*[a-z]\.$", text, re.MULTILINE), name


def test_list(site: Site, console: Console) -> None:
    nothing = console.run("list")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "session: no sessions in " in nothing.stderr
    made = handles(site, 5)
    site.clock.advance(86400)
    live = handles(site, 3)
    assert "no sessions" not in console.run("list").stderr + console.run("list", "--json").stderr
    lines = console.done("list").splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == sorted(live)
    rows = [json.loads(line) for line in console.done("list", "--json").splitlines()]
    assert {row["handle"] for row in rows} == set(live)
    assert set(rows[0]) == {
        *("handle", "created_at", "idle_expires_at", "absolute_expires_at", "bytes")
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", rows[0]["created_at"])
    short = console.run("list", "--limit", "2")
    assert len(short.stdout.splitlines()) == 2
    assert "There are more" in short.stderr
    assert not {*made} & {line.split(" ")[0] for line in lines}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("newest", "CBA"), ("oldest", "ABC"), ("idle", "BAC"), ("end", "CAB"), ("bytes", "BCA"),
        ("handle", "ABC"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limit", [None, 2])
def test_list_is_sorted(
    site: Site, console: Console, order: str, expected: str, limit: int | None
) -> None:
    now = int(site.clock() * 1000)
    for letter, created, idle, end, size in (
        ("A", 3, 200, 600, 10), ("B", 2, 100, 700, 30), ("C", 1, 300, 500, 20),
    ):  # fmt: skip
        times = now - created * 1000, now + idle * 1000, now + end * 1000
        site.store.store.create(Record(letter * 43, 1, *times, b"x" * size))
    words = ["list", "--sort", order, *(["--limit", str(limit)] if limit else [])]
    result = console.run(*words)
    assert "".join(line[0] for line in result.stdout.splitlines()) == expected[:limit]
    assert ("There are more" in result.stderr) == (limit is not None)


def test_sorting_keeps_only_shown_sessions_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console("memory://")
    store: Any = console.ext.store(console.app)
    for _ in range(5):
        store.create(a_record(time.time))
    held: list[int | None] = []

    def nsmallest(number: int, rows: Iterator[Any], key: Any) -> list[Any]:
        held.append(number)
        return sorted(rows, key=key)[:number]

    monkeypatch.setattr("flask_gsession.cli.sessions.nsmallest", nsmallest)
    console.done("list", "--sort", "newest", "--limit", "2")
    assert held == [3]


MANY_TYPES = {
    "user": "42",
    "age": 42,
    "price": Decimal("9.50"),
    "rate": 0.5,
    "admin": True,
    "one": 1,
    "nothing": None,
    "empty": "",
    "day": date(2026, 3, 1),
    "login": datetime(2026, 3, 1, 12, tzinfo=UTC),
    "id": UUID(int=7),
    "took": timedelta(seconds=90),
    "tags": ["a", "b"],
    "pair": (1, 2),
    "prefs": {"theme": "dark", "a.b": {"c": 1}, "rows": [{"sku": "mug"}]},
    "by_number": {7: "seven"},
    "dotted.key": {"x": "y"},
    "equals": "a=b",
}


@pytest.mark.parametrize(
    "condition",
    [
        "user=42", 'user="42"', "age=42", "price=9.50", "rate=0.5", "admin=true", "one=1",
        "nothing=null", "empty=", "day=2026-03-01", "login=2026-03-01T12:00:00+00:00",
        f"id={UUID(int=7)}", "took=0:01:30", 'tags=["a", "b"]', "tags.1=b", "pair=[1,2]",
        "prefs.theme=dark", "prefs.a.b.c=1", "prefs.rows.0.sku=mug", "by_number.7=seven",
        "dotted.key.x=y", 'dotted.key={"x": "y"}', "equals=a=b",
    ],
)  # fmt: skip
def test_a_condition_that_is_met(condition: str) -> None:
    assert listed_where(condition) == "a match"


@pytest.mark.parametrize(
    "condition",
    [
        "user=4", "age=043", "admin=1", "admin=True", "one=true", "nothing=", "nothing=None",
        "missing=null", "missing.deeper=1", "user.0=4", "tags.2=c", "tags.-1=b", "pair=[1]",
        "prefs.theme=", "prefs.rows.x.sku=mug", "price=NaN", "tags=[", "by_number.8=seven",
        "age=" + "9" * 5000, "tags=" + "[" * 100_000, "tags." + "9" * 5000 + "=b",
    ],
)  # fmt: skip
def test_a_condition_that_is_not_met(condition: str) -> None:
    assert listed_where(condition) == "no match"


def listed_where(*conditions: str) -> str:
    """Whether the list has a session with many types of values."""
    console = Console("memory://")
    app = console.app
    with app.test_client() as client, client.session_transaction() as session:
        session.update(MANY_TYPES)
    words = [word for condition in conditions for word in ("--where", condition)]
    result = console.run("list", *words)
    assert result.exit_code == 0, result.output
    if result.stdout:
        return "a match"
    assert "no matching sessions in memory:" in result.stderr
    return "no match"


def test_list_where(site: Site, console: Console) -> None:
    made = []
    for name, theme in (("mira", "dark"), ("jonas", "dark"), ("mira", "light")):
        visitor = site.visitor()
        visitor.run(
            lambda session, name=name, theme=theme: session.update(
                user=name, prefs={"theme": theme}
            )
        )
        made.append(visitor.run(lambda session: session.handle))

    def found(*words: str) -> set[str]:
        return {line.split(" ")[0] for line in console.done("list", *words).splitlines()}

    assert found("--where", "user=mira") == {made[0], made[2]}
    assert found("--where", "user=mira", "--where", "prefs.theme=dark") == {made[0]}
    short = console.run("list", "--where", "user=mira", "--limit", "1")
    assert len(short.stdout.splitlines()) == 1
    assert "There are more" in short.stderr
    row = json.loads(console.done("list", "--where", "user=jonas", "--json"))
    assert row["handle"] == made[1]


def test_a_condition_looks_at_nothing_that_has_expired(site: Site, console: Console) -> None:
    site.visitor().run(lambda session: session.set("code", "1234", ttl=60))
    assert console.done("list", "--where", "code=1234")
    site.clock.advance(61)
    assert not console.done("list", "--where", "code=1234")


def test_a_condition_on_a_large_value(site: Site, console: Console) -> None:
    site.visitor().run(lambda session: session.update(large="x" * 100_000, user="mira"))
    result = console.run("list", "--where", "large=x")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 more not compared: the value of that key is a large value" in result.stderr
    assert console.done("list", "--where", "user=mira")
    assert console.run("list", "--where", "large=x", "--where", "user=jonas").stderr.endswith(
        f"no matching sessions in {console_place(console)}\n"
    )


def console_place(console: Console) -> str:
    """How the command names the store of this console."""
    interface = console.app.extensions["gsession"][console.ext]
    with console.app.app_context():
        return store_location(interface)


def test_conditions_on_encrypted_sessions(site: Site) -> None:
    key, other = b"k" * 32, b"o" * 32
    store = site.store.store
    console = Console(store, clock=site.clock, encryption_keys=[key])
    with console.app.test_client() as client, client.session_transaction() as session:
        session["user"] = "mira"
    assert console.done("list", "--where", "user=mira")
    stranger = Console(store, clock=site.clock, encryption_keys=[other])
    result = stranger.run("list", "--where", "user=mira")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 more could not be read" in result.stderr
    assert stranger.done("list")  # for which nothing is decrypted


def test_a_condition_decodes_only_the_key_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console("memory://")
    with console.app.test_client() as client, client.session_transaction() as session:
        session.update(user="mira", cart=["mug"])
    decoded: list[Any] = []
    decode = Codec.decode
    monkeypatch.setattr(
        Codec, "decode", lambda codec, raw: decoded.append(decode(codec, raw)) or decoded[-1]
    )
    assert console.done("list", "--where", "user=mira")
    assert decoded == ["mira"]


def test_a_whole_handle_is_found_without_a_scan(
    site: Site, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    (handle,) = handles(site, 1)
    scanning = type(parts_of(site.store.store).scans)
    monkeypatch.setattr(scanning, "scan", lambda *arguments: pytest.fail("scanned"))
    with pytest.raises(pytest.fail.Exception, match="scanned"):
        console.run("show", handle[:8], catch_exceptions=False)
    console.done("show", handle)
    console.done("debug", handle)
    console.done("revoke", handle)


def test_a_record_with_times_of_no_calendar_hides_no_other(site: Site, console: Console) -> None:
    """Caused by a bug, a broken clock, or somebody with write access to the store."""
    made, store = handles(site, 3), site.store.store
    (record,) = (found for found in [store.load(made[0])] if found is not None)
    bad = {}
    for letter, created, end in (
        ("A", 2**48 - 1, 2**48 - 1),
        ("B", -1, 2**45),
        ("C", 0, 2**48 - 1),
    ):
        bad[letter * 43] = record._replace(
            key=letter * 43,
            version=record.version + len(bad) + 1,
            created_at=created,
            idle_expires_at=end,
            absolute_expires_at=end,
        )
        with suppress(
            StoreError, OverflowError, struct.error
        ):  # the store refuses some of these, which then aren't stored
            store.create(bad[letter * 43])
    for words in (("list",), ("list", "--json")):
        listed = console.done(*words)
        assert all(handle in listed for handle in made)
        assert ("A" * 43 in listed) is ("(no-date)" in listed)
    for key in bad:
        shown = console.run("show", key)
        assert shown.exit_code == 1
        assert isinstance(shown.exception, SystemExit)
        assert key in shown.stderr
    console.done("show", made[1])
    console.done("stats")
    console.done("export", "-")
    console.run("revoke", "--all", "--yes")
    assert console.done("list") == ""


def test_more_sessions_than_a_page_has(console: Console, site: Site) -> None:
    records = [a_record(site.clock) for _ in range(450)]
    for record in records:
        site.store.store.create(record)
    listed = [line.split(" ")[0] for line in console.done("list").splitlines()]
    assert sorted(listed) == sorted(record.key for record in records)
    assert json.loads(console.done("stats", "--json"))["sessions"] == 450


def test_a_page_of_large_sessions_is_short() -> None:
    pages: list[int] = []

    class Noting(MemoryStore):
        def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
            page = super().scan(cursor, limit, begins)
            pages.append(sum(len(record.payload) for record in page.records))
            return page

    store = Noting()
    payload = bytes(200_000)
    for _ in range(100):
        store.create(a_record(time.time, payload=payload))
    assert json.loads(Console(store).done("stats", "--json"))["bytes"] == 20_000_000
    assert max(pages) <= 4_000_000


def test_show(site: Site, console: Console) -> None:
    visitor = site.visitor()

    def fill(session: Any) -> None:
        session["cart"] = ["mug"]
        session["pin"] = SECRET
        session.set("code", SECRET, ttl=60)
        session.permanent = True

    visitor.run(fill)
    handle = visitor.run(lambda session: session.handle)
    text = console.done("show", handle)
    assert re.search(r"^cart +\d+  with the session$", text, re.MULTILINE)
    assert re.search(r"^code +\d+  20\d\d-", text, re.MULTILINE)
    facts = json.loads(console.done("show", handle, "--json"))
    assert facts["handle"] == handle
    assert facts["permanent"] is True
    assert set(facts["keys"]) == {"cart", "pin", "code", "_permanent"}
    assert facts["keys"]["code"]["expires_at"] > facts["created_at"]
    assert facts["keys"]["cart"]["expires_at"] is None
    assert SECRET not in text + json.dumps(facts)
    assert json.loads(console.done("show", handle[:8], "--json")) == facts


def test_show_prints_the_size_of_a_large_value(site: Site, console: Console) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(large="x" * 100_000))
    handle = visitor.run(lambda session: session.handle)
    facts = json.loads(console.done("show", handle, "--json"))
    assert facts["bytes"] < 1000
    assert 100_000 <= facts["keys"]["large"]["bytes"] < 100_010


def test_show_values_as_the_debug_dump_does(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(
        site.store.store, clock=site.clock, debug_show=["cart", "pin", "code", "large", "file"]
    )

    def fill(session: Any) -> None:
        session.update(cart=["mug", {"sku": 7, "token": SECRET}], pin=SECRET, user=SECRET)
        session.update(large=SECRET * 10_000, file=b"x" * 100_000)
        session.set("code", 5, ttl=60)
        session.set("gone", SECRET, ttl=10)

    visitor = site.visitor()
    visitor.run(fill)
    site.clock.advance(20)
    handle = visitor.run(lambda session: session.handle)
    monkeypatch.setattr(
        "flask_gsession.values.large_values.LargeValueStorage.frame",
        lambda *_: pytest.fail("it was loaded"),
    )
    facts = json.loads(console.done("show", handle, "--values", "--json"))
    keys = {name: (each["type"], each["value"]) for name, each in facts["keys"].items()}
    assert keys == {
        "cart": ("list", "['mug', {'sku': 7, 'token': <hidden>}]"),
        "pin": ("str", "<hidden>"),
        "user": ("str", "<hidden>"),
        "large": (None, "<large>"),
        "file": ("bytes", "<large>"),
        "code": ("int", "5"),
    }
    assert facts["keys"]["file"]["bytes"] == 100_000
    text = console.done("show", handle, "--values")
    assert re.search(r"^cart +\d+  with the session +list +\['mug', ", text, re.MULTILINE)
    assert re.search(r"^large +\d+  with the session +<large>$", text, re.MULTILINE)
    assert SECRET not in text + json.dumps(facts)
    assert "value" not in console.done("show", handle) + console.done("show", handle, "--json")


def test_show_a_value_that_cannot_be_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(codec: Codec, data: bytes) -> Any:
        raise UnreadableRecord("corrupt")

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    handle = visitor.run(lambda session: session.handle)
    monkeypatch.setattr(Codec, "decode", decode)
    console = Console(site.store.store, clock=site.clock, debug_show=["a"])
    facts = json.loads(console.done("show", handle, "--values", "--json"))
    assert (facts["keys"]["a"]["type"], facts["keys"]["a"]["value"]) == (None, "<unreadable>")


def test_show_prints_until_when_a_session_is_logged(site: Site, console: Console) -> None:
    (handle,) = handles(site, 1)

    def until() -> Any:
        return json.loads(console.done("show", handle, "--json"))["debug_log_until"]

    assert until() is None
    assert "logged" not in console.done("show", handle)
    before = site.store.store.load(handle)
    assert console.done("debug", handle, "--off") == f"{handle}: requests were not logged\n"
    assert site.store.store.load(handle) == before  # nothing was written
    end = console.done("debug", handle).split()[-1]
    assert until() == end
    assert re.search(
        f"^debug_log_until +{end} \\(in 10 min\\)$", console.done("show", handle), re.M
    )
    assert console.done("debug", handle, "--off") == f"{handle}: requests are no longer logged\n"
    assert until() is None
    console.done("debug", handle)
    site.clock.advance(601)
    assert until() is None
    assert console.done("debug", handle, "--off") == f"{handle}: requests were not logged\n"


def test_a_handle_from_before_a_rotation(site: Site, console: Console) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    old = visitor.run(lambda session: session.handle)
    visitor.run(lambda session: session.rotate(grace=60))
    new = visitor.run(lambda session: session.handle)
    facts = json.loads(console.done("show", old, "--json"))
    assert (facts["handle"], facts["rotated_from"]) == (new, old)
    figures = json.loads(console.done("stats", "--json"))
    assert (figures["sessions"], figures["rotated_away"]) == (1, 1)
    assert [line.split(" ")[0] for line in console.done("list").splitlines()] == [new]
    assert console.done("revoke", old) == f"{old}: ended\n"
    assert visitor.run(dict) == {}
    assert console.events == [old]


def test_stats(site: Site, console: Console) -> None:
    now = int(site.clock() * 1000)
    day = 86_400_000
    for size, age in ((10, 0), (100, 0), (1000, 2 * day), (5000, 20 * day), (70_000, 30.5 * day)):
        record = a_record(site.clock, payload=bytes(size), absolute=31 * 86400)
        site.store.store.create(record._replace(created_at=now - int(age)))
    figures = json.loads(console.done("stats", "--json"))
    histograms = figures.pop("histograms")
    assert figures == {
        "sessions": 5, "bytes": 76_110, "bytes_average": 15_222, "bytes_largest": 70_000,
        "rotated_away": 0, "unreadable": 0,
    }  # fmt: skip
    assert {name: count for name, count in histograms["bytes"].items() if count} == {
        "to 64 B": 1, "to 128 B": 1, "to 1 KB": 1, "to 8 KB": 1, "to 128 KB": 1,
    }  # fmt: skip
    assert list(histograms["age"].values()) == [2, 0, 1, 1, 1]
    text = console.done("stats")
    assert "bytes largest  70000" in text
    assert re.search(r"^to 1 hour +2  #{40}$", text, re.MULTILINE)
    assert re.search(r"^to 7 days +1  #{20}$", text, re.MULTILINE)


# -- ending sessions


def test_revoke(site: Site, console: Console) -> None:
    one, two = site.visitor(), site.visitor()
    for visitor in (one, two):
        visitor.run(lambda session: session.update(a=1))
    handle = one.run(lambda session: session.handle)
    assert console.done("revoke", handle[:12]) == f"{handle}: ended\n"
    assert one.run(dict) == {}
    assert two.run(dict) == {"a": 1}
    assert console.events == [handle]
    assert "no such session" in console.failed("revoke", handle)
    assert console.events == [handle]


def test_revoke_ends_known_sessions_despite_an_unknown_handle(site: Site, console: Console) -> None:
    first, last = handles(site, 2)
    unknown = a_record(site.clock).key
    result = console.run("revoke", first, unknown, last)
    assert result.exit_code == 1
    assert result.stdout == f"{first}: ended\n{last}: ended\n"
    assert f"{unknown}: no such session" in result.stderr


def test_revoke_all(site: Site, console: Console) -> None:
    made = handles(site, 5)
    assert console.run("revoke", "--all", input="n\n").exit_code == 1
    assert console.run("revoke", "--all", input="").exit_code == 1  # nobody there to ask
    asked = console.run("revoke", "--all", input="n\n").output
    assert f"End about 5 sessions of 'session' in {console_place(console)}? [y/N]" in asked
    assert len(site.stored()) == 5
    assert "5 sessions ended" in console.done("revoke", "--all", input="y\n")
    assert site.stored() == {}
    assert sorted(console.events) == sorted(made)
    result = console.run("revoke", "--all", "--yes")
    assert (result.exit_code, result.stdout) == (0, "0 sessions ended\n")
    assert f"the store is {console_place(console)}" in result.stderr


def test_revoke_all_ends_rotated_sessions_but_no_new_ones() -> None:
    class Busy(MemoryStore):
        def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
            page = super().scan(cursor, 1, begins)
            if not cursor and before in self._records.values():
                self.replace(before.key, after, before.version, None)
                self.create(new)
            return page

    store = Busy()
    first, before = (a_record(time.time, key=letter * 43) for letter in "bc")
    after = before._replace(key="a" * 43, version=1)
    new = a_record(time.time, key="A" * 43)
    new = new._replace(created_at=new.created_at + 60_000)
    for record in (first, before):
        store.create(record)
    assert Console(store).done("revoke", "--all", "--yes") == "2 sessions ended\n"
    assert list(store._records) == [new.key]


def test_revoked_is_a_kind_of_destroyed() -> None:
    console = Console("memory://")
    seen: list[Any] = []
    console.ext.on(SessionRevoked, seen.append)
    record = a_record(console.app.extensions["gsession"][console.ext].repository.clock)
    console.ext.store(console.app).create(record)
    console.done("revoke", record.key)
    assert seen == [SessionRevoked(record.key)]
    assert console.events == [record.key]


# -- which store


def test_the_store_that_is_changed_is_named(site: Site, console: Console, tmp_path: Path) -> None:
    file = str(tmp_path / "sessions.jsonl")
    commands = [
        *(("export", file), ("import", file, "--json"), ("cleanup", "--json"), ("stats", "--json")),
        ("revoke", "--all", "--yes"),
    ]
    for words in commands:
        result = console.run(*words)
        assert "session: the store is " in result.stderr
        assert "the store is" not in result.stdout


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:canary@127.0.0.1:1/3?client_name=canary", "redis://127.0.0.1:1/3"),
        ("redis+cluster://:canary@127.0.0.1:1,127.0.0.1:2", "redis+cluster://127.0.0.1:1,"),
        ("unix://:canary@/run/none.sock?db=1", "unix:///run/none.sock"),
        ("mongodb://user:canary@127.0.0.1:1/shop?authSource=canary", "mongodb://127.0.0.1:1/shop"),
        ("memory://", "memory://"),
    ],
    ids=["redis", "cluster", "unix", "mongodb", "memory"],
)
def test_the_store_is_named_without_a_password(url: str, shown: str) -> None:
    said = Console(url, store_timeout=0.2).run("stats").stderr
    assert f"session: the store is {shown}" in said
    assert "canary" not in said


def test_the_place_of_a_client_is_named() -> None:
    """As `SESSION_REDIS` and `SESSION_MONGODB` are, without asking a server."""
    sentinel = Sentinel([("127.0.0.1", 1)]).master_for("shop")
    with MongoClient[Any]("mongodb://user:canary@127.0.0.1:1,b:2/?replicaSet=x") as mongo:
        for client, shown in (
            (Redis.from_url("redis://user:canary@127.0.0.1:1/3"), "redis://127.0.0.1:1/3"),
            (Redis(unix_socket_path="/run/none.sock", password="canary"), "unix:///run/none.sock"),
            (sentinel, "the Redis service shop of Sentinels"),
            (mongo, "mongodb://127.0.0.1:1,b:2"),
        ):
            assert client_location(client) == shown


def test_the_file_of_sqlite_is_named(tmp_path: Path) -> None:
    said = Console(f"sqlite:///{tmp_path}/a.sqlite3").run("stats").stderr
    assert f"session: the store is sqlite:///{tmp_path}/a.sqlite3\n" in said


def test_a_command_that_only_reads_makes_no_file(tmp_path: Path) -> None:
    """It would belong to the caller of the command, and the application couldn't write to it."""
    path = tmp_path / "new" / "sessions.sqlite3"
    console = Console(f"sqlite:///{path}")
    for words in (("list",), ("cleanup", "--dry-run"), ("cleanup",)):
        console.done(*words)
    assert json.loads(console.done("stats", "--json"))["sessions"] == 0
    assert console.done("revoke", "--all", "--yes") == "0 sessions ended\n"
    assert console.done("export", str(tmp_path / "a")) == "session: 0 records exported\n"
    for command in ("show", "revoke", "debug"):
        for handle in ("x" * 43, "x" * 9):
            assert f"{handle}: no such session" in console.failed(command, handle)
    assert not path.parent.exists()


# -- handles


def test_an_unknown_handle(site: Site, console: Console) -> None:
    handles(site, 2)
    unknown = a_record(site.clock).key
    for handle in (unknown, unknown[:8]):
        assert f"Error: {handle}: no such session" in console.failed("show", handle)
        assert f"Error: {handle}: no such session" in console.failed("revoke", handle)


def test_an_expired_session_counts_as_absent(site: Site) -> None:
    """Also while the store still has it."""
    (handle,) = handles(site, 1)
    site.clock.advance(100 * 86400)
    console = Console(site.store.store, clock=site.clock)
    for command in (["show"], ["revoke"], ["debug", "--for", "1m"]):
        assert "no such session" in console.failed(*command, handle), command
    assert handle not in console.done("list")


@pytest.mark.parametrize(
    "handle", ["short", "a b c d e f", "x" * 44, "../../../etc/passwd", "é" * 9]
)
def test_invalid_handles_are_refused(handle: str) -> None:
    console = Console("memory://")
    for command in ("show", "revoke"):
        assert "is not a handle" in console.failed(command, handle, status=2)


def test_an_ambiguous_handle(site: Site, console: Console) -> None:
    one = a_record(site.clock)
    other = one._replace(key=one.key[:20] + ("B" if one.key[20] == "A" else "A") + one.key[21:])
    for record in (one, other):
        site.store.store.create(record)
    for command in ("show", "revoke"):
        assert "2 handles start with" in console.failed(command, one.key[:20])
    assert "ended" in console.done("revoke", one.key[:21])
    assert site.store.store.load(other.key) is not None


@pytest.mark.parametrize("beginning", ["-yes-Aa1", "--all-Aa", "--json-A", "---------"])
def test_a_handle_that_begins_like_an_option(site: Site, beginning: str) -> None:
    console = Console(site.store.store, clock=site.clock)
    record = a_record(site.clock, key=beginning.ljust(43, "x"))
    site.store.store.create(record)
    for handle in (record.key, beginning):
        assert record.key in console.failed("show", handle)  # the payload is not a session's
    assert console.done("revoke", beginning) == f"{record.key}: ended\n"


# -- errors


@pytest.fixture(params=["sqlite", "redis", "mongodb"])
def down(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that cannot be reached."""
    (tmp_path / "file").touch()
    return {
        "sqlite": f"sqlite:///{tmp_path}/file/sessions.sqlite3",
        "redis": f"redis://user:{SECRET.split()[1]}@127.0.0.1:{free_port()}/0",
        "mongodb": f"mongodb://127.0.0.1:{free_port()}/test",
    }[request.param]


COMMANDS = [
    ("list",), ("show", "x" * 43), ("show", "x" * 8), ("revoke", "x" * 43),
    ("revoke", "--all", "--yes"), ("stats",), ("cleanup",), ("cleanup", "--dry-run"),
    ("list", "--user", "ada"), ("revoke", "--user", "ada"), ("users", "rebuild"),
]  # fmt: skip


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] != "cleanup"])
def test_a_store_that_is_down(down: str, words: tuple[str, ...]) -> None:
    console = Console(down, store_timeout=0.2)
    complaint = console.failed(*words)
    assert "session: the store failed" in complaint
    assert "canary" not in complaint
    assert "Traceback" not in complaint


def test_a_store_that_cannot_scan(tmp_path: Path) -> None:
    console = Console(FOLDER_STORE.FolderStore(tmp_path))
    record = a_record(console.app.extensions["gsession"][console.ext].repository.clock)
    console.ext.store(console.app).create(record)
    for words in (("list",), ("stats",), ("show", "x" * 8), ("revoke", "--all", "--yes"),
                  ("users", "rebuild")):  # fmt: skip
        assert "FolderStore can't list its sessions" in console.failed(*words)
    assert "unreadable" in console.failed("show", record.key)
    assert "ended" in console.done("revoke", record.key)


class Failing(MemoryStore):
    """Has three pages, and fails so often before the second one."""

    def __init__(self, failures: int, error: BaseException) -> None:
        super().__init__()
        self.failures, self.error = failures, error

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        if cursor and self.failures:
            self.failures -= 1
            raise self.error
        return super().scan(cursor, 2, begins)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_gsession.repository.scanning._PAUSES", (0, 0))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("words", [("list",), ("stats",), ("revoke", "--all", "--yes")])
def test_an_outage_on_the_way(words: tuple[str, ...]) -> None:
    for failures, status in ((2, 0), (3, 1)):
        store = Failing(failures, StoreUnavailable("pulled the plug"))
        console = Console(store)
        for _ in range(5):
            store.create(a_record(time.time))
        result = console.run(*words)
        assert result.exit_code == status, result.output
        if status:
            assert "the store failed" in result.stderr
            assert "pulled the plug" in result.stderr


def test_ctrl_c_on_the_way() -> None:
    store = Failing(1, KeyboardInterrupt())
    console = Console(store)
    for _ in range(5):
        store.create(a_record(time.time))
    complaint = console.failed("revoke", "--all", "--yes", status=130)
    assert "interrupted after 2 sessions ended" in complaint
    assert console.done("revoke", "--all", "--yes").endswith("3 sessions ended\n")


def test_a_session_that_cannot_be_read(site: Site, console: Console) -> None:
    record = a_record(site.clock)
    site.store.store.create(record)
    result = console.run("show", record.key)
    assert result.exit_code == 1
    assert record.key in result.stdout
    assert "unreadable: corrupt" in result.stderr


def test_a_malformed_record(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    store: Any = console.ext.store(console.app)
    live, broken = a_record(time.time), a_record(time.time)
    for record in (live, broken):
        store.create(record)
    with closing(sqlite3.connect(store.path)) as db, db:
        of_broken = (f"%{broken.key}",)
        db.execute("UPDATE gsession SET version = 'none' WHERE key LIKE ?", of_broken)
    for words in (("show", broken.key), ("show", broken.key[:8]), ("revoke", broken.key[:8])):
        assert f"{broken.key}: unreadable" in console.failed(*words)
    result = console.run("revoke", "--all", "--yes")
    assert (result.exit_code, result.stdout) == (1, "1 session ended\n")
    assert "1 time: unreadable" in result.stderr
    assert store.load(live.key) is None


def test_a_logout_that_is_not_confirmed() -> None:
    store = HookedStore(MemoryStore())

    store.after("delete", lambda: Deleted(True, None, "0 of 1 replicas"))
    console = Console(store)
    assert "ended, but 0 of 1 replicas" in console.failed("revoke", "x" * 43)


def test_all_logouts_are_made_where_none_is_confirmed() -> None:
    class Unconfirmed(MemoryStore):
        def delete(self, *arguments: Any) -> Deleted:
            return super().delete(*arguments)._replace(unconfirmed="0 of 1 replicas")

    store = Unconfirmed()
    console = Console(store)
    made = [a_record(time.time) for _ in range(3)]
    for record in made:
        store.create(record)
    result = console.run("revoke", "--all", "--yes")
    assert (result.exit_code, result.stdout) == (1, "3 sessions ended\n")
    assert "3 times: ended, but 0 of 1 replicas" in result.stderr
    assert sorted(console.events) == sorted(record.key for record in made)


def test_several_sessions() -> None:
    console = Console("memory://")
    Session(console.app, store="memory://", cookie_name="second")
    assert "--session session | second" in console.failed("list", status=2)
    assert console.done("list", "--session", "second") == ""
    wrong = console.failed("list", "--session", "x", status=2)
    assert "No session has the cookie 'x': --session session | second" in wrong


DRIVERS = """
import sys
from flask import Flask
from flask.cli import ScriptInfo
from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.cli.common import store_location

def create_app():
    app = Flask("shop")
    app.secret_key = "a key for tests"
    Session(app, store=sys.argv[1])
    return app

sys.modules["redis"] = sys.modules["pymongo"] = None
gsession.main(["list"], "gsession", obj=ScriptInfo(create_app=create_app))
"""


@pytest.mark.parametrize("kind", ["redis", "mongodb"])
def test_a_driver_that_is_not_installed(kind: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", DRIVERS, f"{kind}://user:canary@localhost/0"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"Error: SESSION_STORE is a {kind} URL, and its driver is not installed")
    assert line.endswith(f"install the {kind} extra, flask-gsession[{kind}]")
    assert (run.returncode, run.stdout) == (1, "")


def test_messages_while_the_application_is_created(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def made(**settings: Any) -> Result:
        def create_app() -> Flask:
            app = Flask(__name__)
            app.secret_key = "a key for tests"
            Session(app, store=f"sqlite:///{tmp_path}/a.sqlite3", **settings)
            SessionLimits(app, proxies=0)
            return app

        info = ScriptInfo(create_app=create_app)
        return CliRunner().invoke(gsession, ["list"], obj=info, catch_exceptions=False)

    said = made()
    assert (said.exit_code, said.stdout) == (0, "")
    assert said.stderr == f"session: no sessions in sqlite:///{tmp_path}/a.sqlite3\n"
    assert not recwarn.list
    wrong = made(idle_timeout=-1)
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Error: SESSION_IDLE_TIMEOUT ")
    assert made(logout_replicas=1).exit_code == 0
    assert "SESSION_LOGOUT_REPLICAS" in str(recwarn.pop(UserWarning).message)


def test_memory_says_that_it_sees_only_itself() -> None:
    assert "can't see your server's sessions" in Console("memory://").run("list").stderr


@pytest.mark.parametrize(
    "words",
    [
        *(("revoke",), ("revoke", "--all", "x" * 43)),
        *(("list", "--where", "user"), ("list", "--where", "=mira"), ("list", "--sort", "size")),
        *(("list", "--limit", "0"), ("cleanup", "--batch", "10001")),
    ],
)
def test_wrong_arguments_exit_with_2(words: tuple[str, ...]) -> None:
    assert Console("memory://").run(*words).exit_code == 2


# -- on a terminal


def on_a_terminal(url: str, *words: str, **variables: str) -> str:
    """The output of a real process on a terminal. Expects the exit status 0."""
    code = (
        "import json, os, sys\n"
        "from tests.harness.console import Console\n"
        "settings = json.loads(os.environ.get('SETTINGS', '{}'))\n"
        "console = Console(sys.argv.pop(1), **settings)\n"
        "console.app.secret_key = os.environ.get('KEY', console.app.secret_key)\n"
        "from flask_gsession.cli import gsession\n"
        "for width in os.environ.get('WIDTHS', os.environ['COLUMNS']).split():\n"
        "    os.environ['COLUMNS'] = width\n"
        "    with console.app.app_context():\n"
        "        gsession(standalone_mode=False)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    environment |= variables
    with subprocess.Popen(
        [sys.executable, "-c", code, url, *words],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b"".join(read_all(ours))
        assert process.wait(60) == 0, shown
    return shown.decode()


def read_all(descriptor: int) -> Iterator[bytes]:
    """The output until the other end of a terminal is closed."""
    with open(descriptor, "rb", buffering=0) as file:
        while True:
            try:
                piece = file.read(4096)
            except OSError:  # how Linux says so
                return
            if not piece:
                return
            yield piece


def test_on_a_terminal(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    store: Any = console.ext.store(console.app)
    records: list[Record] = [a_record(time.time) for _ in range(101)]
    for record in records:
        store.create(record)
    shown = on_a_terminal(sqlite_url, "list")
    listed = [record.key for record in records if record.key in shown]
    assert len(listed) == 100
    assert "idles out in" in shown
    assert "There are more" in shown
    assert "\x1b[" in shown  # rich
    assert "\x1b[" in on_a_terminal(sqlite_url, "stats")


def test_the_bar_of_a_clean_up(
    sqlite_url: str, redis_url: str, redis_client: Redis, store_prefix: str
) -> None:
    console = Console(sqlite_url)
    store: Any = console.ext.store(console.app)
    for number in range(30):
        store.create(a_record(time.time, idle=1000 if number < 29 else 0.01))
        redis_client.set(f"{store_prefix}{{{a_record(time.time).key}}}:lock", "left behind")
    time.sleep(0.02)
    shown = on_a_terminal(sqlite_url, "cleanup")
    assert "1 expired session removed" in shown
    assert "100%" in shown  # counts expired records, not sessions
    settings = json.dumps({"key_prefix": store_prefix})
    console = Console(redis_url, key_prefix=store_prefix)
    console.ext.store(console.app).create(a_record(time.time, idle=1000))
    shown = on_a_terminal(redis_url, "cleanup", "--batch", "5", SETTINGS=settings)
    assert "30 orphaned locks removed" in shown
    assert "100%" not in shown  # of how many things is not known: there is one session


@pytest.mark.parametrize("words", ["stats", "cleanup", "export -", "revoke --all --yes"])
def test_without_a_progress_bar_nothing_is_counted(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console("memory://")
    monkeypatch.setattr(MemoryStore, "count", lambda self: pytest.fail("counted for nobody"))
    console.done(*words.split())


def plain(shown: str) -> list[str]:
    """The lines that a terminal showed, without colours."""
    return [line.rstrip() for line in re.sub("\x1b\\[[^m]*m", "", shown).splitlines()]


@pytest.mark.parametrize("letters", ["utf-8", "latin-1"], ids=["rich", "plain"])
def test_the_list_on_narrow_terminals(sqlite_url: str, letters: str) -> None:
    console = Console(sqlite_url)
    store: Any = console.ext.store(console.app)
    # As wide for some minutes as they are now.
    record = a_record(time.time, absolute=30 * 86400 + 20 * 3600 + 1800)
    record = record._replace(created_at=record.created_at - 86_400_000 - 20 * 3_600_000)
    store.create(record)
    columns = ["handle", "age", "idles out in", "ends in", "bytes"]
    left = {
        120: columns,
        80: ["handle", "age", "idles out in", "bytes"],
        70: ["handle", "idles out in", "bytes"],
        52: ["handle", "bytes"],
        45: ["handle"],
    }
    widths = " ".join(map(str, left))
    words = ("list", "--sort", "none")  # without a progress bar
    lines = plain(on_a_terminal(sqlite_url, *words, WIDTHS=widths, PYTHONIOENCODING=letters))
    assert len(lines) == 2 * len(left)
    for (width, names), heads, row in zip(left.items(), lines[::2], lines[1::2], strict=True):
        assert re.split("  +", heads) == names
        assert row.startswith(record.key)
        assert len(row) <= width


def test_the_histograms_on_narrow_terminals(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    with console.app.test_client().session_transaction() as session:
        session["a"] = 1
    lines = plain(on_a_terminal(sqlite_url, "stats", WIDTHS="80 50"))
    rows = [line for line in lines if line.startswith("to 1 hour")]
    assert [row.split() for row in rows] == [
        ["to", "1", "hour", "1", "#" * 40], ["to", "1", "hour", "1"],
    ]  # fmt: skip


def test_the_doctor_tears_no_words_apart(sqlite_url: str) -> None:
    secret = "ei4Xah0Oophaequ1eeb5Ahch8iexoo9k"
    settings = json.dumps({"absolute_timeout": 86400 * 60})
    narrow, wide = (
        plain(on_a_terminal(sqlite_url, "doctor", COLUMNS=width, SETTINGS=settings, KEY=secret))
        for width in ("80", "1000")
    )
    assert narrow[0].startswith("session: the store is ")
    assert max(map(len, narrow[1:])) <= 80
    advice = next(line for line in wide if "OWASP" in line)
    assert len(advice) > 200
    assert advice.strip() in " ".join(line.strip() for line in narrow)


def test_long_keys_and_values_take_several_lines(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    name = "a-name" * 10
    with console.app.test_client().session_transaction() as session:
        session[name] = "a-word" * 15
    (line,) = console.done("list").splitlines()
    words = ("show", line.split(" ")[0], "--values")
    settings = json.dumps({"debug_show": [name]})
    lines = plain(on_a_terminal(sqlite_url, *words, WIDTHS="80 40", SETTINGS=settings))
    wide, narrow = (at for at, line in enumerate(lines) if line.startswith("key "))
    end = next(at for at in range(wide, len(lines)) if lines[at].startswith("handle "))
    for width, table in ((80, lines[wide:end]), (40, lines[narrow:])):
        assert max(map(len, table)) <= width
        heads = table[0]
        assert ("expires_at" in heads) is (width == 80)
        cells = [
            (line[: heads.index(" bytes")], line[heads.index("value") :]) for line in table[1:]
        ]
        assert "".join(cell.strip() for cell, _ in cells) == name
        assert "".join(value.strip() for _, value in cells) == repr("a-word" * 15)


def test_a_terminal_shows_keys_as_they_are(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    names = ["[/b]", "[bold]pin", "a:star:b"]
    with console.app.test_client().session_transaction() as session:
        session.update(dict.fromkeys(names, 1))
    (line,) = console.done("list").splitlines()
    handle = line.split(" ")[0]
    shown = on_a_terminal(sqlite_url, "show", handle)
    assert [name for name in names if name in shown] == names
    narrow = on_a_terminal(sqlite_url, "list", COLUMNS="40", PYTHONIOENCODING="latin-1")
    assert handle in narrow
