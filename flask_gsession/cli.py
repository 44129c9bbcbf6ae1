"""``flask gsession``: what an administrator asks of the sessions of an application."""

from __future__ import annotations

import json
import sys

import click
from flask import current_app
from flask.cli import AppGroup

from .errors import StoreUnavailable
from .extension import NAME, Session
from .health import check_application, check_store
from .interface import GSessionInterface
from .stores import Sweeps

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}

gsession = AppGroup("gsession", help="Look after the sessions of the application.")


@gsession.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of lines of text.")
def doctor(as_json: bool) -> None:
    """Check the store, the cookie and the secret key.

    Tries the store with throw-away keys; sessions are not touched. The exit status is 1 where
    there is an error, else 0, also with warnings.
    """
    interfaces = _interfaces()
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
    rows = []
    for interface in interfaces.values():
        found = check_application(app, interface) + check_store(
            interface.store, interface.keeper._clock
        )
        cookie = interface.keeper.settings.cookie_name
        rows += [{"session": cookie, **finding._asdict()} for finding in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            severity = click.style(f"{row['severity']:<8}", fg=_COLOURS[row["severity"]])
            text = ": ".join(filter(None, [row["check"], row["found"]]))
            where = f"[{row['session']}] " if len(interfaces) > 1 else ""
            click.echo(f"{severity} {where}{text}")
            if row["advice"]:
                click.echo(f"         {row['advice']}")
    sys.exit(any(row["severity"] == "error" for row in rows))


@gsession.command()
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="How many to remove in one step.",
)
def cleanup(batch: int) -> None:
    """Remove expired sessions, where the store does not do so itself.

    Each batch is a step of its own: interrupted, it has removed what it says, and goes on when it
    is called again.
    """
    for interface in _interfaces().values():
        name = interface.keeper.settings.cookie_name
        store = interface.store
        if not isinstance(store, Sweeps):
            click.echo(f"{name}: nothing to do, this store lets go of expired sessions itself")
            continue
        removed = 0
        try:
            while True:
                step = store.sweep(batch)
                removed += step
                if step < batch:
                    break
        except StoreUnavailable as error:
            raise click.ClickException(
                f"{name}: the store failed after {removed} sessions: {error}"
            ) from None
        except KeyboardInterrupt:
            click.echo(f"{name}: interrupted, {removed} expired sessions removed so far", err=True)
            raise
        click.echo(f"{name}: {removed} expired sessions removed")


def _interfaces() -> dict[Session, GSessionInterface]:
    interfaces: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
    if not interfaces:
        raise click.ClickException("The application has no Session: call Session(app) first.")
    return interfaces
