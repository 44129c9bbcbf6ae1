"""Sessions opened by their handle, outside a request and inside one, on every store."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import flask
import pytest
from flask_socketio import SocketIO
from marshmallow import Schema, ValidationError, fields
from msgspec.structs import replace

from flask_gsession import (
    RotationRefused,
    Session,
    SessionConflict,
    SessionData,
    SessionEnded,
    SessionLocked,
    StoreUnavailable,
    TransactionMisused,
    UnsupportedType,
)
from flask_gsession.errors import ValueLost
from flask_gsession.events import (
    SessionCreated,
    SessionDestroyed,
    SessionRefused,
    SessionSaved,
    WriteDropped,
)
from flask_gsession.tokens import session_key
from flask_gsession.typed import SessionKey
from flask_gsession.users.roster import drop
from flask_gsession.users.rosters import roster_key
from tests.harness.apps import Site, SiteMaker, Visitor

IDLE = 7200  # seconds, the default


@pytest.fixture
def visitor(site: Site) -> Visitor:
    """A visitor with a session."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada", cart=["mug"]))
    return visitor


def handle_of(visitor: Visitor) -> str:
    return session_key(visitor.token)


@contextmanager
def job(visitor: Visitor, **options: Any) -> Iterator[SessionData]:
    """The session of a visitor in a job: in an application context, without a request."""
    site = visitor.site
    with site.app.app_context(), site.ext.open(handle_of(visitor), **options) as session:
        yield session


def fails(
    visitor: Visitor,
    act: Callable[[SessionData], object],
    error: type[BaseException],
    match: str | None = None,
) -> None:
    """A job on the session of the visitor that does this raises that."""
    with pytest.raises(error, match=match), job(visitor) as session:
        act(session)


# Blocks -------------------------------------------------------------------------------------------


def test_a_job_reads_and_writes_the_session(site: Site, visitor: Visitor) -> None:
    cookie = visitor.cookie
    with job(visitor) as session:
        assert not flask.has_request_context()
        assert session["user"] == "ada"
        assert session.handle == handle_of(visitor)
        session["cart"].append("pen")
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug", "pen"]}
    assert visitor.cookie == cookie
    assert len(site.happened(SessionSaved)) == 1


def test_a_block_costs_a_load_and_a_save(site: Site, visitor: Visitor) -> None:
    with site.counted() as count, job(visitor) as session:
        assert session["cart"] == ["mug"]
    assert count.calls == ["load"]
    with site.counted() as count, job(visitor) as session:
        session["seen"] = True
    assert count.calls == ["load", "save"]


def test_parallel_changes_are_merged(site: Site, visitor: Visitor) -> None:
    def shop() -> None:
        visitor.run(lambda session: session.update(cart=["mug", "pen"]))

    site.store.before("save", shop)
    with job(visitor) as session:
        session["export"] = "done"
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug", "pen"], "export": "done"}


def test_a_request_merges_changes_of_a_parallel_job(site: Site, visitor: Visitor) -> None:
    def view(session: Any) -> None:
        session["cart"].append("pen")
        with job(visitor) as other:
            other["export"] = "done"
        assert "export" not in session

    visitor.run(view)
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug", "pen"], "export": "done"}


def test_inside_a_request_for_another_session(site: Site, visitor: Visitor) -> None:
    admin = site.visitor()
    handle = handle_of(visitor)

    def view(session: Any) -> None:
        session["opened"] = handle
        with site.ext.open(handle) as other:
            other["message"] = "Hello"
            assert "opened" not in other
            assert "message" not in flask.session

    admin.run(view)
    assert admin.run(dict) == {"opened": handle}
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"], "message": "Hello"}


def test_each_of_two_sessions_opens_its_own(make_site: SiteMaker) -> None:
    site = make_site(cookie_name="one")
    second = Session(
        site.app, store=site.store, clock=site.clock, cookie_name="two", idle_timeout=60
    )
    visitor = site.visitor()
    visitor.run(lambda session: session.update(one=1))
    with site.app.app_context(), second.open(handle_of(visitor)) as session:
        session.set_lifetime(30)
    site.clock.advance(40)
    assert visitor.run(dict) == {}


