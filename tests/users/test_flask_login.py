"""Flask-Login binds and unbinds; sessions from before this version are bound as they are used."""

from __future__ import annotations

from typing import Any

import pytest
from flask_login import (
    FlaskLoginClient,
    LoginManager,
    UserMixin,
    current_user,
    login_user,
    logout_user,
)

from flask_gsession.errors import StoreUnavailable, TooManySessions, UnreadableRecord
from flask_gsession.events import SignInRejected
from flask_gsession.values.envelope import Envelope
from tests.harness.apps import Site, SiteMaker, Visitor

from .test_devices import device_id, ids, owner, signed_in


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def with_login(site: Site) -> Site:
    LoginManager(site.app).user_loader(User)
    site.app.add_url_rule("/who", "who", view_func=lambda: current_user.id)
    return site


@pytest.fixture
def members(make_site: SiteMaker) -> Site:
    return with_login(make_site())


def log_in(visitor: Visitor, name: str = "ada", **how: Any) -> None:
    visitor.run(lambda session: login_user(User(name), **how))


def from_before(members: Site, make_site: SiteMaker, name: str = "ada") -> Visitor:
    """A session that Flask-Login signed in before there were rosters."""
    earlier = make_site(store=members.store)
    visitor = earlier.visitor()
    visitor.run(lambda session: session.update(_user_id=name, _fresh=True, cart=["mug"]))
    assert owner(visitor) is None
    return members.visitor(visitor.cookie)


def test_a_sign_in_binds_and_a_sign_out_unbinds(members: Site) -> None:
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    log_in(visitor)
    assert owner(visitor) == "ada"
    device = device_id(visitor)
    assert ids(members) == [device]
    log_in(visitor)
    assert device_id(visitor) == device, "the password was given again"
    assert ids(members) == [device]
    visitor.run(lambda session: logout_user())
    assert (owner(visitor), ids(members)) == (None, [])
    assert visitor.run(lambda session: session["cart"]) == ["mug"]
    log_in(visitor, "bob")
    log_in(visitor, "eve")
    assert (ids(members, "bob"), ids(members, "eve")) == ([], [device_id(visitor)])


def test_revoking_all_ends_sign_ins_by_flask_login(members: Site) -> None:
    visitors = [members.visitor() for _ in range(2)]
    for visitor in visitors:
        log_in(visitor)
    with members.app.app_context():
        assert members.ext.users.revoke_all("ada") == 2
    for visitor in visitors:
        assert visitor.run(lambda session: (session.owner, session.get("_user_id"))) == (None, None)


def test_a_remembered_sign_in_is_marked(members: Site) -> None:
    visitor = members.visitor()
    log_in(visitor, remember=True)
    visitor.delete_cookie("session")
    assert visitor.get("/who").text == "ada"
    with members.app.app_context():
        assert sorted(device.remembered for device in members.ext.users.devices("ada")) == [
            False,
            True,
        ]


def test_a_sign_in_is_refused_after_a_revocation(members: Site) -> None:
    visitor, tab = members.visitor(), members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))

    def sign_in(session: Any) -> None:
        tab.run(lambda session: members.ext.users.revoke_all("ada"))
        login_user(User("ada"))

    assert visitor.ask(sign_in).status_code == 401
    assert visitor.run(dict) == {"cart": ["mug"]}
    assert members.happened(SignInRejected) == [SignInRejected("ada", "revoked")]


def test_a_full_list_refuses_with_409(make_site: SiteMaker) -> None:
    members = with_login(make_site(max_per_user=1, max_policy="refuse"))
    first, second = members.visitor(), members.visitor()
    log_in(first)
    assert second.ask(lambda session: login_user(User("ada"))).status_code == 409
    assert (owner(first), owner(second)) == ("ada", None)
    assert second.run(dict) == {}


def no_sign_in(members: Site, visitor: Visitor, before: dict[str, Any], user: str | None) -> None:
    """The request that failed left the session as it was."""
    assert visitor.run(dict) == before
    assert (owner(visitor), ids(members, "bob")) == (user, [])


