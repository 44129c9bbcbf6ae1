"""A session of Flask-Session goes on as one of ours, on every store of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from itsdangerous import Signer

from flask_gsession.events import ImportRefused, SessionImported
from tests.harness.apps import Site, SiteMaker

from .old import OldFiles, visit


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@pytest.fixture
def site(make_site: SiteMaker, old: OldFiles) -> Site:
    return make_site(config=old.config)


def test_a_session_continues_under_another_cookie(site: Site, old: OldFiles) -> None:
    sid = old.add(_user_id="7", cart=[{"sku": "mug"}], _permanent=True)
    visitor = visit(site, sid)
    assert visitor.run(dict) == {"_user_id": "7", "cart": [{"sku": "mug"}], "_permanent": True}
    assert site.cookie_name == "session_gs"
    assert visitor.cookie is not None
    assert visitor.get_cookie("session").value == sid  # type: ignore[union-attr]
    visitor.run(lambda session: session["cart"].append("pen"))
    assert visitor.run(lambda session: session["cart"]) == [{"sku": "mug"}, "pen"]
    assert len(site.happened(SessionImported)) == 1
    assert old.has(sid)


def test_every_request_with_the_old_cookie_gets_the_same_session(site: Site, old: OldFiles) -> None:
    sid = old.add(cart=1)
    first, second = visit(site, sid), visit(site, sid)
    handles = {visitor.run(lambda session: session.handle) for visitor in (first, second)}
    assert len(handles) == 1
    assert first.cookie == second.cookie
    first.run(lambda session: session.update(seen="first"))
    assert visit(site, sid).run(lambda session: session["seen"]) == "first"


@pytest.mark.parametrize("way", ["destroy", "clear"])
@pytest.mark.parametrize("cookies", ["both", "old", "new"])
def test_a_logout_ends_both(site: Site, old: OldFiles, way: str, cookies: str) -> None:
    sid = old.add(_user_id="7")
    visitor = visit(site, sid)
    if cookies != "old":
        visitor.run(dict)
    if cookies == "new":
        visitor.delete_cookie("session")
    visitor.run(lambda session: getattr(session, way)())
    assert not old.has(sid)
    assert visitor.get_cookie("session") is None
    assert visitor.cookie is None
    assert visit(site, sid).run(dict) == {}
    old.add(sid, _user_id="7")  # an old worker wrote it back
    late = visit(site, sid)
    assert late.run(dict) == {}
    assert late.get_cookie("session") is None


@pytest.mark.parametrize("grace", [0, 100])
def test_a_rotation_after_the_import(site: Site, old: OldFiles, grace: float) -> None:
    """The old cookie leads to the session within the grace, but yields no token."""
    sid = old.add(_user_id="7")
    visitor = visit(site, sid)
    visitor.run(lambda session: session.rotate(grace=grace))
    late = visit(site, sid)
    assert late.run(dict) == ({"_user_id": "7"} if grace else {})
    assert late.cookie is None
    assert visitor.run(dict) == {"_user_id": "7"}


def test_a_logout_that_rotates_through_a_pointer(site: Site, old: OldFiles) -> None:
    """As Flask-Security does it, in a request whose old cookie leads through a pointer."""
    sid = old.add(_user_id="7")
    visitor = visit(site, sid)
    visitor.run(lambda session: session.rotate(grace=100))

    def log_out(session: Any) -> None:
        session.clear()
        session.rotate(grace=0)

    late = visit(site, sid)
    late.run(log_out)
    assert late.get_cookie("session") is None
    assert not old.has(sid)
    assert visitor.run(dict) == {}


@pytest.mark.parametrize("way", ["destroy", "clear"])
def test_a_logout_ends_a_later_old_session_too(site: Site, old: OldFiles, way: str) -> None:
    """After a rollback in which the user signed in at an old worker, and forward again."""
    first, second = old.add(_user_id="7"), old.add(_user_id="7")
    visitor = visit(site, first)
    visitor.run(dict)
    visitor.set_cookie("session", second)
    assert visitor.run(dict) == {"_user_id": "7"}
    visitor.run(lambda session: getattr(session, way)())
    assert not old.has(first)
    assert not old.has(second)
    assert visitor.get_cookie("session") is None


def test_no_cookie_and_no_use_cost_nothing(site: Site, old: OldFiles) -> None:
    visitor = visit(site, old.add(cart=1))
    with site.counted() as count:
        visitor.get("/untouched")
        site.visitor().run(dict)
    assert count.trips == 0


@pytest.mark.parametrize("before", [False, True], ids=["signer-off-before", "signer-on-before"])
@pytest.mark.parametrize("after", [False, True], ids=["off-now", "on-now"])
def test_the_signer_is_switched_in_the_same_deploy(
    make_site: SiteMaker, old: OldFiles, before: bool, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A cookie that can't be checked any more stays, so that the change can be undone."""
    site = make_site(config=old.config | {"SESSION_USE_SIGNER": after})
    sid = old.add(_user_id="7")
    signer = Signer("a key for tests", salt="flask-session", key_derivation="hmac")
    visitor = visit(site, signer.sign(sid).decode() if before else sid)
    accepted = before or not after
    assert visitor.run(dict) == ({"_user_id": "7"} if accepted else {})
    assert visitor.get_cookie("session") is not None
    assert [event.reason for event in site.happened(ImportRefused)] == (
        [] if accepted else ["unknown cookie"]
    )
    assert ("change it back" in caplog.text) is not accepted
    visitor.run(lambda session: session.destroy())
    assert visitor.get_cookie("session") is None
    assert old.has(sid) is not accepted


