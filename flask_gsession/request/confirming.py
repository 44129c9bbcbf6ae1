"""When the user of a session last confirmed who they are, and how: its key ``_confirmed``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from .lifecycle import CONFIRMED, Lifecycle
from .ownership import signed_in_at

#: The method of a sign-in that a library reports without saying how the user proved it.
SIGN_IN = "sign-in"
_LONGEST = 40  # characters


def note_confirmation(session: MutableMapping[str, Any], life: Lifecycle, method: str) -> None:
    """The user has just confirmed who they are. The token is to be rotated without grace, too."""
    session[CONFIRMED] = {**_times(session), method: life.repository.now()}


def confirmed_at(
    session: Mapping[str, Any], life: Lifecycle, methods: Collection[str] | None
) -> int | None:
    """The time of the last confirmation by one of the methods, in milliseconds; None: by any."""
    times = _times(session)
    if session.get("_fresh") is not False:  # Flask-Login's; with False, it doubts the sign-in
        at = signed_in_at(life)
        if at is not None:
            times[SIGN_IN] = max(at, times.get(SIGN_IN, 0))
    return max(
        (at for each, at in times.items() if methods is None or each in methods), default=None
    )


def checked_method(method: object) -> str:
    """Raises ``ValueError`` unless ``method`` can name one."""
    if not isinstance(method, str) or not 0 < len(method) <= _LONGEST or not _is_plain(method):
        raise ValueError(
            f"method is {ascii(method)[:60]}; allowed: 1 to {_LONGEST} printable ASCII characters "
            'without blanks and quotes, such as "password" or "passkey"'
        )
    return method


def checked_methods(method: object) -> tuple[str, ...] | None:
    """The same of one, of several, or of None for any."""
    if method is None:
        return None
    if isinstance(method, str):
        return (checked_method(method),)
    if not isinstance(method, (list, tuple, set, frozenset)) or not method:
        raise ValueError("method is a name, a list of names, or None for any")
    return tuple(map(checked_method, method))


def _is_plain(method: str) -> bool:
    return method.isascii() and method.isprintable() and not set(method) & set(" \"\\'")


def _times(session: Mapping[str, Any]) -> dict[str, int]:
    found = session.get(CONFIRMED)
    if not isinstance(found, dict):
        return {}
    return {method: at for method, at in found.items() if type(at) is int}