def test_a_block_can_be_used_again(site: Site, visitor: Visitor) -> None:
    with site.app.app_context():
        block = site.ext.open(handle_of(visitor))
        for number in (1, 2):
            with block as session:
                assert session.get("n", 0) == number - 1
                session["n"] = number
        with block, pytest.raises(TransactionMisused, match="open already"), block:
            pass


def test_threads_lose_nothing(site: Site, visitor: Visitor) -> None:
    def work(number: int) -> None:
        with job(visitor) as session:
            session[f"part {number}"] = number
            session.update_atomic("done", lambda done: done + 1, default=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    found = visitor.run(dict)
    assert found["done"] == 12
    assert all(found[f"part {number}"] == number for number in range(12))


def test_a_new_session_has_a_handle_after_a_transaction(site: Site) -> None:
    """So that the very request that creates it can start a job."""
    visitor = site.visitor()

    def view(session: Any) -> None:
        assert session.handle is None
        with session.transaction():
            session["cart"] = ["mug"]
        with site.ext.open(session.handle) as other:
            other["job"] = "started"

    visitor.run(view)
    assert visitor.run(dict) == {"cart": ["mug"], "job": "started"}


# Failing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_stores_nothing(
    site: Site, visitor: Visitor, error: type[BaseException]
) -> None:
    def work(session: SessionData) -> None:
        session["cart"].append("pen")
        session.attach("photo", io.BytesIO(b"x" * 300_000))
        raise error

    fails(visitor, work, error)
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}
    assert site.inside.blobs() == {}


def test_immediate_writes_stay(site: Site, visitor: Visitor) -> None:
    def work(session: SessionData) -> None:
        session["lost"] = True
        session.update_atomic("count", lambda count: count + 1, default=0)
        raise ValueError("drill")

    fails(visitor, work, ValueError, "drill")
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"], "count": 1}


def test_abort_in_a_block_stores_nothing_of_it(site: Site, visitor: Visitor) -> None:
    admin, handle = site.visitor(), handle_of(visitor)

    def view(session: Any) -> None:
        session["asked"] = True
        with site.ext.open(handle) as other:
            other["cart"] = []
            flask.abort(418)

    assert admin.ask(view).status_code == 418
    assert admin.run(dict) == {"asked": True}
    assert visitor.run(dict)["cart"] == ["mug"]


def test_a_value_that_cannot_be_kept(site: Site, visitor: Visitor) -> None:
    with pytest.raises(UnsupportedType), job(visitor) as session:
        session["cart"] = [1j]
    assert visitor.run(dict)["cart"] == ["mug"]


def test_a_key_that_refuses_conflicts(make_site: SiteMaker) -> None:
    site = make_site(conflict="reject")
    visitor = site.visitor()
    visitor.run(lambda session: session.update(seat=None))
    site.store.before("save", lambda: visitor.run(lambda session: session.update(seat="1A")))
    with pytest.raises(SessionConflict), job(visitor) as session:
        session["seat"] = "1B"
    assert visitor.run(dict) == {"seat": "1A"}


def down() -> None:
    raise StoreUnavailable("drill")


def test_an_outage_at_the_start(site: Site, visitor: Visitor) -> None:
    site.store.before("load", down)
    with pytest.raises(StoreUnavailable), job(visitor):
        pytest.fail("entered")


def test_an_outage_at_the_end(site: Site, visitor: Visitor) -> None:
    site.store.before("save", down)
    with pytest.raises(StoreUnavailable), job(visitor) as session:
        session["cart"] = []
    assert visitor.run(dict)["cart"] == ["mug"]
    dropped = site.happened(WriteDropped)
    assert [(event.handle, event.reason) for event in dropped] == [
        (handle_of(visitor), "store unavailable")
    ]


def test_a_renewal_that_fails_harms_nobody(site: Site, visitor: Visitor) -> None:
    site.clock.advance(120)
    site.store.before("renew", down)
    with job(visitor) as session:
        assert session["user"] == "ada"


def test_a_lost_answer_causes_no_second_write(site: Site, visitor: Visitor) -> None:
    """The caller repeats a transaction in the block, and its write is recognised."""

    def lost() -> None:
        raise OSError("drill")

    with job(visitor) as session:
        session["count"] = 1
        site.store.after("save", lost)
        with pytest.raises(OSError, match="drill"), session.transaction():
            session["count"] = 2
        session["after"] = True
    assert visitor.run(dict)["after"] is True


