"""The store checks of ``flask gsession doctor``."""

from __future__ import annotations

import re
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from ..errors import (
    CutOff,
    Gone,
    KeyTaken,
    LogoutUnconfirmed,
    SettingError,
    Stale,
    StoreError,
    StoreUnavailable,
)
from ..stores.base import (
    Clock,
    Deleted,
    Record,
    Store,
    is_store,
    milliseconds,
    new_version,
    unexpired,
)
from ..stores.parts import Blobs, Finding, parts_of

_ROUNDS = 100
_MAX_SECONDS = 1.0  # for all rounds together
_SLOW = 50.0  # milliseconds
_SHORT_LIFE = 30  # milliseconds
_NO_LARGE_VALUES = (
    "Values larger than SESSION_SPILL_BYTES cause 503 or are lost: check the permissions and the "
    "free space there."
)
_NO_RIGHT = re.compile(
    "lacks|no ?permission|Unauthorized", re.IGNORECASE
)  # in the error of any server
_LIFE = 60_000  # milliseconds, in case a broken store doesn't delete our records


def check_store(
    store: Store, clock: Clock = time.time, blobs: Blobs | None = None
) -> list[Finding]:
    """Try all operations of ``store`` with throw-away keys, and query its server's settings.

    ``clock``: the store's clock, in seconds since 1970. ``blobs``: where large values are stored,
    if not in the store. Reports a failing store as findings instead of raising. Takes about two
    hundred round trips, a few seconds at most.
    """
    parts = parts_of(store)
    try:
        findings = [*_contract(store, clock)]
        if all(finding.severity == "ok" for finding in findings):
            if parts.blobs is not None:
                findings.append(_large_values("large values", parts.blobs, clock))
            if blobs is not None:
                findings.append(_large_values("storage of large values", blobs, clock))
            findings += _latencies(store, clock)
    except CutOff:
        findings = []  # an edge's checks report it
    except (StoreError, SettingError) as error:
        detail = getattr(error, "detail", "") or f"{type(error).__name__} {error}"
        advice = "Check that it is running, and that its URL is correct."
        if _NO_RIGHT.search(detail):
            advice = (
                "The store answers: grant its user that permission, or use another user in the URL."
            )
        findings = [Finding("error", "answers", detail, advice)]
    for checks in (parts.checks, parts_of(blobs).checks):
        if checks is not None:
            with suppress(StoreError, SettingError):  # a permanent failure is reported above
                findings += checks.check()
    return findings


def _contract(store: Store, clock: Clock) -> Iterator[Finding]:
    record = _record(clock)
    now = record.created_at
    changed = record._replace(version=new_version(), payload=secrets.token_bytes(64))
    other = changed._replace(version=new_version())
    past = record._replace(key=_key(), created_at=now - 2, idle_expires_at=now - 1)
    written = False

    def create() -> None:
        nonlocal written
        written = True
        store.create(record)

    steps: list[tuple[str, Callable[[], object]]] = [
        ("answers", lambda: store.load(_key()) is None),
        ("writes", create),
        ("reads what was written", lambda: store.load(record.key) == record),
        ("creates once", _raises(KeyTaken, lambda: store.create(changed))),
        ("saves", lambda: store.save(changed, record.version)),
        ("refuses a stale save", _raises(Stale, lambda: store.save(other, record.version))),
        ("reads what was saved", lambda: store.load(record.key) == changed),
        ("lets expire", lambda: _expires(store, past, now)),
        ("deletes", lambda: _deletes(store, record.key)),
        ("keeps ended sessions ended", _raises(Gone, lambda: store.save(other, changed.version))),
    ]
    try:
        for name, step in steps:
            try:
                done, found = step() is not False, ""
            except StoreUnavailable:
                raise
            except StoreError as error:
                done, found = False, f"{type(error).__name__} {error}".strip()
            if done:
                yield Finding("ok", name)
            else:
                yield Finding("error", name, found or "it does not", "Don't use this store.")
                return
    finally:
        for key in (record.key, past.key) if written else ():
            with suppress(StoreError):  # it expires within a minute anyway
                store.delete(key)


