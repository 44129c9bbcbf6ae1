"""The checks behind ``flask gsession doctor``: is the store well, is it set up right?"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from .errors import Gone, KeyTaken, SettingError, Stale, StoreError, StoreUnavailable
from .stores.base import (
    Checks,
    Clock,
    Finding,
    Record,
    Store,
    milliseconds,
    new_version,
    unexpired,
)

_ROUNDS = 100
_LONGEST = 1.0  # seconds, for all rounds together
_SLOW = 50.0  # milliseconds
_LIFE = 60_000  # milliseconds, of what a broken store does not delete again


def check_store(store: Store, clock: Clock = time.time) -> list[Finding]:
    """Try what sessions need of ``store``, with throw-away keys, and ask its server.

    ``clock``: the store's own, in seconds since 1970. Never raises for a store that is not well;
    that is what the findings are for. About two hundred round trips, for some seconds at most.
    """
    try:
        findings = [*_contract(store, clock)]
        if all(finding.severity == "ok" for finding in findings):
            findings += _latencies(store, clock)
    except (StoreError, SettingError) as error:
        detail = getattr(error, "detail", "") or f"{type(error).__name__} {error}"
        findings = [Finding("error", "answers", detail, "Is it running, and is its URL right?")]
    if isinstance(store, Checks):
        with suppress(StoreError, SettingError):  # which was found above, or is new and passing
            findings += store.check()
    return findings


def _contract(store: Store, clock: Clock) -> Iterator[Finding]:
    record = _record(clock)
    now = record.created_at
    changed = record._replace(version=new_version(), payload=secrets.token_bytes(64))
    other = changed._replace(version=new_version())
    past = record._replace(key=_key(), created_at=now - 2, idle_expires_at=now - 1)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("answers", lambda: store.load(_key()) is None),
        ("writes", lambda: store.create(record)),
        ("reads what was written", lambda: store.load(record.key) == record),
        ("creates once", _raises(KeyTaken, lambda: store.create(changed))),
        ("saves", lambda: store.save(changed, record.version)),
        ("refuses a stale save", _raises(Stale, lambda: store.save(other, record.version))),
        ("reads what was saved", lambda: store.load(record.key) == changed),
        ("lets expire", lambda: _expires(store, past, now)),
        ("deletes", lambda: store.delete(record.key)),
        ("keeps the dead dead", _raises(Gone, lambda: store.save(other, changed.version))),
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
                yield Finding("error", name, found or "it does not", "Do not trust it.")
                return
    finally:
        for key in (record.key, past.key):
            with suppress(StoreError):  # then it expires within the minute
                store.delete(key)


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
    end = time.monotonic() + _LONGEST
    while len(times) < 2 or (len(times) < _ROUNDS and time.monotonic() < end):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    found = (
        f"{what} takes {cuts[49]:.2f} ms, 95 % at most {cuts[94]:.2f}, 99 % at most {cuts[98]:.2f} "
        f"({len(times)} of them)"
    )
    if cuts[49] < _SLOW:
        return Finding("ok", check, found)
    return Finding("warning", check, found, "Every request with a session waits for it.")


def _expires(store: Store, record: Record, now: int) -> bool:
    store.create(record)
    if unexpired(store, record.key, now) is not None:
        return False
    back = record._replace(
        version=new_version(), idle_expires_at=now + _LIFE, absolute_expires_at=now + _LIFE
    )
    return _raises(Gone, lambda: store.save(back, record.version))()


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