@pytest.mark.parametrize("user", [None, "ada"])
@pytest.mark.parametrize("how", [StoreUnavailable("down"), KeyboardInterrupt()])
def test_a_sign_in_that_fails_changes_nothing(
    members: Site, user: str | None, how: BaseException
) -> None:
    """Otherwise the save would sign the user in, and without a rotation."""
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    if user is not None:
        log_in(visitor, user)
    before, cookie = visitor.run(dict), visitor.cookie

    def fail() -> None:
        raise how

    def sign_in(session: Any) -> None:
        assert session["cart"] == ["mug"]
        members.store.before("load", fail)  # of the roster
        with pytest.raises(type(how)):
            login_user(User("bob"))
        assert (session.get("_user_id"), session.owner) == (user, user)
        if user is not None:
            assert current_user.id == user

    visitor.run(sign_in)
    no_sign_in(members, visitor, before, user)
    if user is None:
        assert visitor.cookie == cookie


def test_a_user_whose_id_can_be_none_is_not_signed_in(members: Site) -> None:
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))

    def sign_in(session: Any) -> None:
        with pytest.raises(ValueError, match="257 characters"):
            login_user(User("x" * 257))

    visitor.run(sign_in)
    no_sign_in(members, visitor, {"cart": ["mug"]}, None)


def test_a_refused_switch_of_users_keeps_the_first(make_site: SiteMaker) -> None:
    members = with_login(make_site(max_per_user=1, max_policy="refuse"))
    first, second = members.visitor(), members.visitor()
    log_in(first, "bob")
    log_in(second, "ada")
    before = second.run(dict)
    assert second.ask(lambda session: login_user(User("bob"))).status_code == 409
    assert (second.run(dict), owner(second), owner(first)) == (before, "ada", "bob")

    def several(session: Any) -> None:
        login_user(User("eve"))
        with pytest.raises(TooManySessions):
            login_user(User("bob"))
        assert (session["_user_id"], session.owner, current_user.id) == ("ada", "ada", "ada")

    second.run(several)
    assert (owner(second), ids(members), ids(members, "eve")) == ("ada", [device_id(second)], [])


def test_flask_logins_test_client_is_bound(members: Site) -> None:
    members.app.test_client_class = FlaskLoginClient
    client = members.app.test_client(user=User("ada"))
    with members.visit(lambda session: session.update(a=1)) as visit:
        assert client.get(visit.path).status_code == 200
    assert len(ids(members)) == 1


def test_a_session_from_before_is_bound_when_it_is_used(
    members: Site, make_site: SiteMaker
) -> None:
    for use in (lambda session: session.update(a=1), dict):
        visitor = from_before(members, make_site)
        cookie = visitor.cookie
        assert ids(members) == []
        visitor.run(use)
        assert visitor.cookie == cookie, "its token stays"
        assert (owner(visitor), ids(members)) == ("ada", [device_id(visitor)])
        assert visitor.run(lambda session: session["cart"]) == ["mug"]
        with members.counted() as count:
            visitor.run(dict)
        assert count.calls == ["load"]
        with members.app.app_context():
            members.ext.users.revoke_all("ada")
        assert owner(visitor) is None
        members.clock.advance(60)


@pytest.mark.parametrize("use", [lambda session: session.update(a=1), dict])
def test_a_session_from_before_a_revocation_ends_when_it_is_used(
    members: Site, make_site: SiteMaker, use: Any
) -> None:
    visitor = from_before(members, make_site)
    members.clock.advance(60)
    with members.app.app_context():
        members.ext.users.revoke_all("ada")
    visitor.ask(use)
    assert visitor.run(dict) == {}
    assert members.sessions() == {}
    assert ids(members) == []