def _large_values(check: str, blobs: Blobs, clock: Clock) -> Finding:
    """Check that a large value can be written, read, renewed and discarded."""
    now = milliseconds(clock)
    name, other = secrets.token_hex(16), secrets.token_hex(16)
    frames = [secrets.token_bytes(1000), secrets.token_bytes(10)]

    def write() -> None:
        for offset, frame in zip((0, len(frames[0])), frames, strict=True):
            blobs.write_frame(name, offset, frame, now + _LIFE // 2)
        blobs.write_frame(other, 0, frames[1], now + _LIFE)

    def is_there() -> bool:
        first, second = frames
        return (
            blobs.read_frame(name, 0, len(first)) == first
            and blobs.read_frame(name, len(first), len(second)) == second
        )

    def renew() -> bool:
        blobs.renew_blobs([name], now + _LIFE)
        return is_there()

    steps: list[tuple[str, Callable[[], object]]] = [
        ("written", write),
        ("read", is_there),
        ("renewed", renew),
        ("discarded", lambda: _is_gone(blobs, name, now)),
        ("expired", lambda: _blob_expires(blobs, other, len(frames[1]), clock)),
    ]
    try:
        for what, step in steps:
            try:
                done, found = step() is not False, ""
            except StoreError as error:
                done = False
                found = f": {getattr(error, 'detail', '') or type(error).__name__}"
            if not done:
                return Finding("error", check, f"they can't be {what}{found}", _NO_LARGE_VALUES)
        return Finding("ok", check)
    finally:
        with suppress(StoreError):  # they expire within a minute anyway
            blobs.discard_blobs([name, other], now)


def _is_gone(blobs: Blobs, name: str, now: int) -> bool:
    blobs.discard_blobs([name], now)
    return blobs.read_frame(name, 0, 1) is None


def _blob_expires(blobs: Blobs, name: str, size: int, clock: Clock) -> bool:
    """Whether a blob expires by itself. Files don't; a clean-up removes them."""
    if parts_of(blobs).upkeep is not None and not is_store(blobs):
        return True
    now, start = milliseconds(clock), time.monotonic()
    blobs.discard_blobs([name], now + _SHORT_LIFE)
    while blobs.read_frame(name, 0, size) is not None:
        waited = time.monotonic() - start
        stopped = milliseconds(clock) == now  # with a test's clock, nothing expires
        if waited > (_SHORT_LIFE / 1000 if stopped else _MAX_SECONDS):
            return stopped
        time.sleep(_SHORT_LIFE / 2000)
    return True


def _latencies(store: Store, clock: Clock) -> Iterator[Finding]:
    yield _latency("latency", "a load", lambda: store.load(_key()))
    record = _record(clock)
    store.create(record)

    def save() -> None:
        nonlocal record
        before, record = record, record._replace(version=new_version())
        store.save(record, before.version)

    try:
        yield _latency("write latency", "a save", save)
    finally:
        with suppress(StoreError):
            store.delete(record.key)


def _latency(check: str, what: str, call: Callable[[], object]) -> Finding:
    times: list[float] = []
    end = time.monotonic() + _MAX_SECONDS
    while len(times) < 2 or (len(times) < _ROUNDS and time.monotonic() < end):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    found = (
        f"{what} takes {cuts[49]:.2f} ms, 95 % at most {cuts[94]:.2f}, 99 % at most {cuts[98]:.2f} "
        f"({len(times)} calls)"
    )
    if cuts[49] < _SLOW:
        return Finding("ok", check, found)
    return Finding("warning", check, found, "Every request with a session waits this long.")


def _expires(store: Store, record: Record, now: int) -> bool:
    store.create(record)
    if unexpired(store, record.key, now) is not None:
        return False
    back = record._replace(
        version=new_version(), idle_expires_at=now + _LIFE, absolute_expires_at=now + _LIFE
    )
    return _raises(Gone, lambda: store.save(back, record.version))()


def _deletes(store: Store, key: str) -> bool:
    deleted = store.delete(key)
    if isinstance(deleted, Deleted) and deleted.unconfirmed:
        raise LogoutUnconfirmed(deleted.unconfirmed)
    return bool(deleted)


def _record(clock: Clock) -> Record:
    now = milliseconds(clock)
    return Record(_key(), new_version(), now, now + _LIFE, now + _LIFE, secrets.token_bytes(64))


def _key() -> str:
    return secrets.token_urlsafe(32)


def _raises(kind: type[StoreError], step: Callable[[], object]) -> Callable[[], bool]:
    def tried() -> bool:
        try:
            step()
        except kind:
            return True
        return False

    return tried
