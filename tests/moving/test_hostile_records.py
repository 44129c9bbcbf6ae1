"""Planted and damaged old records, secrets that stay secret, and values that can't be kept."""

from __future__ import annotations

import datetime as dt
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import ImportRefused, SessionImported
from flask_gsession.moving.cachelib_cache import CacheFiles
from tests.harness.apps import Site, SiteMaker

from .old import OldFiles, visit
from .test_pickles import PLANTED, Calls, bomb


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@pytest.fixture
def site(make_site: SiteMaker, old: OldFiles) -> Site:
    return make_site(config=old.config)


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the process may load a pickle."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled in a request")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, never)


HOSTILE: dict[str, bytes] = {
    **{name: PLANTED[name] for name in ("global", "reduce", "inst", "obj", "build", "newobj")},
    **{name: PLANTED[name] for name in ("stack global", "ext1", "persid", "datetime")},
    "memo bomb": bomb(60),
    "deep": b"]" * 5_000 + b"a" * 4_999 + b".",
    "deep tuples": b"(" * 5_000 + b"t" * 5_000 + b".",
    "a long key": PLANTED["a long key"],
    "a large value, many times": pickle.dumps({"a": ["x" * 1_000_000] * 100}),
    "truncated": pickle.dumps({"a": 1})[:-3],
    "no pickle": b"\x00" * 100,
    "not a dict": pickle.dumps([1]),
    "nothing": b"",
}