# Sessions that end --------------------------------------------------------------------------------


def ends_by_logout(site: Site, visitor: Visitor) -> None:
    visitor.run(lambda session: session.destroy())


def ends_by_expiry(site: Site, visitor: Visitor) -> None:
    site.clock.advance(IDLE + 61)


def ends_by_a_sign_in(site: Site, visitor: Visitor) -> None:
    visitor.run(lambda session: session.rotate(grace=0))


def ends_with_the_grace(site: Site, visitor: Visitor) -> None:
    visitor.run(lambda session: session.rotate(grace=5))
    site.clock.advance(6)


ENDS = [ends_by_logout, ends_by_expiry, ends_by_a_sign_in, ends_with_the_grace]
End = Callable[[Site, Visitor], None]


@pytest.mark.parametrize("end", ENDS)
def test_an_ended_session_is_not_entered(site: Site, visitor: Visitor, end: End) -> None:
    handle = handle_of(visitor)
    end(site, visitor.another_tab())
    left = site.stored()
    with site.app.app_context():
        with pytest.raises(SessionEnded, match="no session under this handle"):
            site.ext.open(handle).__enter__()
        assert site.ext.peek(handle) is None
    assert site.stored() == left
    assert not site.happened(SessionRefused)


@pytest.mark.parametrize("end", ENDS)
def test_a_session_that_ends_during_a_block_stays_ended(
    site: Site, visitor: Visitor, end: End
) -> None:
    tab = visitor.another_tab()
    left: set[str] = set()

    def work(session: SessionData) -> None:
        session["cart"].append("pen")
        end(site, tab)
        left.update(site.stored())

    fails(visitor, work, SessionEnded)
    assert site.stored().keys() == left
    assert site.happened(WriteDropped)
    assert len(site.happened(SessionCreated)) == 1
    site.clock.advance(1)
    assert visitor.run(dict) == {}


def test_a_block_without_changes_ignores_the_end_of_its_session(
    site: Site, visitor: Visitor
) -> None:
    with job(visitor) as session:
        ends_by_logout(site, visitor)
        assert session["user"] == "ada"


def test_immediate_writes_of_a_job_to_an_ended_session(site: Site, visitor: Visitor) -> None:
    with job(visitor) as session:
        ends_by_logout(site, visitor)
        for act in (
            lambda: session.update_atomic("n", lambda n: 1),
            lambda: session.take("cart"),
            lambda: session.transaction().__enter__(),
        ):
            with pytest.raises(SessionEnded):
                act()
    assert site.stored() == {}


def test_destroy_ends_the_session(site: Site, visitor: Visitor) -> None:
    with job(visitor) as session:
        session.destroy()
        assert site.stored() == {}
    assert visitor.run(dict) == {}
    assert [event.handle for event in site.happened(SessionDestroyed)] == [handle_of(visitor)]


def test_clear_ends_it_with_the_block(site: Site, visitor: Visitor) -> None:
    with job(visitor) as session:
        session.clear()
        assert visitor.run(dict)
    assert site.stored() == {}


def writes(session: SessionData) -> None:
    session["new"] = True


def writes_in_a_transaction(session: SessionData) -> None:
    with session.transaction():
        session["new"] = True


def updates_atomically(session: SessionData) -> None:
    session.update_atomic("new", lambda _: True)


@pytest.mark.parametrize("write", [writes, writes_in_a_transaction, updates_atomically])
@pytest.mark.parametrize("end", ["destroy", "clear"])
def test_no_session_begins_that_nobody_has_a_token_for(
    site: Site, visitor: Visitor, write: Callable[[SessionData], None], end: str
) -> None:
    def work(session: SessionData) -> None:
        getattr(session, end)()
        if end == "clear":
            with session.transaction():
                pass  # which stores the end
        write(session)

    fails(visitor, work, SessionEnded)
    assert site.stored() == {}
    assert len(site.happened(SessionCreated)) == 1


