"""``flask gsession edge``: the changes that wait at this node for its centre."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

import click
from flask.cli import with_appcontext

from ..errors import StoreUnavailable
from ..interface import GSessionInterface
from ..stores.parts import Edge, parts_of
from .common import choose_interface, json_option, print_store, session_name, session_option


@click.group(short_help="Show or settle the changes that wait at an edge node.")
def edge() -> None:
    """Show or settle the changes that wait at an edge node for its centre."""


@edge.command(short_help="Show the waiting changes.")
@session_option
@json_option
@with_appcontext
def status(cookie: str | None, as_json: bool) -> None:
    """Show the changes that wait for the centre, and whether the centre answers."""
    interface = choose_interface(cookie)
    part = _edge(interface)
    print_store(interface)
    try:
        part.centre.load("flask-gsession-edge-status".ljust(43, "-"))
        centre = "answers"
    except StoreUnavailable as error:
        centre = f"can't be reached: {error.detail}"
    try:
        figures = part.figures()
    except StoreUnavailable as error:
        raise click.ClickException(error.detail) from None
    shown = {
        "centre": centre,
        "node": figures.node,
        "ends waiting": figures.ends,
        "changes waiting": figures.changes,
        "oldest": _time(figures.oldest_at),
        "all settled": _time(figures.settled_at),
        "settled so far": figures.settled,
        "given up so far": figures.dropped,  # keeps its name in JSON
        "trouble": figures.trouble or None,
    }
    if as_json:
        named = {name.replace(" ", "_"): value for name, value in shown.items()}
        click.echo(json.dumps(named, indent=2))
        return
    for name, value in shown.items():
        label = name.replace("given up", "dropped")
        click.echo(f"{label:<16} {'-' if value is None else value}")


@edge.command(short_help="Settle with the centre now.")
@session_option
@with_appcontext
def sync(cookie: str | None) -> None:
    """Settle with the centre now. Exits with 1 if something still waits."""
    interface = choose_interface(cookie)
    part = _edge(interface)
    print_store(interface)
    try:
        settled = part.settle()
        figures = part.figures()
    except StoreUnavailable as error:
        raise click.ClickException(error.detail) from None
    if settled is None:
        click.echo("Another process of this node is settling now.")
        return
    click.echo(
        f"Settled {settled.ends} ends and {settled.changes} changed sessions; "
        f"{settled.dropped} were dropped, because they had ended or couldn't be read."
    )
    if settled.trouble:
        click.echo(settled.trouble, err=True)
    if figures.ends or figures.changes:
        click.echo(f"{figures.ends} ends and {figures.changes} changed sessions wait.", err=True)
    sys.exit(bool(settled.trouble or figures.ends or figures.changes))


def _edge(interface: GSessionInterface) -> Edge:
    part = parts_of(interface.store).edge
    if part is None:
        raise click.ClickException(
            f"{session_name(interface)}: the store is not an edge; on an edge node, SESSION_STORE "
            "begins with edge+sqlite:///"
        )
    return part


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(" ", "seconds")
