"""What the commands have in common."""

from __future__ import annotations

import click
from flask import current_app

from ..extension import NAME, Session
from ..interface import GSessionInterface


def interfaces() -> dict[Session, GSessionInterface]:
    """Every ``Session`` of the application; ends the command where there is none."""
    found: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
    if not found:
        raise click.ClickException("The application has no Session: call Session(app) first.")
    return found
