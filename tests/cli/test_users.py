"""``flask gsession`` with ``--user``, and ``users rebuild``, on each store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import DeviceRevoked
from flask_gsession.users.rosters import roster_key
from tests.cli.test_command import on_a_terminal
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.console import Console


@pytest.fixture
def console(site: Site) -> Console:
    return Console(site.store, clock=site.clock)


@pytest.fixture
def revoked(console: Console) -> list[Any]:
    """The user, device, reason and actor of each session that the command revokes."""
    found: list[Any] = []
    console.ext.on(
        DeviceRevoked,
        lambda event: found.append((event.user_id, event.device_id, event.reason, event.by)),
    )
    return found


def signed_in(site: Site, user: str = "ada", **how: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.bind(user, **how))
    return visitor


def owner(visitor: Visitor) -> Any:
    return visitor.run(lambda session: session.owner)


def ids(visitor: Visitor) -> Any:
    return visitor.run(lambda session: (session.handle, session.device_id))


# -- list and show


def test_the_sessions_of_a_user_are_listed(site: Site, console: Console) -> None:
    nothing = console.run("list", "--user", "ada")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "session: no sessions of this user in " in nothing.stderr
    first = signed_in(site, label="Firefox on\x1b[2J Linux", tags=["web"])
    expected = [ids(first)]
    site.clock.advance(400)
    expected.insert(0, ids(signed_in(site)))
    signed_in(site, "bob")
    lines = [line.split(" ", 6) for line in console.done("list", "--user", "ada").splitlines()]
    assert [tuple(line[:2]) for line in lines] == expected
    assert [line[5:] for line in lines] == [
        ["127.0.0.0/24", "-"],
        ["127.0.0.0/24", "Firefox on?[2J Linux"],
    ]
    rows = [json.loads(row) for row in console.done("list", "--user", "ada", "--json").splitlines()]
    assert [(row["handle"], row["device_id"]) for row in rows] == expected
    assert (rows[1]["tags"], rows[1]["remembered"]) == (["web"], False)
    assert set(rows[0]) == {
        *("handle", "device_id", "created_at", "last_seen_at", "expires_at", "network"),
        *("label", "tags", "remembered"),
    }
    short = console.run("list", "--user", "ada", "--limit", "1")
    assert len(short.stdout.splitlines()) == 1
    assert "There are 2" in short.stderr


def test_a_bound_session_is_shown_with_its_device(site: Site, console: Console) -> None:
    visitor = signed_in(site, label="Firefox", tags=["web", "beta"])
    handle, device = ids(visitor)
    text = console.done("show", handle)
    for line in ("user                 ada", f"device_id            {device}", "web, beta"):
        assert line in text
    shown = json.loads(console.done("show", handle, "--json"))
    assert (shown["user"], shown["device_id"], shown["label"]) == ("ada", device, "Firefox")
    visitor.run(lambda session: (session.unbind(), session.update(a=1)))
    assert "user" not in console.done("show", visitor.run(lambda session: session.handle))


def test_a_session_whose_list_is_damaged_is_shown_all_the_same(
    site: Site, console: Console
) -> None:
    handle, device = ids(signed_in(site))
    damage(site)
    shown = console.run("show", handle)
    assert shown.exit_code == 1
    assert f"device_id            {device}" not in shown.stdout
    assert handle in shown.stdout
    assert "flask gsession users rebuild --user ada" in shown.stderr


# -- revoke


def test_all_sessions_of_a_user_are_revoked(
    site: Site, console: Console, revoked: list[Any]
) -> None:
    visitors = [signed_in(site) for _ in range(3)]
    visitors[0].run(lambda session: session.rotate(60))
    other = signed_in(site, "bob")
    devices = {ids(visitor)[1] for visitor in visitors}
    for answer in ("n\n", ""):
        asked = console.run("revoke", "--user", "ada", input=answer)
        assert asked.exit_code == 1
        assert "End 3 sessions of user 'ada' of 'session' in " in asked.output
    assert {owner(visitor) for visitor in visitors} == {"ada"}
    done = console.done("revoke", "--user", "ada", "--reason", "stolen", "--yes")
    assert done == "3 sessions ended\n"
    assert [owner(visitor) for visitor in visitors] == [None] * 3
    assert owner(other) == "bob"
    assert set(revoked) == {("ada", device, "stolen", "flask gsession") for device in devices}
    assert len(console.events) == 3, "SessionRevoked"
    assert console.done("revoke", "--user", "ada", input="y\n").endswith("0 sessions ended\n")
    assert console.done("revoke", "--user", "nobody", "--yes") == "0 sessions ended\n"


def test_a_sign_in_that_is_under_way_is_refused(site: Site, console: Console) -> None:
    """Also for a user without earlier sessions."""
    visitor = site.visitor()

    def sign_in(session: Any) -> None:
        console.done("revoke", "--user", "ada", "--yes")
        session.bind("ada")

    with pytest.raises(AssertionError, match="401"):
        visitor.run(sign_in)


def test_all_other_sessions_of_a_user_are_revoked(site: Site, console: Console) -> None:
    kept, *gone = [signed_in(site) for _ in range(3)]
    handle, _ = ids(kept)
    assert (
        "End 2 other sessions of user"
        in console.run("revoke", "--user", "ada", "--others", handle, input="n\n").output
    )
    done = console.done("revoke", "--user", "ada", "--others", handle[:12], "--yes")
    assert done == "2 sessions ended\n"
    assert owner(kept) == "ada"
    assert [owner(visitor) for visitor in gone] == [None, None]


def test_the_session_to_keep_is_the_users(site: Site, console: Console) -> None:
    visitor, other = signed_in(site), signed_in(site, "bob")
    anonymous = site.visitor()
    anonymous.run(lambda session: session.update(a=1))
    words = ("revoke", "--user", "ada", "--yes", "--others")
    for handle in (ids(other)[0], anonymous.run(lambda session: session.handle)):
        assert "not bound to this user" in console.failed(*words, handle)
    assert "no such session" in console.failed(*words, "A" * 43)
    assert owner(visitor) == "ada"


def test_the_session_to_keep_ends_while_the_command_runs(site: Site, console: Console) -> None:
    kept, other = signed_in(site), signed_in(site)
    handle, _ = ids(kept)

    def end() -> None:
        kept.run(lambda session: session.destroy())

    site.before_each("load", lambda: None, end)  # after the command has looked at the session
    failed = console.failed("revoke", "--user", "ada", "--others", handle, "--yes")
    assert "no such session; it may have ended; nothing else ended" in failed
    assert owner(other) == "ada"


def test_one_device_is_revoked(site: Site, console: Console, revoked: list[Any]) -> None:
    first, second = signed_in(site), signed_in(site)
    device = ids(first)[1]
    words = ("revoke", "--user", "ada", "--device")
    assert console.done(*words, device, "--reason", "lost") == "1 session ended\n"
    assert (owner(first), owner(second)) == (None, "ada")
    assert revoked == [("ada", device, "lost", "flask gsession")]
    assert "no such device" in console.failed(*words, device)
    assert "no such device" in console.failed("revoke", "--user", "bob", "--device", device)
    assert "-x: the user has no such device" in console.failed(*words, "-x")


@pytest.mark.parametrize("everybody", [False, True])
def test_a_bound_session_that_ends_by_its_handle_is_reported(
    site: Site, console: Console, revoked: list[Any], everybody: bool
) -> None:
    visitor, anonymous = signed_in(site), site.visitor()
    anonymous.run(lambda session: session.update(a=1))
    device = ids(visitor)[1]
    old = ids(visitor)[0]
    visitor.run(lambda session: session.rotate(60))
    console.done("revoke", *(["--all", "--yes"] if everybody else [old]), "--reason", "drill")
    assert revoked == [("ada", device, "drill", "flask gsession")]
    assert console.done("list", "--user", "ada") == ""


def test_a_revocation_that_is_interrupted_is_to_be_repeated(site: Site, console: Console) -> None:
    visitors = [signed_in(site) for _ in range(2)]

    def down() -> None:
        raise StoreUnavailable("down")

    site.store.before("delete", down)
    failed = console.failed("revoke", "--user", "ada", "--yes")
    assert "not all sessions have ended: up to 2 sessions are still to end" in failed
    assert "Repeat the call" in failed
    assert console.done("revoke", "--user", "ada", "--yes") == "2 sessions ended\n"
    assert [owner(visitor) for visitor in visitors] == [None, None]


# -- users rebuild


def damage(site: Site, user: str = "ada") -> None:
    store, key = site.store.store, roster_key(user)
    record = store.load(key)
    assert record is not None
    store.delete(key)
    store.create(record._replace(payload=record.payload[:-1] + b"x"))


def test_damaged_lists_are_rebuilt(site: Site, console: Console) -> None:
    visitors = [signed_in(site, user) for user in ("ada", "ada", "bob")]
    for user in ("ada", "bob"):
        damage(site, user)
    for words in (("list", "--user", "ada"), ("revoke", "--user", "ada", "--yes")):
        failed = console.failed(*words)
        assert "Repair it: flask gsession users rebuild --user ada" in failed
        assert "SESSION" not in failed
    assert console.done("users", "rebuild", "--user", "ada") == "2 sessions entered\n"
    assert len(console.done("list", "--user", "ada").splitlines()) == 2
    assert json.loads(console.done("users", "rebuild", "--json")) == {"entered": 1}
    assert console.done("users", "rebuild") == "0 sessions entered\n"
    assert [owner(visitor) for visitor in visitors] == ["ada", "ada", "bob"]


def test_lists_whose_key_is_gone_are_replaced(site: Site, make_site: SiteMaker) -> None:
    before = make_site(store=site.store, encryption_keys=["o" * 43])
    signed_in(before)
    without = Console(site.store, clock=site.clock)
    assert "settings of your workers" in without.failed("users", "rebuild", "--replace-foreign")
    console = Console(site.store, clock=site.clock, encryption_keys=["n" * 43])
    later = make_site(store=site.store, encryption_keys=["n" * 43])
    signed_in(later, "bob")
    assert "rebuild --replace-foreign" in console.failed("users", "rebuild")
    asked = console.run("users", "rebuild", "--replace-foreign")
    assert "1 of 2 lists" in asked.stdout
    assert asked.exit_code == 1
    words = ("users", "rebuild", "--replace-foreign", "--yes")
    assert console.done(*words) == "0 sessions entered\n"
    site.clock.advance(60)
    assert owner(signed_in(later)) == "ada"
    assert console.done("users", "rebuild", "--replace-foreign") == "0 sessions entered\n"


def test_the_list_on_a_terminal(sqlite_url: str) -> None:
    console = Console(sqlite_url)
    with console.app.test_request_context() as context:
        context.session.bind("ada", label="Firefox \x1b[2J")  # type: ignore[union-attr]
        console.app.session_interface.save_session(
            console.app, context.session, console.app.response_class()
        )
    for columns, network in (("120", True), ("60", False)):
        shown = on_a_terminal(sqlite_url, "list", "--user", "ada", COLUMNS=columns)
        assert "last seen" in shown
        assert "Firefox ?[2J" in shown
        assert ("network" in shown) == network


# -- command lines that are wrong


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("revoke", "one or more handles, or --user, or --all"),
        ("revoke --user ada --all", "one or more handles, or --user, or --all"),
        (f"revoke --user ada {'A' * 43}", "one or more handles, or --user, or --all"),
        (f"revoke {'A' * 43} --device x", "--others and --device need --user"),
        (f"revoke --all --others {'A' * 43}", "--others and --device need --user"),
        (f"revoke --user ada --device x --others {'A' * 43}", "not both"),
        ("revoke --user ada --others ab", "is not a handle"),
        ("list --user ada --where a=1", "can't be combined"),
        ("list --user ada --sort newest", "can't be combined"),
    ],
)
def test_a_wrong_command_line(words: str, problem: str) -> None:
    assert problem in Console("memory://").failed(*words.split(), status=2)


@pytest.mark.parametrize("user", ["", "x" * 257, "\ud800"])
@pytest.mark.parametrize("command", ["list", "revoke", "users rebuild"])
def test_a_user_that_can_not_be(command: str, user: str) -> None:
    failed = Console("memory://").failed(*command.split(), "--user", user, status=2)
    assert "--user: user_id" in failed
    assert len(failed) < 400


def test_listing_creates_no_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    console = Console(f"sqlite:///{path}")
    assert console.done("list", "--user", "ada") == ""
    assert console.done("revoke", "--user", "ada", "--yes") == "0 sessions ended\n"
    assert console.done("users", "rebuild") == "0 sessions entered\n"
    assert not path.exists()


# -- users forget


def test_the_values_of_a_user_are_deleted(site: Site, console: Console) -> None:
    visitor = signed_in(site)
    visitor.run(lambda session: session.shared.update(theme="dark"))
    assert console.run("users", "forget", "--user", "ada", input="n\n").exit_code == 1
    assert visitor.run(lambda session: dict(session.shared)) == {"theme": "dark"}
    assert "deleted" in console.done("users", "forget", "--user", "ada", input="y\n")
    assert visitor.run(lambda session: (session.owner, dict(session.shared))) == ("ada", {})
    again = console.done("users", "forget", "--user", "ada", "--yes", "--json")
    assert json.loads(again) == {"forgotten": False}
    assert console.run("users", "forget", "--yes").exit_code == 2
