"""The URL of an edge: its file, its centre, and how long it may work offline."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from ...errors import SettingError
from .store import FRESH_FOR, OFFLINE_FOR, OUTBOX

SCHEME = "edge+sqlite"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST = 30 * 86_400  # seconds
_MOST = 10_000_000
_FORM = (
    "write edge+sqlite:///edge.sqlite3?remote=redis%3A%2F%2Flocalhost%3A6379%2F0&offline_for=15m, "
    "with the URL of the centre percent-encoded"
)


class EdgeAddress(NamedTuple):
    """``file``: the sqlite URL of the node's file. ``remote``: the URL of the centre's store."""

    file: str
    remote: str
    offline_for: float = OFFLINE_FOR
    outbox: int = OUTBOX
    fresh_for: float = FRESH_FOR

    def __repr__(self) -> str:
        """Without the remote URL, which may hold a password."""
        return f"EdgeAddress({self.file!r})"

    @classmethod
    def of(cls, url: str) -> EdgeAddress:
        """Read an ``edge+sqlite:`` URL. Raises ``SettingError``, which shows only names."""
        try:
            parts = urlsplit(url)
            given = parse_qsl(parts.query, strict_parsing=True, keep_blank_values=True)
        except ValueError:
            raise _wrong(f"can't be read; {_FORM}") from None
        if parts.netloc or not parts.path.strip("/"):
            raise _wrong(f"names no file; {_FORM}")
        options = dict(given)
        if len(options) < len(given):
            raise _wrong("names an option twice")
        allowed = ("remote", "offline_for", "outbox", "fresh_for")
        for name in options.keys() - set(allowed):
            raise _wrong(
                f"has the option {name[:40]!r}; allowed: {', '.join(allowed)}. Options of the "
                "remote belong in its own URL, percent-encoded"
            )
        remote = options.get("remote", "")
        if ":" not in remote:
            raise _wrong(f"has no remote; {_FORM}")
        if remote.lower().startswith(("edge+", "memory:")):
            raise _wrong(
                "has a remote that is an edge or the memory of one process: the centre must be a "
                "store that all nodes share"
            )
        file = f"sqlite:{url.partition(':')[2].partition('?')[0].partition('#')[0]}"
        return cls(
            file,
            remote,
            _seconds("offline_for", options, OFFLINE_FOR, 1),
            _number("outbox", options, OUTBOX),
            _seconds("fresh_for", options, FRESH_FOR, 0),
        )


def _seconds(name: str, options: dict[str, str], default: float, least: float) -> float:
    text = options.get(name)
    if text is None:
        return default
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)", text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else -1.0
    if not least <= seconds <= _LONGEST:
        raise _wrong(f"has {name}={text[:20]!r}; allowed are 90, 90s, 15m, 2h or 1d, up to 30d")
    return seconds


def _number(name: str, options: dict[str, str], default: int) -> int:
    text = options.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,8}", text) or not 1 <= int(text) <= _MOST:
        raise _wrong(f"has {name}={text[:20]!r}; allowed are 1 to {_MOST} sessions")
    return int(text)


def _wrong(why: str) -> SettingError:
    return SettingError(f"SESSION_STORE is an edge URL that {why}")