MALFORMED: dict[str, Any] = {
    "empty": "",
    "short": "a" * 42,
    "long": "a" * 44,
    "dot": "a" * 21 + "." + "a" * 21,
    "slash": "a" * 42 + "/",
    "plus": "a" * 42 + "+",
    "equals": "a" * 42 + "=",
    "blank": "a" * 42 + " ",
    "quoted letters": '"\\141' + "a" * 43 + '"',
    "parents": "../" * 14 + "a",
    "umlaut": "a" * 42 + "\xe4",
    "star": "*" * 43,
    "percent": "%41" * 14 + "a",
    "newline": '"' + "a" * 42 + '\\012"',
    "nul": '"' + "a" * 42 + '\\000"',
    "uuid in capitals": "01234567-89AB-CDEF-0123-456789ABCDEF",
    "uuid without hyphens": "0123456789abcdef0123456789abcdef",
    "uuid in braces": "{01234567-89ab-cdef-0123-456789abcdef}",
    "hyphens in wrong places": "012345678-9ab-cdef-0123-456789abcdef",
    "very long": "a" * 4000,
    "token of ours": "a" * 43 + "." + "b" * 22,
    "flask": "eyJhIjoxfQ.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb",
}


#: Other settings may read these, so they stay in the browser.
UNKNOWN = {"short", "long", "dot", "uuid without hyphens", "very long", "token of ours", "flask"}
UNKNOWN |= {"empty", "blank", "quoted letters", "uuid in capitals", "hyphens in wrong places"}


def test_a_malformed_id_reaches_no_store(
    site: Site, old: OldFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a store was asked")

    monkeypatch.setattr("flask_gsession.moving.cachelib_cache.CacheFiles.load", never)
    client = site.app.test_client(use_cookies=False)
    for name, value in MALFORMED.items():
        with site.visit(dict) as page, site.counted() as count:
            response = client.get(page.path, headers={"Cookie": f"session={value}"})
        assert (response.status_code, count.trips) == (200, 0), name
        deleted = [each for each in response.headers.getlist("Set-Cookie") if "session=;" in each]
        assert len(deleted) == (0 if name in UNKNOWN else 1), name
