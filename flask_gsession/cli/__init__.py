"""``flask gsession``: manage the sessions of an application.

To add a command, add a file here and a line at the end of this one.
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
from .edge import edge
from .journal import events
from .migrate import migrate
from .revoke import revoke
from .serve import serve
from .sessions import list_, show
from .stats import stats
from .users import users

# This warning concerns server workers, not a command in its own process.
_WORKER_WARNING = "Rate limits count in each process separately"


class _Group(AppGroup):
    """Reports a wrong setting or unwritable output as a message instead of a traceback.

    The application is created inside ``invoke``.
    """

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:  # >&-
            raise click.ClickException("standard output is closed")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _WORKER_WARNING)
                return super().invoke(ctx)
        except SettingError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # click handles it
                raise
            if sys.__stdout__ is sys.stdout and sys.__stdout__ is not None:
                with suppress(OSError):
                    sys.__stdout__.close()  # otherwise Python flushes it at exit, with an error
            raise click.ClickException(f"{error.strerror or error}") from None


gsession = _Group("gsession", help="Inspect, end, move and clean up sessions.")
gsession.add_command(cleanup)
gsession.add_command(debug)
gsession.add_command(doctor)
gsession.add_command(edge)
gsession.add_command(events)
gsession.add_command(export)
gsession.add_command(import_)
gsession.add_command(list_)
gsession.add_command(migrate)
gsession.add_command(revoke)
gsession.add_command(serve)
gsession.add_command(show)
gsession.add_command(stats)
gsession.add_command(users)