def test_a_damaged_record(site: Site, visitor: Visitor, caplog: pytest.LogCaptureFixture) -> None:
    store: Any = site.store
    record = store.load(handle_of(visitor))
    store.save(record._replace(version=1, payload=record.payload[:-1]), record.version)
    with pytest.raises(SessionEnded), job(visitor):
        pytest.fail("entered")
    with site.app.app_context():
        assert site.ext.peek(handle_of(visitor)) is None
    assert "refused: corrupt" in caplog.text
    assert "mug" not in caplog.text


@pytest.mark.parametrize(
    "handle",
    [None, "", 7, b"x" * 43, "x" * 42, "x" * 44, "é" * 43, "a" * 42 + ".", "a" * 42 + "\n"],
)
def test_invalid_handles(site: Site, handle: Any) -> None:
    with site.app.app_context():
        for look in (site.ext.open, site.ext.peek):
            with pytest.raises(ValueError, match="handle") as caught:
                look(handle)
            assert not handle or str(handle) not in str(caught.value)
    assert site.store.calls == []


def test_a_token_is_not_a_handle(site: Site, visitor: Visitor) -> None:
    """A token of 43 characters looks like a handle; the error doesn't show it."""
    with site.app.app_context():
        assert site.ext.peek(visitor.token) is None
        with pytest.raises(SessionEnded) as caught:
            site.ext.open(visitor.token).__enter__()
        assert visitor.token not in str(caught.value)
        with pytest.raises(ValueError, match="handle") as refused:
            site.ext.open(str(visitor.cookie))
        assert visitor.token not in str(refused.value)


def test_an_application_context_is_needed(site: Site, visitor: Visitor) -> None:
    with pytest.raises(RuntimeError, match="application context"):
        site.ext.open(handle_of(visitor))


# Rotation and sign-in -----------------------------------------------------------------------------


def test_an_earlier_handle_works_during_its_grace(site: Site, visitor: Visitor) -> None:
    handle = handle_of(visitor)
    visitor.run(lambda session: session.rotate(grace=60))
    with site.app.app_context(), site.ext.open(handle) as session:
        assert session.handle == handle_of(visitor) != handle
        session["n"] = 1
    assert visitor.run(dict)["n"] == 1
    with site.app.app_context():
        peek = site.ext.peek(handle)
        assert peek is not None
        assert peek.handle == handle_of(visitor)


def test_a_rotation_during_a_block_is_followed(site: Site, visitor: Visitor) -> None:
    tab = visitor.another_tab()
    with job(tab) as session:
        session["n"] = 1
        visitor.run(lambda other: other.rotate(grace=60))
    assert visitor.run(dict)["n"] == 1


@pytest.mark.parametrize("grace", [None, 0, 60])
def test_a_rotation_is_refused_and_the_session_stays(
    site: Site, visitor: Visitor, grace: float | None
) -> None:
    """No response would carry the token: the visitor would lose the session."""

    def work(session: SessionData) -> None:
        session["user"] = "eve"
        session.rotate(grace)

    fails(visitor, work, RotationRefused, "in a view")
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}


def test_a_refused_rotation_whose_error_is_caught(site: Site, visitor: Visitor) -> None:
    with job(visitor) as session:
        with pytest.raises(RotationRefused):
            session.rotate(grace=0)
        session["noted"] = True
        with session.lock(), pytest.raises(RotationRefused):
            session.rotate(grace=0)
    assert visitor.run(dict)["noted"] is True


def test_with_an_earlier_handle_too(site: Site, visitor: Visitor) -> None:
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=60))
    with job(tab) as session, pytest.raises(RotationRefused):
        session.rotate(grace=0)
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}
    assert len(site.happened(SessionCreated)) == 1


# Sessions of a user -------------------------------------------------------------------------------


