"""The audit log: a record for each thing that concerns the sign-in of a user, on each store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user

from flask_gsession.errors import SignInRefused, TooManySessions
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.console import Console

LOGGER = "flask_gsession.audit"
CANARY = "a canary that nobody may see"
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class Log(logging.Handler):
    """Formats records as JSON with all their fields, as log formatters for JSON do."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name not in STANDARD}
        text = {"level": record.levelname, "message": record.getMessage()}
        self.lines.append(json.dumps({**text, **fields}))

    def records(self) -> list[dict[str, Any]]:
        """The records so far, without their messages."""
        found = [json.loads(line) for line in self.lines]
        self.lines.clear()
        for each in found:
            assert each.pop("message").startswith(f"{each['action']} user_id=")
        return found

    def only(self) -> dict[str, Any]:
        (record,) = self.records()
        return record


@pytest.fixture
def log() -> Iterator[Log]:
    log, logger = Log(), logging.getLogger(LOGGER)
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    yield log
    logger.removeHandler(log)
    logger.setLevel(logging.NOTSET)


def signed_in(site: Site, user: str = "ada") -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: (session.update(secret=CANARY), session.bind(user)))
    return visitor


def ids(visitor: Visitor) -> dict[str, Any]:
    handle, device = visitor.run(lambda session: (session.handle, session.device_id))
    return {"user_id": "ada", "device_id": device, "handle": handle}


INFO = {"level": "INFO", "client": "127.0.0.1"}


def test_sign_in_and_sign_out(site: Site, log: Log) -> None:
    for way in ("destroy", "clear", "unbind"):
        visitor = signed_in(site)
        known = ids(visitor)
        assert log.only() == {**INFO, "action": "signed_in", **known, "method": "sign-in"}
        visitor.run(lambda session, way=way: getattr(session, way)())
        del known["handle"]
        assert log.only() == {**INFO, "action": "signed_out", **known}


def test_sign_in_as_another_user(site: Site, log: Log) -> None:
    visitor = signed_in(site, "bob")
    log.lines.clear()
    visitor.run(lambda session: session.bind("ada"))
    found = {each["action"]: each["user_id"] for each in log.records()}
    assert found == {"signed_in": "ada", "signed_out": "bob"}


def test_a_confirmation_is_logged(site: Site, log: Log) -> None:
    visitor = signed_in(site)
    known = ids(visitor)
    log.lines.clear()
    visitor.run(lambda session: session.confirm("passkey"))
    assert log.only() == {**INFO, "action": "confirmed", **known, "method": "passkey"}


def test_a_revocation_in_a_request_is_by_its_user(site: Site, log: Log) -> None:
    visitor, other = signed_in(site), signed_in(site)
    gone = ids(other)
    log.lines.clear()
    visitor.run(lambda session: site.ext.users.revoke("ada", gone["device_id"], reason="mine"))
    revoked = {**INFO, "action": "revoked", **gone, "reason": "mine", "by": "ada"}
    assert log.only() == revoked
    gone = ids(visitor)
    visitor.run(lambda session: site.ext.users.revoke_all("ada"))
    assert log.only() == {**revoked, **gone, "reason": None}


@pytest.mark.parametrize("reason", [b"stolen", {"why": {"stolen"}}, Decimal(5)])
def test_a_reason_that_is_not_text_is_shown_as_such(site: Site, log: Log, reason: Any) -> None:
    """Losing the record would be worse."""
    visitor = signed_in(site)
    gone = ids(visitor)
    log.lines.clear()
    with site.app.app_context():
        assert site.ext.users.revoke("ada", gone["device_id"], reason=reason, by="admin")
    assert log.only()["reason"] == str(reason)


def test_a_revocation_elsewhere(site: Site, log: Log) -> None:
    visitor = signed_in(site)
    known = ids(visitor)
    log.lines.clear()
    with site.app.app_context():
        site.ext.users.revoke_all("ada", reason="password changed", by="support")
    expected = {**INFO, "client": None, "action": "revoked", **known}
    assert log.only() == {**expected, "reason": "password changed", "by": "support"}


@pytest.mark.parametrize("words", ["--user ada", "--user ada --device {device_id}", "{handle}"])
def test_a_revocation_by_the_command(site: Site, log: Log, words: str) -> None:
    visitor = signed_in(site)
    known = ids(visitor)
    log.lines.clear()
    console = Console(site.store, clock=site.clock)
    console.done("revoke", *words.format(**known).split(), "--yes", "--reason", "stolen")
    expected = {**INFO, "client": None, "action": "revoked", **known}
    assert log.only() == {**expected, "reason": "stolen", "by": "flask gsession"}


def test_a_session_of_before_a_failover(site: Site, log: Log) -> None:
    """Its deletion was lost, and it is back."""
    visitor = signed_in(site)
    known = ids(visitor)
    record = site.store.store.load(known["handle"])
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    log.lines.clear()
    assert record is not None
    site.store.store.create(record)
    site.clock.advance(301)
    visitor.run(lambda session: session.owner)
    assert visitor.run(lambda session: session.owner) is None
    assert log.only() == {
        **INFO, "action": "revoked", **known, "reason": "not a member", "by": None,
    }  # fmt: skip


