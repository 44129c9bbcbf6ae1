"""``session.bind`` and ``ext.users``, on each store: lists of sessions, and ending them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from flask import flash, get_flashed_messages

from flask_gsession import SessionEnded, StoreUnavailable, TransactionMisused
from flask_gsession.errors import (
    RevocationUnfinished,
    RosterUnreadable,
    SignInRefused,
    TooManySessions,
)
from flask_gsession.events import (
    DeviceLimitReached,
    DeviceRevoked,
    SessionBound,
    SessionUnbound,
    SignInRejected,
    UserConfirmed,
)
from flask_gsession.moving.mark import mark_key
from flask_gsession.stores.base import new_version
from flask_gsession.users.rosters import roster_key
from tests.harness.apps import Site, SiteMaker, Visitor


def signed_in(site: Site, user: str = "ada", **how: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.bind(user, **how))
    return visitor


def ids(site: Site, user: str = "ada") -> list[str]:
    with site.app.app_context():
        return [device.id for device in site.ext.users.devices(user)]


def device_id(visitor: Visitor) -> Any:
    return visitor.run(lambda session: session.device_id)


def owner(visitor: Visitor) -> Any:
    return visitor.run(lambda session: session.owner)


@pytest.fixture
def users(site: Site) -> Iterator[Any]:
    """``ext.users``, outside a request."""
    with site.app.app_context():
        yield site.ext.users


# Binding -----------------------------------------------------------------------------------------


def test_a_bound_session_is_listed(site: Site, users: Any) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    before = visitor.cookie
    tab = visitor.another_tab()

    def bind(session: Any) -> tuple[Any, Any]:
        session.bind("ada", label="Firefox", tags=["web"])
        return session.owner, session.device_id

    bound = visitor.run(bind, environ_overrides={"REMOTE_ADDR": "203.0.113.77"})
    assert visitor.cookie not in (None, before), "rotated"
    assert tab.run(dict) == {}, "without grace"
    assert visitor.run(dict) == {"cart": ["mug"]}
    assert (owner(visitor), device_id(visitor)) == bound
    (device,) = users.devices("ada")
    assert ("ada", device.id) == bound
    assert (device.label, device.tags, device.network) == ("Firefox", ("web",), "203.0.113.0/24")
    assert device.handle == visitor.run(lambda session: session.handle)
    assert not device.remembered
    assert device.created_at == device.last_seen_at < device.expires_at
    assert users.devices("bob") == []
    assert site.happened(SessionBound) == [SessionBound("ada", device.id, device.handle)]


def test_a_session_without_values_is_bound_as_well(site: Site) -> None:
    visitor = signed_in(site)
    assert owner(visitor) == "ada"
    visitor.run(lambda session: session.update(a=1))
    visitor.run(lambda session: session.rotate())
    visitor.run(lambda session: session.pop("a"))
    assert (owner(visitor), ids(site)) == ("ada", [device_id(visitor)])


@pytest.mark.parametrize("way", ["flash", "pop", "take", "update_atomic", "permanent"])
def test_removing_the_last_value_signs_nobody_out(site: Site, way: str) -> None:
    visitor = signed_in(site)
    device = device_id(visitor)

    def before(session: Any) -> None:
        if way == "flash":
            flash("Welcome")
        elif way == "permanent":
            session.permanent = True
        else:
            session["a"] = 1

    def remove(session: Any) -> None:
        if way == "flash":
            assert get_flashed_messages() == ["Welcome"]
        elif way == "permanent":
            session.permanent = False
        elif way == "update_atomic":
            session.update_atomic("a", lambda value: None)
            session.pop("a")
        else:
            getattr(session, way)("a")

    visitor.run(before)
    visitor.run(remove)
    assert (owner(visitor), ids(site)) == ("ada", [device])
    visitor.run(lambda session: session.clear())
    assert (owner(visitor), ids(site), site.sessions()) == (None, [], {})


def test_the_current_device_is_marked(site: Site) -> None:
    first, second = signed_in(site), signed_in(site)

    def current(session: Any) -> list[str]:
        return [device.id for device in site.ext.users.devices("ada") if device.current]

    assert first.run(current) == [device_id(first)]
    assert second.run(current) == [device_id(second)]
    assert signed_in(site, "bob").run(current) == []


def test_a_rotation_keeps_the_device(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    device, tab = device_id(visitor), visitor.another_tab()
    for grace in (5, 0, 5):
        visitor.run(lambda session, grace=grace: session.rotate(grace))
        assert device_id(visitor) == device
        (listed,) = users.devices("ada")
        assert (listed.id, listed.handle) == (device, visitor.run(lambda session: session.handle))
    assert tab.run(dict) == {}


def test_logging_out_leaves_the_list(site: Site) -> None:
    for way in ("destroy", "clear"):
        visitor = signed_in(site)
        assert len(ids(site)) == 1
        visitor.run(lambda session, way=way: getattr(session, way)())
        assert ids(site) == []
        assert owner(visitor) is None
    assert site.sessions() == {}


def test_logging_out_with_an_old_token_leaves_the_list(site: Site) -> None:
    visitor = signed_in(site)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(5))
    tab.run(lambda session: session.destroy())
    assert owner(visitor) is None
    assert ids(site) == []


def test_unbinding_keeps_the_session(site: Site) -> None:
    visitor = signed_in(site)
    device = device_id(visitor)
    visitor.run(lambda session: session.update(cart=["mug"]))
    visitor.run(lambda session: session.unbind())
    assert visitor.run(lambda session: (session.owner, session.device_id, dict(session))) == (
        None,
        None,
        {"cart": ["mug"]},
    )
    assert ids(site) == []
    assert site.happened(SessionUnbound) == [SessionUnbound("ada", device)]


def test_clearing_a_session_signs_out(site: Site) -> None:
    """As many views do, and then leave a message."""
    visitor = signed_in(site)

    def sign_out(session: Any) -> None:
        session.clear()
        session["flash"] = "signed out"
        assert session.owner is None

    visitor.run(sign_out)
    assert (owner(visitor), visitor.run(dict)) == (None, {"flash": "signed out"})
    assert ids(site) == []


def test_clearing_a_session_before_a_sign_in(site: Site) -> None:
    visitor = signed_in(site)
    device, cookie = device_id(visitor), visitor.cookie
    for user in ("ada", "bob"):
        visitor.run(lambda session, user=user: (session.clear(), session.bind(user)))
        assert owner(visitor) == user
        assert (device_id(visitor) == device) is (user == "ada")
        assert visitor.cookie != cookie
        assert ids(site, user) == [device_id(visitor)]
    assert ids(site, "ada") == []


def test_bind_and_unbind_in_one_request(site: Site) -> None:
    visitor = site.visitor()

    def both(session: Any) -> None:
        session["a"] = 1
        session.bind("ada")
        session.unbind()
        assert session.owner is None

    visitor.run(both)
    assert (owner(visitor), visitor.run(dict), ids(site)) == (None, {"a": 1}, [])


@pytest.mark.parametrize("cleared", [False, True])
def test_binding_again_is_a_fresh_sign_in_of_the_same_device(site: Site, cleared: bool) -> None:
    visitor = signed_in(site, label="Firefox")
    visitor.run(lambda session: session.confirm("passkey"))
    device, tab, first = device_id(visitor), visitor.another_tab(), site.clock()
    site.clock.advance(600)

    def again(session: Any) -> Any:
        if cleared:
            session.clear()
        session.bind("ada")
        session.bind("ada")
        return int(session.confirmed_at("sign-in").timestamp()), session.confirmed_at("passkey")

    site.events.clear()
    assert visitor.run(again) == (int(site.clock()), None)
    assert owner(tab) is None, "the earlier token ends at once"
    assert ids(site) == [device]
    assert device_id(visitor) == device
    (confirmed,) = site.happened(UserConfirmed)
    assert (confirmed.user_id, confirmed.device_id, confirmed.method) == ("ada", device, "sign-in")
    assert site.happened(SessionBound) == []

    def at(session: Any) -> tuple[float, float]:
        return session.confirmed_at("sign-in").timestamp(), session.created_at.timestamp()

    assert min(visitor.run(at)) > first + 500, "the absolute lifetime starts again"


def test_binding_twice_in_one_request_changes_the_label(site: Site) -> None:
    def twice(session: Any) -> None:
        session.bind("bob")
        session.bind("bob", label="Safari")

    other = site.visitor()
    other.run(twice)
    with site.app.app_context():
        assert [device.label for device in site.ext.users.devices("bob")] == ["Safari"]


def test_binding_to_another_user_leaves_the_first(site: Site) -> None:
    visitor = signed_in(site)
    device, cookie = device_id(visitor), visitor.cookie
    visitor.run(lambda session: session.bind("bob"))
    assert owner(visitor) == "bob"
    assert device_id(visitor) != device
    assert visitor.cookie != cookie
    assert ids(site, "ada") == []
    assert ids(site, "bob") == [device_id(visitor)]


def test_an_int_is_the_same_user_as_its_text(site: Site) -> None:
    visitor = signed_in(site, 7)  # type: ignore[arg-type]
    assert owner(visitor) == "7"
    assert ids(site, "7") == ids(site, 7) == [device_id(visitor)]  # type: ignore[arg-type]


def test_a_member_of_an_enum_counts_as_its_text(site: Site) -> None:
    class Staff(str, Enum):  # noqa: UP042  # the text of a StrEnum is right in any case
        ADA = "ada"

    visitor = signed_in(site, Staff.ADA)
    assert (owner(visitor), ids(site, "ada")) == ("ada", [device_id(visitor)])


BAD_USERS = ["", None, "x" * 10_240, "a\0b", "\ud800", 1.5, b"ada", True, UUID(int=7)]


@pytest.mark.parametrize("user", BAD_USERS, ids=lambda user: repr(user)[:20])
def test_a_user_id_that_can_be_none_is_refused(user: Any) -> None:
    with SiteMaker("memory://", "p:", lambda: 1e9) as make:
        site = make()

        def bind(session: Any) -> str:
            with pytest.raises(ValueError, match="user_id") as raised:
                session.bind(user)
            return str(raised.value)

        assert len(site.visitor().run(bind)) < 200
        with site.app.app_context():
            for ask in (site.ext.users.devices, site.ext.users.revoke_all):
                with pytest.raises(ValueError, match="user_id"):
                    ask(user)
        assert site.stored() == {}


@pytest.mark.parametrize(
    "how",
    [
        *({"label": label} for label in ("x" * 101, 7, "\ud800")),
        *({"tags": tags} for tags in ("web", ["x"] * 11, [7], {"a": "b"})),
    ],
)
def test_labels_and_tags_are_checked(how: dict[str, Any]) -> None:
    with SiteMaker("memory://", "p:", lambda: 1e9) as make:

        def bind(session: Any) -> None:
            with pytest.raises(ValueError, match=next(iter(how))):
                session.bind("ada", **how)

        make().visitor().run(bind)


# Ending ------------------------------------------------------------------------------------------


def test_one_device_is_revoked(site: Site, users: Any) -> None:
    first, second = signed_in(site), signed_in(site)
    gone = device_id(first)
    handle = first.run(lambda session: session.handle)
    assert users.revoke("ada", gone, reason="stolen", by="support") is True
    assert owner(first) is None
    assert owner(second) == "ada"
    assert [device.id for device in users.devices("ada")] == [device_id(second)]
    assert site.happened(DeviceRevoked) == [DeviceRevoked("ada", gone, handle, "stolen", "support")]


def test_a_device_that_is_unknown_or_another_users_is_not_revoked(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    for user, device in (("ada", "unknown"), ("bob", device_id(visitor)), ("ada", "")):
        assert users.revoke(user, device) is False
    assert owner(visitor) == "ada"


def test_all_devices_are_revoked(site: Site, users: Any) -> None:
    visitors = [signed_in(site) for _ in range(4)]
    visitors[1].run(lambda session: session.rotate(60))
    other = signed_in(site, "bob")
    assert users.revoke_all("ada") == 4
    assert [owner(visitor) for visitor in visitors] == [None] * 4
    assert owner(other) == "bob"
    assert users.devices("ada") == []
    assert users.revoke_all("ada") == 0
    assert owner(signed_in(site)) == "ada"


def test_revoking_all_in_a_request_ends_its_own_session(site: Site) -> None:
    visitor, other = signed_in(site), signed_in(site)

    def everywhere(session: Any) -> Any:
        ended = site.ext.users.revoke_all("ada")
        assert session.owner is None
        session["flash"] = "signed out everywhere"
        return ended

    assert visitor.run(everywhere) == 2
    assert visitor.run(dict) == {"flash": "signed out everywhere"}
    assert (owner(visitor), owner(other)) == (None, None)


def test_revoking_its_own_device_in_a_request(site: Site) -> None:
    visitor, other = signed_in(site), signed_in(site)

    def end(session: Any) -> None:
        assert site.ext.users.revoke("ada", session.device_id)
        assert session.owner is None
        session["flash"] = "signed out"

    visitor.run(end)
    assert visitor.run(dict) == {"flash": "signed out"}
    assert (owner(visitor), owner(other)) == (None, "ada")


def test_a_transaction_ends_no_session_of_its_own(site: Site) -> None:
    """It may run again, and this can't be undone: nobody's session ends."""
    visitor, other = signed_in(site), signed_in(site)

    def end(session: Any) -> None:
        for revoke in (
            lambda: site.ext.users.revoke_all("ada"),
            lambda: site.ext.users.revoke("ada", session.device_id),
        ):
            with session.transaction(), pytest.raises(TransactionMisused):
                revoke()

    visitor.run(end)
    assert (owner(visitor), owner(other)) == ("ada", "ada")


def test_a_sign_in_after_revoking_all_in_the_same_request(site: Site) -> None:
    """A new password signs out everywhere else, and in here."""
    visitor, other = signed_in(site), signed_in(site)

    def change_password(session: Any) -> None:
        site.ext.users.revoke_all("ada")
        session.bind("ada")

    visitor.run(change_password)
    assert owner(visitor) == "ada"
    assert owner(other) is None
    assert ids(site) == [device_id(visitor)]


def test_the_others_are_revoked(site: Site) -> None:
    visitor, *others = (signed_in(site) for _ in range(3))
    device = device_id(visitor)
    assert visitor.run(lambda session: site.ext.users.revoke_others()) == 2
    assert owner(visitor) == "ada"
    assert [owner(other) for other in others] == [None, None]
    assert ids(site) == [device]
    with site.app.app_context():
        again = signed_in(site)
        assert site.ext.users.revoke_others("ada", device) == 1
        assert owner(again) is None
        with pytest.raises(SessionEnded):
            site.ext.users.revoke_others("ada", "unknown")
        with pytest.raises(ValueError, match="user_id is None"):
            site.ext.users.revoke_others()
        with pytest.raises(ValueError, match="device_id is None"):
            site.ext.users.revoke_others("ada")
    assert owner(visitor) == "ada"


@pytest.mark.parametrize("ends", ["all", "one", "others"])
def test_a_switch_of_users_survives_a_revocation_of_the_first(site: Site, ends: str) -> None:
    other, visitor = signed_in(site), signed_in(site)
    visitor.run(lambda session: session.update(secret=1, list=[]))
    before, kept, tab = device_id(visitor), device_id(other), visitor.another_tab()

    def switch(session: Any) -> Any:
        session["list"].append(1)
        session["mine"] = 1
        session.bind("bob")
        users = site.ext.users
        if ends == "all":
            assert users.revoke_all("ada") == 2
        elif ends == "one":
            assert users.revoke("ada", before)
        else:
            assert users.revoke_others("ada", kept) == 1
        session["later"] = 1
        return session.owner

    assert visitor.run(switch) == "bob"
    assert visitor.run(lambda session: (session.owner, dict(session))) == (
        ("bob", {"mine": 1, "later": 1})
    )
    assert ids(site, "bob") == [device_id(visitor)]
    assert ids(site) == ([] if ends == "all" else [kept])
    assert owner(tab) is None
    assert len(site.sessions()) == 1 + (ends != "all")


def test_an_unbound_session_ends_with_the_revocation_of_its_user(site: Site) -> None:
    visitor = signed_in(site)

    def sign_out(session: Any) -> None:
        session["a"] = 1
        session.unbind()
        site.ext.users.revoke_all("ada")
        session["b"] = 1

    visitor.run(sign_out)
    assert visitor.run(lambda session: (session.owner, dict(session))) == (None, {"b": 1})
    assert ids(site) == []


def test_the_others_are_revoked_at_a_sign_in(site: Site) -> None:
    others = [signed_in(site) for _ in range(2)]
    visitor = site.visitor()

    def only_here(session: Any) -> Any:
        session.bind("ada")
        return site.ext.users.revoke_others()

    assert visitor.run(only_here) == 2
    assert owner(visitor) == "ada"
    assert [owner(other) for other in others] == [None, None]


def test_a_user_without_sessions(users: Any) -> None:
    assert users.devices("ada") == []
    assert users.revoke_all("ada") == 0
    assert users.revoke("ada", "x") is False


# A sign-in beside a revocation -------------------------------------------------------------------


def refused(visitor: Visitor, function: Any) -> None:
    assert visitor.ask(function).status_code == 401
    assert owner(visitor) is None


def test_a_sign_in_is_refused_if_all_were_revoked_since_it_began(site: Site, users: Any) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    cookie = visitor.cookie

    def beside(session: Any) -> None:
        with SiteMaker(site.url, site.prefix, site.clock) as make:  # another process does it
            other = make(store=site.store)
            with other.app.app_context():
                other.ext.users.revoke_all("ada")
        session.bind("ada")

    refused(visitor, beside)
    assert (visitor.cookie, visitor.run(dict)) == (cookie, {"cart": ["mug"]})
    assert site.happened(SignInRejected) == [SignInRejected("ada", "revoked")]
    site.clock.advance(6)  # more than clocks may differ
    visitor.run(lambda session: session.bind("ada"))
    assert owner(visitor) == "ada"


def test_login_makes_it_exact(site: Site, users: Any) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    tab = visitor.another_tab()

    def sign_in(session: Any) -> None:
        with site.ext.users.login("ada"):
            tab.run(lambda session: site.ext.users.revoke_all("ada"))
            session.bind("ada")

    refused(visitor, sign_in)
    assert visitor.run(dict) == {"cart": ["mug"]}

    def after(session: Any) -> None:
        tab.run(lambda session: site.ext.users.revoke_all("ada"))
        with site.ext.users.login("ada"):
            session.bind("ada")

    visitor.run(after)
    assert owner(visitor) == "ada"


def test_a_view_can_catch_the_refusal(site: Site) -> None:
    visitor, tab = site.visitor(), site.visitor()

    def sign_in(session: Any) -> None:
        session["a"] = 1
        tab.run(lambda session: site.ext.users.revoke_all("ada"))
        with pytest.raises(SignInRefused):
            session.bind("ada")

    visitor.run(sign_in)
    assert (owner(visitor), visitor.run(dict)) == (None, {"a": 1})


@pytest.mark.parametrize("operation", ["create", "replace"])
def test_revoking_all_beside_the_save_of_a_sign_in(site: Site, operation: str) -> None:
    """After the look and before the entry: the session is not handed out, and not left behind."""
    visitor, tab = site.visitor(), site.visitor()
    if operation == "replace":
        visitor.run(lambda session: session.update(a=1))
    steps = [lambda: tab.run(lambda session: site.ext.users.revoke_all("ada"))]

    def sign_in(session: Any) -> None:
        session.bind("ada")
        site.before_each(operation, *steps)

    refused(visitor, sign_in)
    assert site.sessions() == {}
    assert ids(site) == []


def test_revoking_all_between_the_store_and_the_entry(site: Site) -> None:
    visitor, tab = site.visitor(), site.visitor()
    visitor.run(lambda session: session.update(a=1))

    def sign_in(session: Any) -> None:
        session.bind("ada")
        site.store.after(
            "replace", lambda: tab.run(lambda session: site.ext.users.revoke_all("ada"))
        )

    refused(visitor, sign_in)
    assert site.sessions() == {}


@pytest.mark.parametrize("grace", [0, 60])
@pytest.mark.parametrize("when", ["before", "after"])
def test_revoking_all_beside_a_rotation(site: Site, grace: int, when: str) -> None:
    visitor, tab = signed_in(site), site.visitor()
    old = visitor.another_tab()

    def rotate(session: Any) -> None:
        session.rotate(grace)
        getattr(site.store, when)(
            "replace", lambda: tab.run(lambda session: site.ext.users.revoke_all("ada"))
        )

    visitor.ask(rotate)
    assert (owner(visitor), owner(old)) == (None, None)
    assert site.sessions() == {}
    assert ids(site) == []


def test_revoking_all_beside_a_write(site: Site) -> None:
    visitor, tab = signed_in(site), site.visitor()
    site.clock.advance(400)  # so that it touches

    def write(session: Any) -> None:
        session["a"] = 1
        site.before_a_write(lambda: tab.run(lambda session: site.ext.users.revoke_all("ada")))

    visitor.ask(write)
    assert owner(visitor) is None
    assert site.sessions() == {}


# Interrupted revocations -------------------------------------------------------------------------


def down() -> None:
    raise StoreUnavailable("the store is down")


def interrupted(site: Site, revoke: Any) -> None:
    site.store.before("delete", down)
    with pytest.raises(RevocationUnfinished) as raised:
        revoke()
    assert raised.value.code == 503
    assert raised.value.get_response().headers["Retry-After"]


def test_an_interrupted_revocation_is_repeated(site: Site, users: Any) -> None:
    visitors = [signed_in(site) for _ in range(3)]
    interrupted(site, lambda: users.revoke_all("ada"))
    assert users.devices("ada") == []
    assert users.revoke_all("ada") == 3
    assert [owner(visitor) for visitor in visitors] == [None] * 3
    assert site.sessions() == {}


def test_an_interrupted_revocation_of_one_is_repeated(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    device = device_id(visitor)
    interrupted(site, lambda: users.revoke("ada", device))
    assert users.revoke("ada", device) is True
    assert owner(visitor) is None


def test_the_next_sign_in_finishes_a_revocation(site: Site, users: Any) -> None:
    visitors = [signed_in(site) for _ in range(2)]
    interrupted(site, lambda: users.revoke_all("ada"))
    signed_in(site)
    assert [owner(visitor) for visitor in visitors] == [None, None]
    assert len(ids(site)) == 1


@pytest.mark.parametrize("whose", ["own", "another"])
def test_the_next_touch_finishes_a_revocation(site: Site, users: Any, whose: str) -> None:
    first, second = signed_in(site), signed_in(site)
    interrupted(site, lambda: users.revoke("ada", device_id(first)))
    site.clock.advance(400)
    (first if whose == "own" else second).run(lambda session: session.update(a=1))
    assert len(site.sessions()) == 1
    assert owner(first) is None
    assert owner(second) == "ada"


# The cap -----------------------------------------------------------------------------------------


def test_the_oldest_ends_beyond_the_cap(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=2)
    visitors = [signed_in(site) for _ in range(4)]
    assert [owner(visitor) for visitor in visitors] == [None, None, "ada", "ada"]
    assert len(ids(site)) == 2
    assert len(site.sessions()) == 2
    assert [event.reason for event in site.happened(DeviceRevoked)] == ["limit", "limit"]
    assert site.happened(DeviceLimitReached) == [DeviceLimitReached("ada", 2, 1)] * 2
    visitors[2].run(lambda session: session.rotate(0))
    assert owner(visitors[2]) == "ada"


def test_a_full_list_refuses_a_sign_in(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=2, max_policy="refuse")
    first, second = signed_in(site), signed_in(site)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    assert visitor.ask(lambda session: session.bind("ada")).status_code == 409
    assert (owner(visitor), visitor.run(dict)) == (None, {"cart": ["mug"]})
    assert site.happened(SignInRejected) == [SignInRejected("ada", "full")]
    first.run(lambda session: session.destroy())
    visitor.run(lambda session: session.bind("ada"))
    assert (owner(visitor), owner(second)) == ("ada", "ada")


def test_expired_sessions_make_room(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=1, max_policy="refuse", idle_timeout=600)
    signed_in(site)
    site.clock.advance(2000)
    assert ids(site) == []
    assert owner(signed_in(site)) == "ada"


def test_sessions_that_ended_unnoticed_make_room(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=1, max_policy="refuse")
    visitor = signed_in(site)
    site.store.store.delete(visitor.run(lambda session: session.handle))
    assert len(ids(site)) == 1, "the roster was not updated"
    assert owner(signed_in(site)) == "ada"


def test_two_sign_ins_for_the_last_place(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=1, max_policy="refuse")
    first, second = site.visitor(), site.visitor()
    second.run(lambda session: session.update(a=1))

    def sign_in(session: Any) -> None:
        session.bind("ada")
        site.store.before("replace", lambda: first.run(lambda session: session.bind("ada")))

    assert second.ask(sign_in).status_code == 409
    assert (owner(first), owner(second)) == ("ada", None)
    with pytest.raises(TooManySessions):
        raise TooManySessions


# Touching ----------------------------------------------------------------------------------------


def test_a_session_in_use_is_touched_now_and_then(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    (before,) = users.devices("ada")
    site.clock.advance(200)
    with site.counted() as count:
        visitor.run(lambda session: session.update(a=1))
    assert count.calls == ["load", "save"]
    site.clock.advance(200)
    with site.counted() as count:
        visitor.run(lambda session: session.update(a=2))
    assert count.calls == ["load", "load", "save", "save"]
    (after,) = users.devices("ada")
    assert after.last_seen_at - before.last_seen_at == timedelta(seconds=400)
    assert after.expires_at > before.expires_at
    with site.counted() as count:
        visitor.run(lambda session: session.update(a=3))
    assert count.calls == ["load", "save"]


def test_reading_touches_too(make_site: SiteMaker) -> None:
    site = make_site(idle_timeout=86400, absolute_timeout=86400)  # never renewed
    visitor = signed_in(site)
    site.clock.advance(301)
    with site.counted() as count:
        visitor.run(dict)
    assert count.calls == ["load", "load", "save", "save"]
    with site.counted() as count:
        visitor.run(dict)
    assert count.calls == ["load"]


def test_a_longer_lifetime_reaches_the_roster_at_once(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    visitor.run(lambda session: session.set_lifetime(20 * 86400))
    site.clock.advance(10 * 86400)
    assert len(users.devices("ada")) == 1
    assert owner(visitor) == "ada"


@pytest.mark.parametrize(
    ("raised", "reads", "pause"),
    [({"idle_timeout": 7200}, 1, 550), ({"seen_interval": 86400}, 7, 250)],
    ids=["idle_timeout", "seen_interval"],
)
def test_a_session_stays_listed_after_a_setting_was_raised(
    make_site: SiteMaker, raised: dict[str, Any], reads: int, pause: int
) -> None:
    """Reads renew it for longer than its entry lasts, and ``revoke_all`` would miss it."""
    usual = {"idle_timeout": 300, "seen_interval": 60}
    before = make_site(**usual)
    after = make_site(store=before.store, **{**usual, **raised})
    visitor = after.visitor(signed_in(before).cookie)
    for _ in range(reads):
        before.clock.advance(50)
        assert owner(visitor) == "ada"
    before.clock.advance(pause)
    assert len(ids(after)) == 1
    with after.app.app_context():
        assert after.ext.users.revoke_all("ada") == 1
    assert owner(visitor) is None


def test_a_session_that_was_brought_back_ends_at_its_next_touch(site: Site, users: Any) -> None:
    """As by a failover that lost the delete, but not the roster."""
    visitor = signed_in(site)
    record = site.store.store.load(visitor.run(lambda session: session.handle))
    users.revoke_all("ada")
    site.store.store.create(record)
    assert owner(visitor) == "ada"
    site.clock.advance(301)
    visitor.run(dict)
    assert owner(visitor) is None
    assert site.sessions() == {}


def test_the_predecessor_of_a_rotation_that_was_brought_back_ends(site: Site) -> None:
    visitor = signed_in(site)
    old = visitor.another_tab()
    record = site.store.store.load(visitor.run(lambda session: session.handle))
    visitor.run(lambda session: session.rotate(0))
    site.store.store.create(record)
    site.clock.advance(301)
    old.run(dict)
    assert owner(old) is None
    assert owner(visitor) == "ada"


def test_an_interrupted_rotation_heals(site: Site) -> None:
    visitor = signed_in(site)
    tab = visitor.another_tab()
    site.store.after("replace", lambda: site.store.before("load", down))
    assert visitor.ask(lambda session: session.rotate(400)).status_code == 503
    assert visitor.cookie == tab.cookie, "its token may not leave before it is entered"
    site.clock.advance(301)
    assert owner(tab) == "ada"
    with site.app.app_context():
        (device,) = site.ext.users.devices("ada")
    assert device.handle == tab.run(lambda session: session.handle)


# Rosters that can't be read ----------------------------------------------------------------------


def damage(site: Site, payload: bytes = b"\2\0junk") -> None:
    record = site.store.store.load(roster_key("ada"))
    site.store.store.save(record._replace(version=new_version(), payload=payload), record.version)


def test_a_damaged_roster_fails_closed_and_is_rebuilt(site: Site, users: Any) -> None:
    visitors = [signed_in(site) for _ in range(3)]
    other = signed_in(site, "bob")
    devices = set(ids(site))
    damage(site)
    for ask in (users.devices, users.revoke_all):
        with pytest.raises(RosterUnreadable, match="rebuild"):
            ask("ada")
    assert site.visitor().ask(lambda session: session.bind("ada")).status_code == 503
    assert owner(visitors[0]) == "ada", "until the next touch"
    site.clock.advance(301)
    assert visitors[0].ask(lambda session: session.update(a=1)).status_code == 503
    assert visitors[0].ask(dict).status_code == 503
    assert owner_status(other) == "bob"
    assert users.rebuild("ada") == 3
    assert set(ids(site)) == devices
    assert [owner(visitor) for visitor in visitors] == ["ada"] * 3
    assert ids(site, "bob") == [device_id(other)]


def owner_status(visitor: Visitor) -> Any:
    return owner(visitor)


@pytest.mark.parametrize("keys", [None, ["k" * 43]])
def test_a_damaged_format_number_is_damage(make_site: SiteMaker, keys: Any) -> None:
    """A newer version would check it as well. So the repair needs no word of an admin."""
    site = make_site(encryption_keys=keys)
    visitor = signed_in(site)
    record = site.store.store.load(roster_key("ada"))
    assert record is not None
    with site.app.app_context():
        for bit in range(8):
            damage(site, bytes((record.payload[0] ^ 1 << bit,)) + record.payload[1:])
            with pytest.raises(RosterUnreadable, match="corrupt") as raised:
                site.ext.users.devices("ada")
            assert not raised.value.for_others
        assert site.ext.users.rebuild() == 1
        assert ids(site) == [device_id(visitor)]


def test_a_lost_roster_signs_out_or_is_rebuilt(site: Site, users: Any) -> None:
    first, second = signed_in(site), signed_in(site)
    site.store.store.delete(roster_key("ada"))
    site.clock.advance(301)
    first.run(dict)
    assert owner(first) is None
    assert users.rebuild() == 1
    assert ids(site) == [device_id(second)]
    assert owner(second) == "ada"


def test_rebuilding_beside_a_sign_in_and_a_revocation(site: Site, users: Any) -> None:
    first = signed_in(site)
    late: list[Visitor] = []
    for beside, left in ((lambda: late.append(signed_in(site)), 2), (None, 0)):
        site.store.store.delete(roster_key("ada"))
        act = beside or (lambda: users.revoke_all("ada"))
        steps = [lambda: None, act]  # it looked for a roster and found nothing
        site.before_each("load", *steps)
        users.rebuild("ada")
        assert len(users.devices("ada")) == left
        site.store._hooks.clear()
        site.clock.advance(301)
        first.run(dict)
    assert owner(first) is None
    assert late


def test_rebuilding_leaves_intact_rosters(site: Site, users: Any) -> None:
    visitor = signed_in(site)
    record = site.store.store.load(visitor.run(lambda session: session.handle))
    users.revoke_all("ada")
    site.store.store.create(record)  # brought back by a failover
    assert users.rebuild() == 0
    assert ids(site) == []


def test_rosters_whose_encryption_key_is_gone_are_replaced_on_demand(make_site: SiteMaker) -> None:
    old, new = "o" * 43, "n" * 43
    before = make_site(encryption_keys=[old])
    kept, gone = signed_in(before), signed_in(before)
    signed_in(before, "bob")
    mark = mark_key("cookie", "an old session")  # of a take-over; its key is like a roster's
    repository = before.app.extensions["gsession"][before.ext].repository
    marked = repository.other_records.draft(mark, b"x", repository.expiry.latest_end())
    repository.create(marked)
    both = make_site(store=before.store, encryption_keys=[new, old])
    visitor = both.visitor(kept.cookie)
    visitor.run(lambda session: session.update(a=1))  # under the new key, the roster is not
    site = make_site(store=before.store, encryption_keys=[new])
    eve = signed_in(site, "eve")
    for user in ("ada", "bob"):
        assert site.visitor().ask(lambda session, user=user: session.bind(user)).status_code == 503
    damaged = site.store.store.load(roster_key("eve"))
    assert damaged is not None
    site.store.store.save(damaged._replace(version=7, payload=b"\2\0junk"), damaged.version)
    with site.app.app_context():
        for user in ("ada", None):
            with pytest.raises(RosterUnreadable, match="replace_foreign"):
                site.ext.users.rebuild(user)
        assert ids(site, "eve") == [device_id(eve)], "repaired all the same"
        assert site.ext.users.rebuild(replace_foreign=True) == 1
        assert site.ext.users.rebuild(replace_foreign=True) == 0
    assert site.store.store.load(mark) == marked
    site.clock.advance(301)
    assert owner(site.visitor(visitor.cookie)) == "ada"
    assert owner(site.visitor(gone.cookie)) is None
    assert len({*ids(site), device_id(signed_in(site))}) == 2
    assert device_id(signed_in(site, "bob")) in ids(site, "bob"), "of no session that can be read"
    assert owner(eve) == "eve"


def test_two_repairs_of_one_roster_at_once(site: Site, users: Any) -> None:
    first, second = signed_in(site), signed_in(site)
    damage(site)

    def repair_and_revoke() -> None:
        assert users.rebuild("ada") == 2
        assert users.revoke("ada", device_id(second))

    site.before_each("save", repair_and_revoke)
    users.rebuild("ada")
    assert ids(site) == [device_id(first)]


@pytest.mark.parametrize("wrong", [["a"], {}, None, 7])
def test_a_device_id_is_text(site: Site, users: Any, wrong: Any) -> None:
    visitor = signed_in(site)
    with pytest.raises(ValueError, match="device_id"):
        users.revoke("ada", wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match="device_id"):
            users.revoke_others("ada", wrong)
    assert owner(visitor) == "ada"


# Other code that meets rosters --------------------------------------------------------------------


def test_counting_knows_a_roster_from_a_session(site: Site) -> None:
    signed_in(site)
    signed_in(site, "bob")
    assert site.store.store.counts.count() == 2


def test_an_ended_session_beside_another_session_of_the_application(make_site: SiteMaker) -> None:
    """Two ``Session`` objects on one store share the rosters."""
    first = make_site()
    second = make_site(store=first.store, cookie_name="other")
    one, two = signed_in(first), signed_in(second)
    assert len(ids(first)) == len(ids(second)) == 2
    with second.app.app_context():
        assert second.ext.users.revoke_all("ada") == 2
    assert (owner(one), owner(two)) == (None, None)
