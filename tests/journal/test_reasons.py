"""Why sessions ended, where nobody logged out, and another process may have ended them."""

from pathlib import Path
from typing import Any

from flask_gsession.testing import FakeClock
from tests.harness.apps import PATIENCE, Site
from tests.harness.sharing import store_servers
from tests.journal.test_journal import events_of, put, sign_in, sign_out
from tests.moving.old import OldFiles


def ends(site: Site) -> list[Any]:
    found = [each for each in events_of(site) if each.kind == "ended"]
    return [(each.owner, each.reason, each.by) for each in found]


def test_the_reason_comes_along_by_grpc(store_prefix: str, clock: FakeClock) -> None:
    with (
        Site("memory://", store_prefix, clock, journal=True) as far,
        store_servers() as serve,
        Site(serve(far.ext.store(far.app)), "", clock, timeout=PATIENCE, max_per_user=1) as near,
    ):
        near.visitor().run(sign_in)
        visitor = near.visitor()
        visitor.run(sign_in)
        visitor.run(sign_out)
        near.visitor().run(sign_in)
        with near.app.app_context():
            near.ext.users.revoke_all("ada", reason="stolen laptop", by="grace")
        assert ends(far) == [
            ("ada", "limit", None),
            ("ada", "logged out", "ada"),
            ("ada", "stolen laptop", "grace"),
        ]


def test_one_of_two_parallel_imports_is_refused(
    store_prefix: str, clock: FakeClock, tmp_path: Path
) -> None:
    old = OldFiles(tmp_path / "old")
    with Site("memory://", store_prefix, clock, config=old.config, journal=True) as site:
        first, second = site.visitor(), site.visitor()
        sid = old.add(_user_id="ada", cart=1)
        for each in (first, second):
            each.set_cookie("session", sid)
        site.store.before("load", lambda: site.store.after("load", lambda: second.run(dict)))
        first.run(put)
        assert first.run(lambda session: session.handle) == second.run(
            lambda session: session.handle
        )
        assert [reason for _, reason, _ in ends(site)] == ["refused"]
