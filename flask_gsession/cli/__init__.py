"""``flask gsession``: what an administrator asks of the sessions of an application.

A command is a file here, and a line below.
"""

from __future__ import annotations

from flask.cli import AppGroup

from .cleaning import cleanup
from .debug import debug
from .doctor import doctor
from .sessions import list_, revoke, show, stats
from .transfer import export, import_

gsession = AppGroup("gsession", help="Look after the sessions of the application.")
gsession.add_command(cleanup)
gsession.add_command(debug)
gsession.add_command(doctor)
gsession.add_command(export)
gsession.add_command(import_)
gsession.add_command(list_)
gsession.add_command(revoke)
gsession.add_command(show)
gsession.add_command(stats)