@pytest.fixture
def member(site: Site) -> Visitor:
    """A visitor whose session is bound to a user."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    visitor.run(lambda session: session.bind("ada"))
    return visitor


ACTS: list[Callable[[SessionData], object]] = [
    lambda session: session.bind("eve"),
    lambda session: session.confirm(),
]


@pytest.mark.parametrize("act", ACTS)
def test_nobody_signs_in_or_confirms_in_a_job(
    site: Site, member: Visitor, act: Callable[[SessionData], object]
) -> None:
    site.clock.advance(3600)
    fails(member, act, RotationRefused)
    assert member.run(lambda session: session.owner) == "ada"
    age = site.clock() - member.run(lambda session: session.confirmed_at().timestamp())
    assert age > 3000


def test_a_peek_says_when_the_user_confirmed(site: Site, member: Visitor) -> None:
    with site.app.app_context():
        for act in (lambda session: None, lambda session: session.confirm("totp")):
            site.clock.advance(60)
            member.run(act)
            peek: Any = site.ext.peek(handle_of(member))
            for method in (None, "totp", ["sign-in", "password"]):
                known = member.run(lambda session, method=method: session.confirmed_at(method))
                assert peek.confirmed_at(method) == known
        with pytest.raises(ValueError, match="method"):
            peek.confirmed_at("")


def test_a_job_that_ends_the_session_leaves_the_list(site: Site, member: Visitor) -> None:
    with job(member) as session:
        assert session.owner == "ada"
        session.destroy()
    with site.app.app_context():
        assert site.ext.users.devices("ada") == []


def test_a_job_may_unbind_it(site: Site, member: Visitor) -> None:
    with job(member) as session:
        session.unbind()
    assert member.run(lambda session: (session.owner, session["cart"])) == (None, ["mug"])
    with site.app.app_context():
        assert site.ext.users.devices("ada") == []


def test_a_revocation_during_a_block_holds(site: Site, member: Visitor) -> None:
    def work(session: SessionData) -> None:
        session["n"] = 1
        assert site.ext.users.revoke_all("ada") == 1

    fails(member, work, SessionEnded)
    assert member.run(dict) == {}


def test_a_session_that_a_failover_brought_back_ends_in_a_job(site: Site, member: Visitor) -> None:
    """At its next touch, as in a view."""
    store: Any = site.store.store
    record = store.load(handle_of(member))
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    store.create(record)
    site.clock.advance(301)
    fails(member, lambda session: session.update(n=1), SessionEnded)
    with site.app.app_context():
        assert site.ext.peek(handle_of(member)) is None


def test_a_session_that_never_entered_its_roster_is_not_opened(site: Site, member: Visitor) -> None:
    """G11: stored by a sign-in that was interrupted, or taken over from an old library."""
    repository = site.app.extensions["gsession"][site.ext].repository
    key = handle_of(member)

    def as_if_not_entered() -> None:
        loaded = repository.find(key)
        repository.store.save(
            repository.records.with_owner(
                loaded.record, loaded.body, replace(loaded.body.owner, seen=0)
            ),
            loaded.record.version,
        )

    as_if_not_entered()
    record = site.store.load(key)
    with site.app.app_context():
        assert site.ext.peek(key) is not None
        with site.ext.open(key) as session:
            assert session.owner == "ada"
        for look in (site.ext.peek, lambda key: site.ext.open(key).__enter__()):
            site.store.delete(key)
            site.store.create(record)
            repository.rosters.change("ada", lambda roster: (drop(roster, [key]), None))
            with suppress(SessionEnded):
                assert look(key) is None
    assert member.run(dict) == {}


def test_a_job_knows_of_no_client(site: Site, member: Visitor) -> None:
    """The facts in the list of devices come from the device's requests."""
    with site.app.app_context():
        (before,) = site.ext.users.devices("ada")
    site.clock.advance(301)
    with job(member) as session:
        session["n"] = 1
    with site.app.app_context():
        (after,) = site.ext.users.devices("ada")
        assert after.network == before.network is not None
        assert after.last_seen_at > before.last_seen_at
    site.clock.advance(301)
    with job(member, renew=False) as session:
        assert session["n"] == 1
    with site.app.app_context():
        assert site.ext.users.devices("ada") == [after]


def test_a_user_s_list_is_not_a_session(site: Site, member: Visitor) -> None:
    with site.app.app_context():
        for look in (site.ext.open, site.ext.peek):
            with pytest.raises(ValueError, match="handle"):
                look(roster_key("ada"))


def test_all_sessions_of_a_user_by_their_handles(site: Site, member: Visitor) -> None:
    other = site.visitor()
    other.run(lambda session: session.bind("ada"))
    with site.app.app_context():
        for device in site.ext.users.devices("ada"):
            with site.ext.open(device.handle) as session:
                session["message"] = "Your order has left"
    for visitor in (member, other):
        assert visitor.run(lambda session: session["message"]) == "Your order has left"