def test_revoking_the_others_is_the_first_use_of_a_session_from_before(
    members: Site, make_site: SiteMaker
) -> None:
    other, visitor, old = members.visitor(), *(from_before(members, make_site) for _ in range(2))
    log_in(other)

    def only_here(session: Any) -> int:
        session["a"] = 1
        return int(members.ext.users.revoke_others())

    assert visitor.run(only_here) == 1
    assert (owner(visitor), owner(other), ids(members)) == ("ada", None, [device_id(visitor)])
    assert visitor.run(lambda session: (session["cart"], session["a"])) == (["mug"], 1)
    assert old.ask(only_here).status_code == 409, "it is from before the revocation"
    assert ids(members) == [device_id(visitor)]


def test_the_owner_follows_flask_logins_key(members: Site) -> None:
    visitor = members.visitor()
    log_in(visitor)

    def owned(session: Any) -> tuple[Any, Any]:
        return session.owner, session.device_id is not None

    def step(change: Any) -> Any:
        return visitor.run(lambda session: (change(session), owned(session))[1])

    assert step(lambda session: session.update(_user_id="bob")) == ("bob", False)
    assert visitor.run(owned) == ("bob", True)
    assert step(lambda session: session.pop("_user_id")) == (None, False)
    assert visitor.run(owned) == (None, False)
    for sign_out in (lambda session: session.clear(), lambda session: logout_user()):
        log_in(visitor)
        assert step(lambda session: None) == ("ada", True)
        assert step(sign_out) == (None, False)
        assert visitor.run(owned) == (None, False)
    assert ids(members) == ids(members, "bob") == []


def test_rebuilding_binds_sessions_from_before(members: Site, make_site: SiteMaker) -> None:
    log_in(members.visitor())
    visitor = from_before(members, make_site)
    with members.app.app_context():
        assert members.ext.users.rebuild() == 1
        assert len(members.ext.users.devices("ada")) == 2
        assert members.ext.users.revoke_all("ada") == 2
    assert visitor.run(dict) == {}


def test_rebuilding_binds_all_of_a_user_without_a_roster(
    members: Site, make_site: SiteMaker
) -> None:
    visitors = [from_before(members, make_site) for _ in range(2)]
    with members.app.app_context():
        assert members.ext.users.rebuild("ada") == 2
        assert members.ext.users.revoke_all("ada") == 2
    assert [visitor.run(dict) for visitor in visitors] == [{}, {}]


def test_two_uses_of_a_session_from_before_are_one_device(
    members: Site, make_site: SiteMaker
) -> None:
    visitor = from_before(members, make_site)
    tab = visitor.another_tab()

    def use(session: Any) -> None:
        session["a"] = 1
        members.before_a_write(lambda: tab.run(lambda session: session.update(b=1)))

    visitor.run(use)
    assert visitor.run(lambda session: (session["a"], session["b"])) == (1, 1)
    assert ids(members) == [device_id(visitor)]


def test_revoking_all_beside_the_first_use_of_a_session_from_before(
    members: Site, make_site: SiteMaker
) -> None:
    visitor, tab = from_before(members, make_site), members.visitor()

    def use(session: Any) -> None:
        session["a"] = 1
        members.before_a_write(lambda: tab.run(lambda s: members.ext.users.revoke_all("ada")))

    visitor.ask(use)
    assert visitor.run(dict) == {}
    assert members.sessions() == {}


def test_without_flask_login_its_key_means_nothing(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(_user_id="ada"))
    visitor.run(lambda session: session.update(a=1))
    assert (owner(visitor), ids(site)) == (None, [])


def test_an_older_worker_refuses_a_bound_session(site: Site, monkeypatch: Any) -> None:
    """It can't read format 4, and leaves the record to newer workers."""
    visitor = signed_in(site)
    opened = Envelope.open

    def older(self: Any, key: str, payload: bytes, times: Any) -> Any:
        if payload[0] > 3:
            raise UnreadableRecord("newer format", "version 4; this one reads 3")
        return opened(self, key, payload, times)

    with monkeypatch.context() as patch:
        patch.setattr(Envelope, "open", older)
        assert visitor.run(dict) == {}
    assert owner(visitor) == "ada"
