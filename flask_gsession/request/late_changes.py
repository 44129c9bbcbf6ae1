"""Reports changes that come too late to be saved."""

from __future__ import annotations

from ..errors import ValueRefused
from ..events import logger
from .lifecycle import Lifecycle
from .rebasing import changed_when_abandoned

_TOO_LATE = (
    "%s was changed after the session had been saved with the response: the change is lost. Write "
    "to the session before the response is returned, and before a streamed body starts."
)
_AFTER_THE_BLOCK = (
    "%s was changed after the block of ext.open() had saved the session: the change is lost. Write "
    "to the session inside the block."
)


def report_late(life: Lifecycle, what: str, *details: str) -> None:
    """Log, once, that a change is lost because the session is already saved.

    Tests that look at a finished request get no message, as with Flask's own session.
    """
    if life.reported is None:
        life.reported = set()
    what %= tuple(detail[:60] for detail in details)
    environ = {} if life.request is None else life.request.environ
    if what not in life.reported and "werkzeug.debug.preserve_context" not in environ:
        life.reported.add(what)
        logger.error(_TOO_LATE if life.request is not None else _AFTER_THE_BLOCK, what)


def late_changes(life: Lifecycle) -> list[str]:
    """The keys of values that were changed in place after the session was saved."""
    if not life.opened:
        return []
    try:
        return list(life.pending())
    except ValueRefused as error:
        return [error.path]


def report_abandoned(life: Lifecycle) -> None:
    """Log changes of objects that no longer belonged to the session."""
    for key in changed_when_abandoned(life.values):
        logger.error(
            "session[%a] was changed through an object that left the session with a transaction, a "
            "lock, a reload or an update: the change is lost. Get the object from the session "
            "again after that.",
            key[:60],
        )