# Locks, transactions, large values ----------------------------------------------------------------


def test_locks_hold_between_jobs_and_requests(make_site: SiteMaker) -> None:
    site = make_site(lock_wait=0)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))

    def view(session: Any) -> None:
        with pytest.raises(SessionLocked), session.lock():
            pass

    with job(visitor) as session, session.lock():
        session["n"] += 1
        visitor.run(view)
        with pytest.raises(SessionLocked), job(visitor) as other, other.lock():
            pass
    assert visitor.run(dict) == {"n": 2}


def test_a_transaction_runs_again(site: Site, visitor: Visitor) -> None:
    site.store.before("save", lambda: visitor.run(lambda session: session.update(cart=[])))
    with job(visitor) as session:
        session.transaction().run(lambda same: same.update(count=len(same["cart"])))
    assert visitor.run(dict)["count"] == 0


@pytest.mark.parametrize("block", ["transaction", "lock"])
def test_a_block_left_open_stores_nothing(site: Site, visitor: Visitor, block: str) -> None:
    blocks: list[Any] = []

    def work(session: SessionData) -> None:
        blocks.append(getattr(session, block)())
        blocks[0].__enter__()
        session["n"] = 1

    fails(visitor, work, TransactionMisused, "still open")
    blocks[0].__exit__(ValueError, ValueError("drill"), None)
    assert "n" not in visitor.run(dict)


def test_large_values(site: Site, visitor: Visitor) -> None:
    content = bytes(range(256)) * 1200
    with job(visitor) as session:
        session.attach("photo", io.BytesIO(content))
        session["text"] = "long " * 10_000
    with job(visitor) as session:
        assert session.open("photo").read() == content
        assert session["text"] == "long " * 10_000
    with site.app.app_context():
        peek = site.ext.peek(handle_of(visitor))
        assert peek is not None
        assert peek["photo"] == content
        for name in site.inside.blobs():
            site.inside.spoil(name, None)
        with pytest.raises(ValueLost):
            peek["photo"]
    assert visitor.run(lambda session: session["user"]) == "ada"


class Preferences(Schema):
    theme = fields.Str(load_default="light")


@pytest.mark.parametrize("declared", [False, True])
def test_typed_keys_of_an_opened_session(make_site: SiteMaker, declared: bool) -> None:
    preferences = SessionKey("preferences", Preferences, version=2, merge="last")
    site = make_site(schema=[preferences] if declared else None)
    visitor = site.visitor()
    visitor.run(lambda session: preferences.set({"theme": "dark"}))
    with job(visitor) as session:
        key = preferences.of(session)
        assert key.get() == {"theme": "dark"}
        key.update(theme="red")
        assert preferences.of(session).get() == {"theme": "red"}
        with pytest.raises(ValidationError):
            key.set({"theme": 7})
        with pytest.raises(RuntimeError, match="request context"):
            preferences.get()
    assert visitor.run(lambda session: preferences.get()) == {"theme": "red"}


# Use and expiry -----------------------------------------------------------------------------------


def left(visitor: Visitor) -> float:
    """The seconds until the session ends if it isn't used."""
    site: Any = visitor.site
    record = site.store.load(handle_of(visitor))
    return float(record.idle_expires_at / 1000 - site.clock())


def test_a_block_counts_as_use(site: Site, visitor: Visitor) -> None:
    site.clock.advance(600)
    with job(visitor) as session:
        assert session["user"] == "ada"
    assert left(visitor) > IDLE
    site.clock.advance(600)
    with job(visitor) as session:
        session["n"] = 1
    assert left(visitor) > IDLE


def test_unless_it_shall_not(site: Site, visitor: Visitor) -> None:
    site.clock.advance(600)
    before = left(visitor)
    with job(visitor, renew=False) as session:
        assert session["user"] == "ada"
    with job(visitor, renew=False) as session:
        session["n"] = 1
        session.attach("photo", io.BytesIO(b"x" * 300_000))
    with job(visitor, renew=False) as session, session.lock():
        session["n"] += 1
    with job(visitor, renew=False) as session:
        session.update_atomic("n", lambda n: n + 1)
    assert left(visitor) == before
    site.clock.advance(before - 1)
    assert visitor.run(dict)["n"] == 3
    assert visitor.run(dict)["photo"] == b"x" * 300_000


