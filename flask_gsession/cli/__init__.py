"""``flask gsession``: what an administrator asks of the sessions of an application.

A command is a file here, and a line below.
"""

from __future__ import annotations

import errno
import sys
from contextlib import suppress
from typing import Any

import click
from flask.cli import AppGroup

from .cleaning import cleanup
from .debug import debug
from .doctor import doctor
from .sessions import list_, revoke, show, stats
from .transfer import export, import_


class _Group(AppGroup):
    """Ends a command with a message where nobody takes what it prints."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:  # >&-
            raise click.ClickException("the standard output is closed")
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:  # which click knows about
                raise
            if sys.__stdout__ is sys.stdout and sys.__stdout__ is not None:
                with suppress(OSError):
                    sys.__stdout__.close()  # or Python tries again at its end, and complains
            raise click.ClickException(f"{error.strerror or error}") from None


gsession = _Group("gsession", help="Look after the sessions of the application.")
gsession.add_command(cleanup)
gsession.add_command(debug)
gsession.add_command(doctor)
gsession.add_command(export)
gsession.add_command(import_)
gsession.add_command(list_)
gsession.add_command(revoke)
gsession.add_command(show)
gsession.add_command(stats)
