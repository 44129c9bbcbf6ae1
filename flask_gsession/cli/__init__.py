"""``flask gsession``: what an administrator asks of the sessions of an application.

A command is a file here, and a line below.
"""

from __future__ import annotations

import errno
import sys
import warnings
from contextlib import suppress
from typing import Any

import click
from flask.cli import AppGroup

from ..errors import SettingError
from .archive import export, import_
from .cleaning import cleanup
from .debug import debug
from .doctor import doctor
from .sessions import list_, revoke, show, stats

# What is said of the workers of a server, and is none of a command's business.
_OF_WORKERS = "Rate limits count in each process for itself"


class _Group(AppGroup):
    """Ends a command with a message where nobody takes what it prints, or a setting is wrong.

    The application is made inside of it.
    """

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:  # >&-
            raise click.ClickException("the standard output is closed")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _OF_WORKERS)
                return super().invoke(ctx)
        except SettingError as error:
            raise click.ClickException(str(error)) from None
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