def test_a_peek_writes_nothing(site: Site, visitor: Visitor) -> None:
    site.clock.advance(600)
    before, kept = left(visitor), site.stored()
    with site.app.app_context(), site.counted() as count:
        peek = site.ext.peek(handle_of(visitor))
        assert peek is not None
        peek["cart"].append("pen")
        assert dict(peek) == {"user": "ada", "cart": ["mug"]}
    assert count.calls == ["load"]
    assert left(visitor) == before
    assert site.stored() == kept


def test_a_peek_cannot_be_changed(site: Site, visitor: Visitor) -> None:
    visitor.run(lambda session: session.set("code", 7, ttl=60))
    site.clock.advance(10)
    with site.app.app_context():
        peek: Any = site.ext.peek(handle_of(visitor))
        with pytest.raises(TypeError):
            peek["user"] = "eve"
        with pytest.raises(AttributeError):
            peek.clear()
        visitor.run(lambda session: session.clear())
        assert dict(peek) == {"user": "ada", "cart": ["mug"], "code": 7}
        assert (len(peek), "user" in peek, peek.get("none")) == (3, True, None)
        assert (peek.ttl("code"), peek.ttl("user")) == (50, None)
        assert abs(peek.created_at.timestamp() - site.clock() + 10) < 0.01
        assert peek.expires_at > peek.created_at
        assert "ada" not in repr(peek)
        site.clock.advance(60)
    assert site.stored() == {}


def test_a_value_that_has_expired_is_absent_from_a_peek(site: Site, visitor: Visitor) -> None:
    visitor.run(lambda session: session.set("code", 7, ttl=60))
    site.clock.advance(60)
    with site.app.app_context():
        assert dict(site.ext.peek(handle_of(visitor)) or {}) == {"user": "ada", "cart": ["mug"]}


def polls(session: Any) -> None:
    session.skip_renewal()
    assert session["user"] == "ada"


def polls_and_writes(session: Any) -> None:
    session["polled"] = session.get("polled", 0) + 1
    session.skip_renewal()


def polls_and_rotates(session: Any) -> None:
    session.skip_renewal()
    session.rotate(grace=30)


def polls_in_a_transaction(session: Any) -> None:
    session.skip_renewal()
    with session.transaction():
        session["polled"] = True


POLLS = [polls, polls_and_writes, polls_and_rotates, polls_in_a_transaction]


@pytest.mark.parametrize("poll", POLLS)
def test_polling_does_not_count_as_use(
    site: Site, visitor: Visitor, poll: Callable[[Any], None]
) -> None:
    before = left(visitor)
    for _ in range(3):
        site.clock.advance(600)
        visitor.run(poll)
    assert left(visitor) == before - 1800
    visitor.run(lambda session: session["user"])
    assert left(visitor) >= before


def test_a_block_makes_no_session_end_early(site: Site, visitor: Visitor) -> None:
    """Another tab is used while the polling request saves."""
    tab = visitor.another_tab()

    def use() -> None:
        tab.run(lambda session: session["user"])

    site.clock.advance(600)
    site.before_a_write(use)
    visitor.run(polls_and_writes)
    assert left(visitor) >= IDLE


def test_polling_costs_nothing_without_a_look(site: Site, visitor: Visitor) -> None:
    with site.counted() as count:
        visitor.run(lambda session: session.skip_renewal())
    assert count.calls == []


def test_a_lifetime_that_is_set_while_polling_counts(site: Site, visitor: Visitor) -> None:
    def view(session: Any) -> None:
        session.skip_renewal()
        session.set_lifetime(300)

    visitor.run(view)
    assert left(visitor) < 400

    def view_and_rotate(session: Any) -> None:
        view(session)
        session.set_lifetime(200)
        session.rotate(grace=0)

    visitor.run(view_and_rotate)
    assert left(visitor) < 250


# Afterwards ---------------------------------------------------------------------------------------


def test_a_change_after_the_block_is_logged(
    site: Site, visitor: Visitor, caplog: pytest.LogCaptureFixture
) -> None:
    with job(visitor) as session:
        pass
    session["late"] = True
    assert "after the block of ext.open()" in caplog.text
    assert "late" not in visitor.run(dict)
    assert session["user"] == "ada"


