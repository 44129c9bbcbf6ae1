"""When and how the user last confirmed who they are: the session's key ``_confirmed``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from ..events import UserConfirmed
from .lifecycle import CONFIRMED, Lifecycle
from .ownership import device_id_of, user_id_of

#: The method for a sign-in, if the library doesn't say how the user proved who they are.
SIGN_IN = "sign-in"
_LONGEST = 40  # characters


def note_confirmation(session: MutableMapping[str, Any], life: Lifecycle, method: str) -> None:
    """Note that the user has just confirmed who they are. The caller rotates without grace."""
    session[CONFIRMED] = {**_times(session), method: life.repository.now()}
    report_confirmation(life, method)


def report_confirmation(life: Lifecycle, method: str) -> None:
    user_id, device_id = user_id_of(life), device_id_of(life)
    life.repository.events.emit(UserConfirmed, user_id, device_id, life.handle, method)


def confirmed_at(
    session: Mapping[str, Any], signed_in: int | None, methods: Collection[str] | None
) -> int | None:
    """When the user last confirmed by one of ``methods`` (None: any), in milliseconds.

    ``signed_in``: when the user signed in; None if a remember-me cookie did it instead.
    """
    times = _times(session)
    # Flask-Login sets False after a remember-me sign-in.
    if signed_in is not None and session.get("_fresh") is not False:
        times[SIGN_IN] = max(signed_in, times.get(SIGN_IN, 0))
    return max(
        (at for each, at in times.items() if methods is None or each in methods), default=None
    )


def checked_method(method: object) -> str:
    """Raises ``ValueError`` unless ``method`` is a valid name."""
    if not isinstance(method, str) or not 0 < len(method) <= _LONGEST or not _is_plain(method):
        raise ValueError(
            f"method is {ascii(method)[:60]}; allowed: 1 to {_LONGEST} printable ASCII characters "
            'without blanks and quotes, such as "password" or "passkey"'
        )
    return method


def checked_methods(method: object) -> tuple[str, ...] | None:
    """Like ``checked_method``, for one name, several, or None for any."""
    if method is None:
        return None
    if isinstance(method, str):
        return (checked_method(method),)
    if not isinstance(method, (list, tuple, set, frozenset)) or not method:
        raise ValueError("method must be a name, a list of names, or None for any")
    return tuple(map(checked_method, method))


def _is_plain(method: str) -> bool:
    return method.isascii() and method.isprintable() and not set(method) & set(" \"\\'")


def _times(session: Mapping[str, Any]) -> dict[str, int]:
    found = session.get(CONFIRMED)
    if not isinstance(found, dict):
        return {}
    return {method: at for method, at in found.items() if type(at) is int}
