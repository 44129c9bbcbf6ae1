"""Parts of sessions over gRPC for services with few rights, in Python and in Node; and Envoy."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from time import time as time_of_day
from typing import Any

import grpc
import pytest
from envoy.service.auth.v3 import external_auth_pb2 as auth

from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import AccessDenied
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.protocol.methods import methods_of
from flask_gsession.protocol.values import NoMessage, of_value, to_value
from flask_gsession.sharing.ext_authz import ExtAuthzService
from flask_gsession.sharing.grants import Grant, Grants
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.sharing.values_service import ValuesService
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.sharing import serving

ROOT = Path(__file__).parents[2]
NODE = Path(sys.prefix) / "node" / "node_modules"

BILLING = Grant(
    "billing",
    verify=True,
    read=frozenset({"cart", "total"}),
    write=frozenset({"paid", "total"}),
)
GRANTS = Grants(
    by_token={
        hashlib.sha256(grant.service.encode()).digest(): grant
        for grant in (
            BILLING,
            Grant("audit", revoke=True),
            Grant("nothing"),
            Grant("shop", store=True),
        )
    }
)


class Caller:
    """A service that calls; `code` is the status of a call that must fail."""

    def __init__(self, address: str, service: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {service}"),)

    def __getattr__(self, name: str) -> Any:
        method = {**methods_of("Store"), **methods_of("Values"), **ExtAuthzService.methods}[name]
        call = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.reply.FromString,
        )
        return lambda request: call(request, timeout=10, metadata=self._metadata)

    def code(self, name: str, request: Any) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            getattr(self, name)(request)
        self.details = caught.value.details()
        return str(caught.value.code().name)


@contextmanager
def callers(site: Site, *services: str) -> Iterator[list[Caller]]:
    offered = [
        StoreService(site.store),
        ValuesService(site.app, site.ext),
        ExtAuthzService(site.app, site.ext),
    ]
    events = site.ext._interface(site.app).repository.events
    with serving(*offered, grants=GRANTS, events=events) as address:
        found = [Caller(address, service) for service in services or ("billing",)]
        yield found
        for caller in found:
            caller._channel.close()


def signed_in(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(_user_id="17", **values))
    return visitor


def get(visitor: Visitor, *keys: str) -> Any:
    return pb.GetRequest(cookie=visitor.cookie, keys=keys)


def put(visitor: Visitor, *removals: str, **changes: Any) -> Any:
    values = {key: to_value(value) for key, value in changes.items()}
    return pb.PutRequest(cookie=visitor.cookie, changes=values, removals=removals)


def values_of(reply: Any) -> dict[str, Any]:
    return {key: of_value(value) for key, value in reply.values.items()}


# Values -----------------------------------------------------------------------------------------


def test_a_service_reads_and_writes_granted_keys(site: Site) -> None:
    visitor = signed_in(site, cart=["mug", {"n": 2}], secret="hidden")
    with callers(site) as (billing,):
        assert values_of(billing.Get(get(visitor, "cart", "total"))) == {"cart": ["mug", {"n": 2}]}
        assert billing.Put(put(visitor, paid=True, total=Decimal("9.90"))).stored
        assert values_of(billing.Get(get(visitor, "total"))) == {"total": Decimal("9.90")}
        assert billing.Get(get(visitor)).found
        verified = billing.Verify(pb.VerifyRequest(cookie=visitor.cookie))
        assert (verified.active, verified.user) == (True, "17")
        assert visitor.run(lambda session: session.get("paid")) is True
        assert billing.Put(put(visitor, "paid", total=1)).stored
        assert visitor.run(lambda session: (session.get("paid"), session["total"])) == (None, 1)
        assert visitor.run(lambda session: session["secret"]) == "hidden"


def test_it_merges_with_a_request_that_is_under_way(site: Site) -> None:
    """G3: the service writes between a request's read and its save."""
    visitor = signed_in(site, cart=["mug"])
    with callers(site) as (billing,):

        def view(session: Any) -> None:
            session["cart"].append("cup")
            assert billing.Put(put(visitor, paid=True)).stored

        visitor.run(view)
    assert visitor.run(lambda session: (session["cart"], session["paid"])) == (["mug", "cup"], True)


