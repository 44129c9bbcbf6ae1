"""Flask's ``session.permanent`` among the encoded values of a session."""

from __future__ import annotations

from collections.abc import Mapping

PERMANENT = "_permanent"
_TRUE = b"\xc3"


def is_permanent(values: Mapping[str, bytes]) -> bool:
    """Whether ``session.permanent`` is set among these encoded values."""
    return values.get(PERMANENT) == _TRUE
