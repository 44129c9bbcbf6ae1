"""``flask gsession doctor``."""

from __future__ import annotations

import json
import sys

import click
from flask import current_app
from flask.cli import with_appcontext

from ..operate.health import check_store
from ..operate.health_application import check_application, check_offline_for
from ..operate.health_journal import check_journal
from ..operate.health_users import check_users
from ..operate.near_cache import check_near_cache
from ..stores.parts import parts_of
from .common import interfaces, print_store, without_journal
from .output import lines

_INDENT = 9  # characters
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of lines of text.")
@with_appcontext
def doctor(as_json: bool) -> None:
    """Check the store, the cookie and the secret key.

    Writes only throw-away keys to the store, never your sessions. Exits with 1 if there is an
    error, and with 0 if there are only warnings.
    """
    all_of_them = interfaces()
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
    rows = []
    for interface in all_of_them.values():
        print_store(interface)
        repository = interface.repository
        settings, large_values = repository.settings, repository.large.storage
        elsewhere = (
            None if large_values is None or settings.spill_store is None else large_values.blobs
        )
        found = [
            *check_application(app, interface, settings, repository.live.permanent_lifetime()),
            *check_store(without_journal(interface), repository.clock, elsewhere),
            *check_journal(repository),
        ]
        found += check_users(repository, found, hasattr(app, "login_manager"))
        if repository.edge is not None:
            found.append(check_offline_for(repository.edge, settings))
        changes = parts_of(interface.store).changes
        if repository.near is not None and changes is not None:
            found.append(check_near_cache(changes, repository.near.bound))
        cookie = repository.live.cookie_name()
        rows += [{"session": cookie, **finding._asdict()} for finding in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            severity = click.style(f"{row['severity']:<8}", fg=_COLOURS[row["severity"]])
            text = ": ".join(filter(None, [row["check"], row["found"]]))
            where = f"[{row['session']}] " if len(all_of_them) > 1 else ""
            click.echo(f"{severity} {lines(where + text, _INDENT)}")
            if row["advice"]:
                click.echo(" " * _INDENT + lines(row["advice"], _INDENT))
    sys.exit(any(row["severity"] == "error" for row in rows))