@pytest.mark.usefixtures("no_unpickling")
def test_a_hostile_record_stays_where_it_is(
    site: Site, old: OldFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted, logged once with the command to run, and harms nobody."""
    for number, (name, stored) in enumerate(HOSTILE.items(), 1):
        sid = f"{number:02}".ljust(43, "h")
        old.put_raw(sid, stored)
        visitor = visit(site, sid)
        for _ in range(2):
            assert visitor.run(dict) == {}, name
        assert visitor.get_cookie("session") is not None, name
        assert old.has(sid), name
        assert len(site.happened(ImportRefused)) == 2 * number, name
        assert sid not in caplog.text
    visitor.run(lambda session: session.update(new=1))
    assert visitor.run(lambda session: session["new"]) == 1
    kinds = {event.reason.partition(":")[0] for event in site.happened(ImportRefused)}
    assert caplog.text.count("was not taken over") == len(kinds)
    assert "flask gsession migrate" in caplog.text


def test_a_planted_call_is_never_made(site: Site, old: OldFiles, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    sid = "p" * 43
    old.put_raw(sid, pickle.dumps({"_user_id": "7", "x": Calls(planted)}))
    assert visit(site, sid).run(dict) == {}
    assert not planted.exists()


@pytest.mark.usefixtures("no_unpickling")
def test_an_expired_or_truncated_file(site: Site, old: OldFiles) -> None:
    sid = old.add(a=1)
    path = Path(old.cache._get_filename(f"session:{sid}"))
    whole = path.read_bytes()
    path.write_bytes(b"\x01\x00\x00\x00" + whole[4:])
    expired = visit(site, sid)
    assert expired.run(dict) == {}
    assert expired.get_cookie("session") is None
    path.write_bytes(whole[:3])
    truncated = visit(site, sid)
    assert truncated.run(dict) == {}
    assert truncated.get_cookie("session") is not None


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("values", [{}, {"_permanent": True}])
def test_an_empty_session_is_not_taken_over(
    site: Site, old: OldFiles, values: dict[str, Any]
) -> None:
    """Flask-Session 0.5 keeps one for every visitor."""
    visitor = visit(site, old.add(**values))
    assert visitor.run(dict) == {}
    assert visitor.get_cookie("session") is None
    assert site.stored() == {}


def test_keys_and_values_that_cannot_be_kept(
    make_site: SiteMaker, old: OldFiles, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(config=old.config, max_keys=3, max_depth=3)
    sid = "k" * 43
    values = {"a": 1, 7: "secret", b"b": 1, "deep": [[[["secret"]]]], "c": 2, "d": 3, "beyond": 4}
    old.put_raw(sid, pickle.dumps(values))
    assert visit(site, sid).run(dict) == {"a": 1, "c": 2, "d": 3}
    (event,) = site.happened(SessionImported)
    assert event.source == "flask-session"
    assert event.dropped == ("7", "b'b'", "'deep'", "'beyond'")
    assert caplog.text.count("can't be kept") == 4
    assert "secret" not in caplog.text


def test_large_values_move_to_places_of_their_own(site: Site, old: OldFiles) -> None:
    photo = os.urandom(300_000)
    sid = old.add(photo=photo, text="x" * 40_000)
    visitor = visit(site, sid)
    assert visitor.run(lambda session: session["photo"]) == photo
    assert len(site.inside.blobs()) == 2
    visitor.run(lambda session: session.destroy())
    assert site.inside.blobs() == {}


def test_a_loser_leaves_no_large_values(site: Site, old: OldFiles) -> None:
    sid = old.add(photo=os.urandom(300_000))
    other = visit(site, sid)
    site.before_each("create", lambda: other.run(dict))
    assert len(visit(site, sid).run(lambda session: session["photo"])) == 300_000
    assert len(site.inside.blobs()) == 1


@pytest.mark.parametrize("operation", ["load", "delete"])
def test_the_old_id_is_a_secret(
    site: Site,
    old: OldFiles,
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not in our store, in logs, in events, or in the variables of a traceback."""
    sid = old.add(_user_id="7")
    visitor = visit(site, sid)
    if operation == "delete":
        visitor.run(dict)
        assert not any(sid.encode() in raw for raw in site.stored().values())
        assert not any(sid in key for key in site.stored())

    def fails(self: CacheFiles, name: str) -> Any:
        key = name.encode()  # as drivers have it in their variables
        raise StoreUnavailable("the old store is down" if key else "")

    monkeypatch.setattr(CacheFiles, operation, fails)
    seen: list[str] = []

    def view(session: Any) -> None:
        try:
            session.destroy()
        except StoreUnavailable as error:
            shown = traceback.TracebackException.from_exception(error, capture_locals=True)
            seen.extend(shown.format())
            raise

    assert visitor.ask(view).status_code == 503
    text = "".join(seen) + caplog.text + repr(site.events)
    assert "the old store is down" in text
    assert sid not in text
    assert "a key for tests" not in text
    assert visitor.get_cookie("session") is not None


def test_everything_is_sealed_with_encryption_on(make_site: SiteMaker, old: OldFiles) -> None:
    site = make_site(config=old.config, encryption_keys=[b"k" * 32])
    sid = old.add(cart="mug")
    visitor = visit(site, sid)
    assert visitor.run(dict) == {"cart": "mug"}
    for raw in site.stored().values():
        assert b"mug" not in raw
        assert b"flask-session" not in raw
    later = make_site(
        config=old.config, encryption_keys=[b"n" * 32, b"k" * 32], store=site.store
    )  # the keys were rotated
    assert visit(later, sid).run(lambda session: session.handle) == visitor.run(
        lambda session: session.handle
    )


def test_a_mark_that_cannot_be_read(make_site: SiteMaker, old: OldFiles) -> None:
    """Without the key that sealed the mark, nobody knows whether the session ended: no import."""
    site = make_site(config=old.config, encryption_keys=[b"k" * 32])
    sid = old.add(cart="mug")
    visit(site, sid).run(lambda session: session.destroy())
    old.add(sid, cart="mug")
    later = make_site(config=old.config, encryption_keys=[b"n" * 32], store=site.store)
    visitor = visit(later, sid)
    assert visitor.run(dict) == {}
    assert visitor.get_cookie("session") is not None


def test_a_datetime_waits_for_the_migration(site: Site, old: OldFiles) -> None:
    sid = old.add(_user_id="7", at=dt.datetime(2026, 1, 1))
    visitor = visit(site, sid)
    assert visitor.run(dict) == {}
    (event,) = site.happened(ImportRefused)
    assert event.reason == "pickle: operation STACK_GLOBAL"
    assert visitor.get_cookie("session") is not None
    assert old.has(sid)