def test_a_refused_sign_in(site: Site, log: Log) -> None:
    visitor = site.visitor()

    def sign_in(session: Any) -> None:
        with site.ext.users.login("ada"):
            Console(site.store, clock=site.clock).done("revoke", "--user", "ada", "--yes")
            with pytest.raises(SignInRefused):
                session.bind("ada")

    visitor.run(sign_in)
    assert log.only() == {
        **INFO, "level": "WARNING", "action": "sign_in_refused", "user_id": "ada",
        "reason": "revoked",
    }  # fmt: skip


def test_a_device_limit_is_logged(make_site: SiteMaker, log: Log) -> None:
    site = make_site(max_per_user=1)
    known = ids(signed_in(site))
    log.lines.clear()
    signed_in(site)
    found = {each.pop("action"): each for each in log.records()}
    assert found["limit_reached"] == {**INFO, "user_id": "ada", "limit": 1, "ended": 1}
    assert found["revoked"] == {**INFO, **known, "reason": "limit", "by": None}
    assert set(found) == {"limit_reached", "revoked", "signed_in"}


def test_a_limit_that_refuses(make_site: SiteMaker, log: Log) -> None:
    site = make_site(max_per_user=1, max_policy="refuse")
    signed_in(site)
    log.lines.clear()

    def sign_in(session: Any) -> None:
        with pytest.raises(TooManySessions):
            session.bind("ada")

    site.visitor().run(sign_in)
    assert [(each["action"], each.get("reason"), each.get("ended")) for each in log.records()] == [
        ("sign_in_refused", "full", None),
        ("limit_reached", None, 0),
    ]


# -- Flask-Login


class Member(UserMixin):  # type: ignore[misc]  # it ships no types
    def __init__(self, id: str) -> None:
        self.id = id


def with_logins(site: Site) -> None:
    LoginManager(site.app).user_loader(Member)


def test_sign_ins_by_flask_login_are_logged(site: Site, log: Log) -> None:
    with_logins(site)
    visitor = site.visitor()
    visitor.run(lambda session: login_user(Member("ada"), remember=True))
    assert (log.only() | {"device_id": "", "handle": ""})["method"] == "sign-in"
    visitor.run(lambda session: login_user(Member("ada")))
    again = log.only()
    assert (again["action"], again["user_id"], again["method"]) == ("confirmed", "ada", "sign-in")
    visitor.delete_cookie(site.cookie_name)
    visitor.run(lambda session: current_user.is_authenticated)
    back = log.only()
    assert (back["action"], back["method"]) == ("signed_in", "remember-me")
    visitor.run(lambda session: logout_user())
    assert log.only()["action"] == "signed_out"


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_session_of_an_earlier_version(
    site: Site, make_site: SiteMaker, log: Log, rebuilt: bool
) -> None:
    with_logins(site)
    earlier = make_site(store=site.store).visitor()  # without Flask-Login, so nothing is bound
    earlier.run(lambda session: session.update(_user_id="ada"))
    visitor = site.visitor(earlier.cookie)
    if rebuilt:
        with site.app.app_context():
            assert site.ext.users.rebuild() == 1
    else:
        visitor.run(lambda session: session.update(a=1))
    found = log.only()
    assert (found["action"], found["method"]) == ("bound", "earlier version")
    assert ids(visitor) == {name: found[name] for name in ("user_id", "device_id", "handle")}


# -- what no record holds


def test_no_record_holds_a_token_or_a_value(site: Site, log: Log) -> None:
    secrets = {CANARY}
    visitors = [signed_in(site) for _ in range(2)]
    secrets.update(visitor.cookie or "" for visitor in visitors)
    visitors[0].run(lambda session: session.confirm())
    secrets.add(visitors[0].cookie or "")
    visitors[0].run(lambda session: site.ext.users.revoke_others())
    visitors[0].run(lambda session: session.bind("bob"))
    secrets.add(visitors[0].cookie or "")
    visitors[0].run(lambda session: session.destroy())
    assert {json.loads(line)["action"] for line in log.lines} == {
        *("signed_in", "confirmed", "revoked", "signed_out")
    }
    text = "\n".join(log.lines)
    for secret in secrets:
        assert secret.partition(".")[0] not in text


def test_a_user_id_cannot_forge_a_line(site: Site, log: Log) -> None:
    user = 'ada" reason="none"\nsigned_in user_id="bob'
    signed_in(site, user)
    message = json.loads(log.lines[0])["message"]
    assert message.count("\n") == 0
    assert message.startswith(f"signed_in user_id={json.dumps(user)} device_id=")


def test_nothing_is_formatted_where_nobody_listens(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.watching.audit.json", None)
    visitor = signed_in(site)
    visitor.run(lambda session: session.destroy())