def test_a_logout_beats_a_write_that_arrives_later(site: Site) -> None:
    """G13, also where the session ends between the service's look at it and its save."""
    visitor = signed_in(site, cart=["mug"])
    with callers(site) as (billing,):
        site.store.before("save", lambda: visitor.another_tab().run(lambda s: s.destroy()))
        assert billing.code("Put", put(visitor, paid=True)) == "NOT_FOUND"
        assert billing.code("Put", put(visitor, paid=True)) == "NOT_FOUND"
        assert billing.code("Get", get(visitor, "cart")) == "NOT_FOUND"
        verified = billing.Verify(pb.VerifyRequest(cookie=visitor.cookie))
        assert verified.HasField("active")
        assert not verified.active
    assert visitor.run(dict) == {}


def test_nothing_is_made_for_a_cookie_that_leads_nowhere(site: Site) -> None:
    visitor = signed_in(site)
    before = len(site.store.calls)
    with callers(site) as (billing,):
        for cookie in ("", "junk", f"{str(visitor.cookie)[:-4]}AAAA", "x; session=y"):
            changes = {"paid": to_value(True)}
            request = pb.PutRequest(cookie=cookie, changes=changes)
            assert billing.code("Put", request) == "NOT_FOUND"
    assert site.store.calls[before:] == []


def test_calls_without_a_grant_are_refused_counted_and_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = signed_in(site, cart=["mug"], secret="hidden", paid=False)
    record_key = site.ext._interface(site.app)
    assert record_key is not None
    verify = pb.VerifyRequest(cookie=visitor.cookie)
    revoke = pb.RevokeRequest(cookie=visitor.cookie)
    with callers(site, "billing", "audit", "nothing", "shop", "stranger") as found:
        billing, audit, nothing, shop, stranger = found
        before = len(site.store.calls)
        denied = [
            (billing, "Get", get(visitor, "secret")),
            (billing, "Get", get(visitor, "cart", "secret")),
            (billing, "Get", get(visitor, "_user_id")),
            (billing, "Get", get(visitor, "paid")),  # which it may only write
            (billing, "Put", put(visitor, cart=[])),
            (billing, "Put", put(visitor, "cart")),
            (billing, "Put", put(visitor, paid=True, secret="x")),
            (billing, "Revoke", revoke),
            (billing, "Load", pb.LoadRequest(key="x" * 43)),
            (billing, "Delete", pb.DeleteRequest(key="x" * 43)),
            (billing, "Count", pb.CountRequest()),
            (audit, "Verify", verify),
            (audit, "Get", get(visitor, "cart")),
            (nothing, "Verify", verify),
            (nothing, "Put", put(visitor, paid=True)),
            (nothing, "Check", auth.CheckRequest()),
            # Full power over the store is no right to the values: the far side decodes them.
            (shop, "Get", get(visitor, "cart")),
            (shop, "Verify", verify),
        ]
        for caller, name, request in denied:
            assert caller.code(name, request) == "PERMISSION_DENIED", name
        for name, request in (("Get", get(visitor, "cart")), ("Load", pb.LoadRequest(key="x"))):
            assert stranger.code(name, request) == "UNAUTHENTICATED"
        assert site.store.calls[before:] == []
    events = [event for event in site.events if isinstance(event, AccessDenied)]
    assert len(events) == len(denied) + 2
    assert events[0] == AccessDenied("billing", "Get: reading 'secret'")
    assert len([r for r in caplog.records if "Refused" in r.message]) == len(events)
    assert "hidden" not in caplog.text
    assert str(visitor.cookie) not in caplog.text
    assert visitor.run(lambda session: (session["cart"], session["paid"])) == (["mug"], False)