def test_a_debug_dump_shows_the_changes_of_a_block(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(debug=True)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    caplog.clear()
    with job(visitor) as session:
        session["n"] = 1
    (record,) = [each for each in caplog.records if each.name == "flask_gsession.debug"]
    facts = record.gsession  # type: ignore[attr-defined]  # added by the dump
    assert (facts["request"], facts["handle"]) == ("outside a request", handle_of(visitor))
    assert [written["key"] for written in facts["written"]] == ["n"]
    assert "cookie" not in facts
    assert visitor.token not in caplog.text


# Flask-SocketIO -----------------------------------------------------------------------------------


def test_opening_in_a_socket_handler_and_its_background_task(site: Site) -> None:
    """They know the session by the handle that it had at the handshake."""
    socketio = SocketIO(site.app, manage_session=False, async_mode="threading")
    seen: list[Any] = []
    handles: list[str | None] = []

    def connect() -> None:
        session: Any = flask.session
        handles.append(session.handle)

    def in_the_background(handle: str | None) -> None:
        with site.app.app_context(), site.ext.open(handle) as session:
            session["background"] = True

    def buy(sku: str) -> None:
        with site.ext.open(handles[0]) as session:
            session["cart"].append(sku)
        socketio.start_background_task(in_the_background, handles[0]).join()

    def look() -> None:
        peek = site.ext.peek(handles[0])
        seen.append(None if peek is None else dict(peek))

    socketio.on_event("connect", connect)
    socketio.on_event("buy", buy)
    socketio.on_event("look", look)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    socket = socketio.test_client(site.app, flask_test_client=visitor)
    visitor.run(lambda session: session["cart"].append("pen"))
    socket.emit("buy", "lamp")
    socket.emit("look")
    visitor.run(lambda session: session.destroy())
    socket.emit("look")
    assert seen == [{"cart": ["mug", "pen", "lamp"], "background": True}, None]


# asyncio ------------------------------------------------------------------------------------------


def test_async_with(site: Site, visitor: Visitor) -> None:
    handle = handle_of(visitor)

    async def work(number: int) -> None:
        async with site.ext.open(handle) as session:
            session[f"part {number}"] = number

    async def fail() -> None:
        async with site.ext.open(handle) as session:
            session["lost"] = True
            raise ValueError("drill")

    async def main() -> None:
        await asyncio.gather(*map(work, range(5)))
        with pytest.raises(ValueError, match="drill"):
            await fail()

    @site.ext.on(SessionSaved)
    def see(event: SessionSaved) -> None:
        saved_for.append(flask.current_app.name)

    saved_for: list[str] = []

    with site.app.app_context():
        asyncio.run(main())
    found = visitor.run(dict)
    assert [found[f"part {number}"] for number in range(5)] == list(range(5))
    assert saved_for == [site.app.name] * 5
    assert "lost" not in found


def test_an_async_lock_inside(site: Site, visitor: Visitor) -> None:
    async def work() -> None:
        async with site.ext.open(handle_of(visitor)) as session, session.lock():
            before = session.get("n", 0)
            await asyncio.sleep(0)
            session["n"] = before + 1

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(5)))

    with site.app.app_context():
        asyncio.run(main())
    assert visitor.run(dict)["n"] == 5


def test_opening_in_an_async_view(site: Site) -> None:
    @site.app.get("/admin/<handle>")
    async def admin(handle: str) -> str:
        async with site.ext.open(handle) as session:
            session["message"] = "Hello"
        with site.ext.open(handle) as session:
            return str(session["message"])

    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    assert site.visitor().get(f"/admin/{handle_of(visitor)}").text == "Hello"
    assert visitor.run(dict) == {"user": "ada", "message": "Hello"}


def test_a_task_that_is_cancelled_while_it_saves(site: Site, visitor: Visitor) -> None:
    """It ends after the save, which is whole."""
    saving, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        saving.set()
        go_on.wait(30)

    async def work() -> None:
        async with site.ext.open(handle_of(visitor)) as session:
            session["n"] = 1

    async def main() -> None:
        task = asyncio.create_task(work())
        while not saving.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.001)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    site.store.before("save", wait)
    with site.app.app_context():
        asyncio.run(main())
    assert visitor.run(dict)["n"] == 1
