"""Hides the values of a session in logs and command output.

Shows a value only if its key is declared, and neither a name nor a type in it suggests a secret. Of
other values, shows only the type.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

HIDDEN = "<hidden>"

_SECRET = re.compile(
    "pass|pwd|token|secret|csrf|xsrf|key|cred|auth(?!ors?(?![a-z]))|bearer|cookie|jwt|nonce|otp|salt|hash"
    "|signature|private|verifier|card|cvv|cvc|iban|ssn|(?<![a-z])(pin|pw|sid|dsn)(?![a-z])"
    "|(verif[a-z]{0,9}|confirm[a-z]{0,9}|reset|backup|recovery|login|sms|mfa|2fa|access)"
    "[_ -]?codes?",
    re.IGNORECASE,
)
# Matches text that is long enough to be random. Clients can choose names, so no pattern backtracks.
_LONG, _LONG_PART = re.compile(r"[\w-]{16,}", re.ASCII), re.compile("[A-Za-z0-9]{16,}")
_DIGIT, _CAPITAL = re.compile("[0-9]"), re.compile("[A-Z]")
_PLAIN = {int, float, bool, type(None), Decimal, UUID}
_PLAIN |= {dt.datetime, dt.date, dt.time, dt.timedelta}
_BRACKETS: dict[type, str] = {list: "[]", tuple: "()", set: "{}", frozenset: "{}"}
_MAX_NAME, _MAX_TEXT, _MAX_ITEMS, _MAX_DEPTH = 60, 100, 10, 4
_MAX_BITS = 2000  # of a number in decimal; Python refuses to convert very long ones


def is_secret(name: str) -> bool:
    """Whether the name suggests a secret."""
    return _SECRET.search(name) is not None


def shown_name(key: str) -> str:
    """A session key for a log: on one line, shortened, and without parts that look random.

    Some packages put a secret into the key itself, such as Authlib's login state.
    """
    name = _LONG.sub(_shortened, key)
    text = ascii(name)[1:-1]
    return text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..."


def _shortened(found: re.Match[str]) -> str:
    """The matched characters, cut if they look random."""
    text = found[0]
    if len(text) >= 20 and _DIGIT.search(text) and _CAPITAL.search(text):
        return text[:4] + "..."
    return _LONG_PART.sub(_shortened_part, text)


def _shortened_part(found: re.Match[str]) -> str:
    text = found[0]
    return text[:4] + "..." if len(text) >= 32 or _DIGIT.search(text) else text


def shown_value(key: str, value: Any, declared: Collection[str]) -> str:
    """The value as text if its key is ``declared``, else ``HIDDEN``."""
    if key not in declared or is_secret(key):
        return HIDDEN
    return _shown(value, _MAX_DEPTH)


def _shown(value: Any, depth: int) -> str:
    kind = type(value)
    if isinstance(value, str):
        more = "..." if len(value) > _MAX_TEXT else ""
        return ascii(str(value[:_MAX_TEXT])) + more
    if kind is int and value.bit_length() > _MAX_BITS:
        return hex(value)[:_MAX_TEXT]
    if kind in _PLAIN:
        return str(value)[:_MAX_TEXT]
    if kind is dict:
        return _bracketed(
            "{}",
            value,
            (
                f"{shown_name(str(name))!r}: "
                + (HIDDEN if is_secret(str(name)) else _deeper(item, depth))
                for name, item in islice(value.items(), _MAX_ITEMS)
            ),
        )
    if kind in _BRACKETS:
        items = (_deeper(item, depth) for item in islice(value, _MAX_ITEMS))
        return _bracketed(_BRACKETS[kind], value, items)
    return HIDDEN


def _deeper(value: Any, depth: int) -> str:
    return _shown(value, depth - 1) if depth else "..."


def _bracketed(brackets: str, value: Any, items: Iterable[str]) -> str:
    more = ", ..." if len(value) > _MAX_ITEMS else ""
    return f"{brackets[0]}{', '.join(items)}{more}{brackets[1]}"