def test_a_service_may_end_a_session(site: Site) -> None:
    visitor = signed_in(site)
    with callers(site, "audit") as (audit,):
        request = pb.RevokeRequest(cookie=visitor.cookie)
        assert audit.Revoke(request).ended
        again = audit.Revoke(request)
        assert again.HasField("ended")  # an empty message is no answer
        assert not again.ended
    assert visitor.run(dict) == {}


def test_an_outage_is_not_an_answer(site: Site) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill")

    visitor = signed_in(site, cart=["mug"])
    with callers(site) as (billing,):
        for name, request in (
            ("Verify", pb.VerifyRequest(cookie=visitor.cookie)),
            ("Get", get(visitor, "cart")),
            ("Put", put(visitor, paid=True)),
        ):
            site.store.before("load", fail)
            assert billing.code(name, request) == "UNAVAILABLE"
        site.store.before("save", fail)
        assert billing.code("Put", put(visitor, paid=True)) == "UNAVAILABLE"


def test_requests_that_can_not_be(make_site: SiteMaker) -> None:
    site = make_site(max_bytes=2000, spill_bytes=None)
    visitor = signed_in(site)
    with callers(site) as (billing,):
        assert billing.code("Put", put(visitor, "paid", paid=True)) == "INVALID_ARGUMENT"
        assert billing.code("Put", put(visitor, paid="x" * 3000)) == "INVALID_ARGUMENT"
        empty = pb.PutRequest(cookie=visitor.cookie, changes={"paid": pb.Value()})
        assert billing.code("Put", empty) == "INVALID_ARGUMENT"
        raw = put(visitor, paid=True).SerializeToString() + b"\xf8\x07\x01"
        assert billing.code("Put", pb.PutRequest.FromString(raw)) == "FAILED_PRECONDITION"
        many = pb.GetRequest(cookie=visitor.cookie, keys=["cart"] * 1001)
        assert billing.code("Get", many) == "INVALID_ARGUMENT"
        visitor.run(lambda session: session.update(cart={1: "a"}))
        assert billing.code("Get", get(visitor, "cart")) == "FAILED_PRECONDITION"
        assert "keys that aren't text" in billing.details


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    2**62,
    2**80,
    1.5,
    "Zoë",
    "",
    b"\x00\xff",
    [],
    {},
    [1, ["a", {"b": None}]],
    {"a": {"b": [1.0]}},
    datetime(2026, 11, 30, 12, 0, 1, 5, UTC),
    datetime(2026, 11, 30),
    date(2026, 11, 30),
    time(12, 30),
    timedelta(days=1, microseconds=1),
    Decimal("1.10"),
    uuid.UUID(int=5),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    back = of_value(pb.Value.FromString(to_value(value).SerializeToString()))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [object(), {1: 2}, "\ud800", {"a": object()}])
def test_values_without_a_message(value: Any) -> None:
    with pytest.raises(NoMessage):
        to_value(value)
    with pytest.raises(NoMessage):
        to_value([value])


def test_a_tuple_and_a_set_are_read_as_lists() -> None:
    assert of_value(to_value((1, (2,)))) == [1, [2]]
    assert sorted(of_value(to_value({1, 2}))) == [1, 2]


def test_nesting_has_an_end() -> None:
    value: Any = []
    for _ in range(200):
        value = [value]
    with pytest.raises(NoMessage, match="deeper"):
        to_value(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("pickle", "x"), ("datetime", "soon"), ("decimal", "ten"), ("integer", "9" * 5000)],
)
def test_a_typed_text_of_the_wrong_type(kind: str, text: str) -> None:
    with pytest.raises(NoMessage):
        of_value(pb.Value(typed=pb.Typed(type=kind, text=text)))


# Node -------------------------------------------------------------------------------------------


def test_a_service_in_node() -> None:
    with Site("memory://", "", time_of_day) as site:
        _ask_from_node(site)


