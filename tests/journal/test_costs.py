"""The cost of the journal: nothing while it is off, one more round trip for an end while on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tests.harness.apps import Site, SiteMaker
from tests.harness.console import ROOT

# A read, and the further calls of each request.
REQUESTS = {
    "create": lambda session: session.update(cart=[]),
    "read": dict,
    "save": lambda session: session.update(cart=["mug"]),
    "rotate": lambda session: session.rotate(grace=0),
    "logout": lambda session: session.destroy(),
}
SERVERS = ("redis", "mongodb")  # that count


def counted(site: Site) -> dict[str, Any]:
    """The round trips of each request."""
    for _ in range(2):  # at first, indexes are made and scripts are loaded
        visitor, trips = site.visitor(), {}
        for name, request in REQUESTS.items():
            with site.counted() as count:
                visitor.run(request)
            trips[name] = count.trips
    return trips


def traces(site: Site) -> str:
    """All that the server or the file holds besides sessions, as text."""
    inside: Any = site.inside
    if site.url.startswith("redis"):
        return str(list(inside.client.scan_iter(f"{site.prefix}*")))
    if site.url.startswith("mongodb"):
        indexes = inside.database["gsession"].index_information()
        return str((inside.database.list_collection_names(), indexes, inside.stored()))
    if site.url.startswith("sqlite"):
        return str(inside.rows("*", "sqlite_master"))
    return ""


def test_a_journal_that_is_off_costs_nothing(make_site: SiteMaker) -> None:
    site = make_site()
    off = counted(site)
    assert "journal" not in traces(site)
    assert "outbox" not in traces(site)
    if site.url.startswith(SERVERS):
        with_it = counted(make_site(journal=True))
        assert {name: with_it[name] - off[name] for name in off} == {
            **dict.fromkeys(off, 0),
            "logout": 1,
        }
        assert "journal" in traces(site)


def test_a_journal_that_is_off_is_not_imported() -> None:
    code = (
        "import sys, flask, flask_gsession\n"
        "app = flask.Flask('x')\n"
        "app.secret_key = 'key'\n"
        "flask_gsession.Session(app, store='memory://')\n"
        "app.add_url_rule('/', view_func=lambda: str(flask.session.update(a=1)))\n"
        "app.test_client().get('/')\n"
        "print([name for name in sys.modules if name.startswith('flask_gsession.journal')])\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert run.stdout == "[]\n"
