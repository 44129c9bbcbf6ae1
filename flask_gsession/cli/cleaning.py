"""``flask gsession cleanup``."""

from __future__ import annotations

import click
from flask.cli import with_appcontext

from ..errors import StoreUnavailable
from ..stores import Sweeps
from .common import interfaces


@click.command()
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="How many to remove in one step.",
)
@with_appcontext
def cleanup(batch: int) -> None:
    """Remove expired sessions, where the store does not do so itself.

    Each batch is a step of its own: interrupted, it has removed what it says, and goes on when it
    is called again.
    """
    for interface in interfaces().values():
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