def _ask_from_node(site: Site) -> None:
    node = shutil.which("node")
    assert node, "Node is missing: install it, and let tests/harness/setup_node.sh fetch its client"
    visitor = signed_in(site, cart=["mug", {"n": 2}], total=7, secret="hidden")
    cookie = visitor.cookie
    calls = [
        ("Verify", {"cookie": cookie}),
        ("Get", {"cookie": cookie, "keys": ["cart", "total"]}),
        (
            "Put",
            {"cookie": cookie, "changes": {"paid": {"boolean": True}, "total": {"integer": 9}}},
        ),
        ("Get", {"cookie": cookie, "keys": ["secret"]}),
        ("Revoke", {"cookie": cookie}),
        ("Get", {"cookie": "junk", "keys": ["cart"]}),
    ]
    with serving(ValuesService(site.app, site.ext), grants=GRANTS) as address:
        run = subprocess.run(
            [
                *(node, "tests/harness/values_client.js", address, "billing"),
                "flask_gsession/protocol/gsession.proto",
                *map(json.dumps, calls),
            ],
            cwd=ROOT,
            env={"NODE_PATH": str(NODE), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert run.returncode == 0, run.stderr
    verified, got, stored, *refused = json.loads(run.stdout)
    assert (verified["active"], verified["user"]) == (True, "17")
    cart = got["values"]["cart"]["list"]["items"]
    assert cart[0]["text"] == "mug"
    assert cart[1]["map"]["items"]["n"]["integer"] == "2"
    assert stored["stored"] is True
    assert refused == ["PERMISSION_DENIED", "PERMISSION_DENIED", "NOT_FOUND"]
    assert visitor.run(lambda session: (session["paid"], session["total"])) == (True, 9)


# Envoy ------------------------------------------------------------------------------------------


def check(**headers: str) -> Any:
    """As Envoy sends it: names in small letters."""
    request = auth.CheckRequest()
    http = request.attributes.request.http
    http.method, http.path, http.host = "OPTIONS", "/orders/1", "shop.example"
    for name, text in headers.items():
        http.headers[name.replace("_", "-")] = text
    return request


def test_envoy_asks(site: Site) -> None:
    visitor = signed_in(site, cart=["mug"], secret="hidden")
    with callers(site) as (envoy,):
        cookie = f"a=1; session={visitor.cookie}"
        asked = check(cookie=cookie, x_session_user="admin", x_session_of="me")
        asked.attributes.request.http.headers.update({"x_session-user": "a", "X_Session_Cart": "b"})
        reply = envoy.Check(asked)
        assert reply.status.code == 0
        headers = {option.header.key: option for option in reply.ok_response.headers}
        assert {key: option.header.value for key, option in headers.items()} == {
            "x-session-user": "17",
            "x-session-cart": '["mug"]',
        }
        assert {option.append_action for option in headers.values()} == {2}  # it replaces
        assert list(reply.ok_response.headers_to_remove) == [
            "x-session-total",
            *("X_Session_Cart", "x-session-of", "x_session-user"),
        ]
        for request in (check(), check(cookie="session=junk", x_session_user="admin")):
            reply = envoy.Check(request)
            assert reply.status.code == 16
            assert reply.denied_response.status.code == 401


def test_envoy_asks_while_the_store_is_down(site: Site) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill", 7)

    visitor = signed_in(site)
    with callers(site) as (envoy,):
        site.store.before("load", fail)
        reply = envoy.Check(check(cookie=f"session={visitor.cookie}"))
        assert reply.status.code == 14
        assert reply.denied_response.status.code == 503
        headers = {each.header.key: each.header.value for each in reply.denied_response.headers}
        assert headers == {"retry-after": "7"}


def test_a_newer_envoy_is_understood(make_site: SiteMaker) -> None:
    site = make_site()
    visitor = signed_in(site)
    raw = check(cookie=f"session={visitor.cookie}").SerializeToString() + b"\xf8\x07\x01"
    with callers(site) as (envoy,):
        assert envoy.Check(auth.CheckRequest.FromString(raw)).status.code == 0
