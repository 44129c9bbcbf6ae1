"""Features beyond plain values at an edge that is cut off, before and after it settles."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import flash, get_flashed_messages
from marshmallow import Schema, fields
from prometheus_client import CollectorRegistry

from flask_gsession.cli import gsession
from flask_gsession.contrib.metrics import NAME as METRICS
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.ratelimit import SessionLimits
from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.events import WriteDropped
from flask_gsession.moving.flask_session import FlaskSessionSource
from flask_gsession.pages.health import health_blueprint
from flask_gsession.stores.edge.node_file import NodeUnavailable
from flask_gsession.typed import SessionKey
from tests.edge.story import POLICIES, add, at, check, go_through, known
from tests.harness.apps import Site, SiteMaker
from tests.harness.edges import EdgeSite, Network
from tests.harness.sharing import store_servers
from tests.moving.old import OldFiles

#: The code is the same on every store.
pytestmark = pytest.mark.parametrize("store_url", ["memory"], indirect=True)
PHOTO = b"x" * 300_000


def test_a_session_with_a_large_value_is_used_and_renewed(network: Network, edge: EdgeSite) -> None:
    """Not the value: it stays at the centre. It lives on with its session, and ends with it."""
    visitor, ended = known(edge, photo=PHOTO, n=1), known(edge, photo=PHOTO, n=1)
    edge.cut()
    edge.clock.advance(600)
    visitor.run(add)
    assert visitor.ask(lambda session: session["photo"]).status_code == 503
    assert visitor.ask(lambda session: session.update(photo=PHOTO[1:])).status_code == 503
    edge.clock.advance(200)
    assert visitor.run(lambda session: session["n"]) == 2
    ended.run(lambda session: session.destroy())
    assert edge.settle().trouble == ""
    assert len(network.centre.inside.blobs()) == 1
    edge.clock.advance(2 * 3600)  # after the end that it had before the cut
    there = at(network.centre, visitor)
    assert there.run(lambda session: (session["n"], len(session["photo"]))) == (2, len(PHOTO))


def test_a_removed_large_value_is_gone(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge, photo=PHOTO, n=1)
    edge.cut()
    visitor.run(lambda session: session.__delitem__("photo"))
    assert edge.settle().changes == 1
    assert at(network.centre, visitor).run(dict) == {"n": 1}


def test_a_link_that_comes_back_during_a_save_renews_large_values(
    network: Network, edge: EdgeSite
) -> None:
    visitor = known(edge, photo=PHOTO, n=1)
    edge.cut()
    edge.clock.advance(600)
    edge.store.before("save", lambda: edge.settle())
    visitor.run(add)
    edge.clock.advance(2 * 3600)
    assert visitor.run(lambda session: len(session["photo"])) == len(PHOTO)


def test_flashes_of_both_sides_are_shown_once(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    there = at(network.centre, visitor)
    visitor.run(lambda session: flash("shown"))
    edge.cut()
    assert visitor.run(lambda session: get_flashed_messages()) == ["shown"]
    visitor.run(lambda session: flash("edge"))
    there.run(lambda session: flash("centre"))
    edge.settle()
    assert sorted(there.run(lambda session: get_flashed_messages())) == ["centre", "edge"]
    assert visitor.run(lambda session: get_flashed_messages()) == []


#: For the policies in the how-to on counters and carts: the common base, the changes at the node
#: and at the centre, and the merged value.
MERGED: dict[str, tuple[Any, Any, Any, Any]] = {
    "last": (1, 2, 3, 2),
    "counter": (1, 4, -2, 1),
    "set": ({1, 2}, {2, 3}, {1, 2, 4}, {2, 3, 4}),
    "dict": ({"a": 1, "b": 1}, {"a": 2}, {"a": 1, "b": 1, "c": 3}, {"a": 2, "c": 3}),
    "append": ([1], [1, 2], [1, 3], [1, 3, 2]),
    "highest": (5, 7, 9, 9),
    "removed": (1, None, 2, None),
    "refused": ([1], [2], [1, 3], [1, 3]),  # no mere addition: lost, and reported
}


def test_every_policy_is_kept(network: Network) -> None:
    policies: dict[str, Any] = {name: name for name in ("counter", "set", "dict", "append")}
    policies |= {"highest": lambda base, theirs, mine: max(theirs, mine), "refused": "append"}
    with network.edge(settings={"merge_policies": policies}) as edge:

        def put(side: int) -> Callable[[Any], None]:
            def change(session: Any) -> None:
                for name, values in MERGED.items():
                    if values[side] is None:
                        del session[name]
                    else:
                        session[name] = values[side]

            return change

        visitor = edge.visitor()
        visitor.run(put(0))
        edge.cut()
        visitor.run(put(1))
        at(network.centre, visitor).run(put(2))
        assert edge.settle() == (0, 1, 0, "", True)
        found = at(network.centre, visitor).run(dict)
        assert {name: found.get(name) for name in MERGED} == {
            name: values[3] for name, values in MERGED.items()
        }
        assert [event.reason for event in edge.happened(WriteDropped)] == [
            "edge: the merge policy of 'refused' refused it"
        ]


def test_the_journal_at_the_centre_has_the_events_of_a_node(
    make_site: SiteMaker, tmp_path: Path
) -> None:
    """If the node reaches it by gRPC."""
    network = Network(make_site, tmp_path, merge_policies=POLICIES, journal=True)
    centre = network.centre
    store = centre.app.extensions["gsession"][centre.ext].store
    with (
        store_servers() as serve,
        network.edge(remote=serve(store), settings={"journal": False}) as edge,
    ):
        cookies = go_through(edge, centre)
        edge.settle()
        check(centre, cookies)
        with centre.app.app_context():
            kinds = Counter(event.kind for event in centre.ext.journal("test"))
    assert kinds == {"created": 5, "bound": 1, "rotated": 1, "ended": 3}


def test_rate_limits_need_a_place_of_their_own(edge: EdgeSite) -> None:
    with pytest.raises(SettingError, match="pass a storage"):
        SessionLimits(edge.app, proxies=0)
    SessionLimits(edge.app, proxies=0, storage="memory://")


class Basket(Schema):
    goods = fields.Dict(fields.Str(), fields.Int(), load_default=dict)


def both(base: Any, theirs: Any, mine: Any) -> Any:
    goods = {**(theirs or {"goods": {}})["goods"]}
    for sku, pieces in mine["goods"].items():
        goods[sku] = goods.get(sku, 0) + pieces - (base or {"goods": {}})["goods"].get(sku, 0)
    return {"goods": goods}


def test_typed_and_expiring_keys_are_merged(network: Network, edge: EdgeSite) -> None:
    baskets = {
        site: SessionKey("basket", Basket, ttl=3600, merge=both, session=site.ext.session)
        for site in (network.centre, edge)
    }
    visitor = edge.visitor()
    visitor.run(lambda session: baskets[edge].set({"goods": {"mug": 1}}))
    visitor.run(lambda session: session.set("code", "1", ttl=300))
    there, plain = at(network.centre, visitor), known(edge)
    edge.cut()
    visitor.run(lambda session: baskets[edge].update(goods={"mug": 2, "pen": 1}))
    there.run(lambda session: baskets[network.centre].update(goods={"mug": 3}))
    there.run(lambda session: session.set("code", "2", ttl=1200))
    plain.run(lambda session: session.set("hint", "edge", ttl=300))
    at(network.centre, plain).run(lambda session: session.update(hint="centre"))
    edge.clock.advance(600)
    assert visitor.run(lambda session: session.get("code")) is None
    visitor.run(add)  # drops the expired code here
    with network.edge("a") as worker:  # hasn't used its key yet, and there are two of that name
        assert "several keys are named 'basket'" in worker.settle().trouble

    def meanwhile(operation: str) -> None:
        if operation == "save":
            edge.wire.hook = lambda operation: None
            visitor.run(lambda session: baskets[edge].update(goods={"mug": 2, "pen": 2}))

    edge.wire.hook = meanwhile
    assert edge.settle().trouble == ""
    assert visitor.run(lambda session: baskets[edge].get()) == {"goods": {"mug": 4, "pen": 2}}
    assert visitor.run(lambda session: session["code"]) == "2"
    assert there.run(lambda session: session.ttl("code")) == 600
    assert plain.run(dict) == {"n": 1, "hint": "centre"}


@pytest.mark.parametrize("keys", [(), ("a" * 43,)], ids=["plain", "encrypted"])
def test_jobs_and_debugging_work_on_the_copy(network: Network, keys: tuple[str, ...]) -> None:
    network.settings["encryption_keys"] = list(keys)
    with network.edge(settings={"encryption_keys": list(keys)}) as edge:
        visitor = known(edge)
        handle = visitor.run(lambda session: session.handle)
        edge.cut()
        with edge.app.app_context(), edge.ext.open(handle) as session:
            add(session)
        assert run(edge, "debug", handle)[0] == 0
        assert edge.settle().trouble == ""
        assert "debug_log_until      2" in run(edge, "show", handle)[1]
        assert visitor.run(dict) == {"n": 2}
        with network.edge("b", settings={"encryption_keys": list(keys)}) as other:
            assert at(other, visitor).run(dict) == {"n": 2}


def run(edge: EdgeSite, *arguments: str) -> tuple[int, str]:
    result = edge.app.test_cli_runner().invoke(gsession, arguments)
    return int(result.exit_code), result.output


def test_commands_report_changes_the_centre_does_not_have(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    handle = visitor.run(lambda session: session.handle)
    edge.cut()
    assert run(edge, "show", handle)[0] == 0
    code, output = run(edge, "revoke", handle)
    assert code == 0
    assert f"{handle}: ended" in output
    assert "1 ended sessions still work at the centre until it can be reached" in output
    code, output = run(edge, "doctor", "--json")
    found = {row["check"]: row for row in json.loads(output[output.index("[\n") :])}
    assert "answers" not in found
    assert found["centre"]["found"] == "it can't be reached: the wire is cut"
    assert edge.edge.figures().ends == 1  # none for the doctor's throw-away keys
    edge.back()
    assert edge.settle().ends == 1
    assert "work at the centre" not in run(edge, "revoke", handle)[1]


def test_a_node_that_is_cut_off_is_ready_and_up(
    network: Network, edge: EdgeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as its own file works: its load balancer and its alerts must let it work."""
    edge.app.register_blueprint(health_blueprint())
    registry = CollectorRegistry()
    SessionMetrics(edge.app, registry=registry, count_every=None)

    def seen() -> tuple[Any, ...]:
        ready = edge.visitor().get("/health/ready")
        up, cut = (
            registry.get_sample_value(f"gsession_{name}", {"session": "session"})
            for name in ("store_up", "edge_cut_off")
        )
        return ready.status_code, (ready.json or {})["status"], up, cut

    visitor = known(edge)
    assert seen() == (200, "ready", 1, 0)
    edge.cut()
    visitor.run(add)
    assert seen()[:3] == (200, "cut off", 1)

    def broken(*_: object) -> None:
        raise NodeUnavailable("the node's file: disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(edge.edge.copy, "get", broken)
        assert visitor.ask(dict).status_code == 503
        assert seen()[:3] == (503, "store unavailable", 0)
    (watch,) = edge.app.extensions[METRICS].values()
    watch._probe()  # as its thread does each second
    assert watch.is_up
    assert seen()[:3] == (200, "cut off", 1)


def test_another_service_can_not_write_through_a_node_that_is_cut_off(
    network: Network, edge: EdgeSite
) -> None:
    """Nobody here knows its merge policies, nor whether a value may be taken only once."""
    visitor, ended = known(edge, n=1, code="1"), known(edge)
    with (
        store_servers() as serve,
        Site(serve(edge.store), edge.prefix, edge.clock) as service,
    ):
        there = at(service, visitor)
        there.run(add)
        edge.cut()
        assert there.run(dict) == {"n": 2, "code": "1"}
        for action in (add, lambda session: session.take("code")):
            assert there.ask(action).status_code == 503
        assert service.visitor().ask(add).status_code == 503
        at(service, ended).run(lambda session: session.destroy())
        assert ended.run(dict) == {}
        assert edge.settle()[:2] == (1, 0)
        assert there.run(lambda session: session.take("code")) == "1"


def test_a_centre_that_hangs_opens_no_circuit(network: Network) -> None:
    """Several saves wait for it and fail slowly. The next one is stored here."""
    with network.edge(settings={"breaker_failures": 1}) as edge:
        visitor = known(edge)

        def hang(operation: str) -> None:
            if operation == "save":
                raise StoreUnavailable("no answer")

        edge.wire.hook = hang
        assert visitor.ask(add).status_code == 503
        visitor.run(add)
        assert not hasattr(edge.app.extensions["gsession"][edge.ext].repository.store, "writes")


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@pytest.mark.parametrize(("watch", "bound"), [(False, False), (True, True)])
def test_old_sessions_move_in_beside_a_cut(
    network: Network, old: OldFiles, monkeypatch: pytest.MonkeyPatch, watch: bool, bound: bool
) -> None:
    """An old session needs the centre. One that was taken over works, also if it is asked for its
    old record, and its end removes that when it is settled."""
    settings: dict[str, Any] = {"config": old.config, "import_watch": watch}
    with network.edge(settings=settings) as edge:
        sid = old.add(cart={"mug": 1})
        visitor, late = edge.visitor(), edge.visitor()
        visitor.set_cookie("session", sid)
        visitor.run(add)
        if bound:
            visitor.run(lambda session: session.bind("ada"))
        edge.cut()
        late.set_cookie("session", old.add(cart={"pen": 1}))
        assert late.ask(dict).status_code == 503
        away = monkeypatch.setattr

        def out_of_reach(*_: object) -> None:
            raise StoreUnavailable("the folder is not mounted")

        for name in ("load", "delete"):
            away(FlaskSessionSource, name, out_of_reach)
        visitor.run(add)
        tab = visitor.another_tab()
        assert tab.run(dict) == {"cart": {"mug": 1}, "n": 2}
        visitor.run(lambda session: session.destroy())
        assert tab.run(dict) == {}
        settled = edge.settle()
        assert settled.reached
        assert "the folder is not mounted" in settled.trouble
        assert edge.edge.figures().ends == 1
        assert old.has(sid)
        assert tab.run(dict) == {}
        monkeypatch.undo()
        assert edge.settle() == (1, 0, 0, "", True)
        assert not old.has(sid)
        assert late.run(lambda session: session["cart"]) == {"pen": 1}
