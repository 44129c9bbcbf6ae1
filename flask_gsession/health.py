"""The checks behind ``flask gsession doctor``: is the store well, is it set up right?"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from flask import Flask
from flask.sessions import SessionInterface

from .errors import Gone, KeyTaken, Stale, StoreError, StoreUnavailable
from .stores.base import Checks, Clock, Finding, Record, Store, milliseconds, new_version

_ROUNDS = 20
_SLOW = 0.05  # seconds
_LIFE = 60_000  # milliseconds, of what a broken store does not delete again
_SHORT_SECRET = 16  # bytes


def check_store(store: Store, clock: Clock = time.time) -> list[Finding]:
    """Try what sessions need of ``store``, with throw-away keys, and ask its server.

    ``clock``: the store's own, in seconds since 1970. Never raises for a store that is not well;
    that is what the findings are for. About fifty round trips.
    """
    try:
        findings = [*_contract(store, clock), _latency(store, clock)]
        if isinstance(store, Checks):
            findings += store.check()
    except StoreUnavailable as error:
        return [Finding("error", "answers", error.detail, "Is it running, and is its URL right?")]
    return findings


def check_application(app: Flask, interface: SessionInterface) -> list[Finding]:
    """What the application's secret key and cookie are like."""
    return [finding for finding in _application(app, interface) if finding]


def _contract(store: Store, clock: Clock) -> Iterator[Finding]:
    now = milliseconds(clock)
    record = Record(_key(), new_version(), now, now + _LIFE, now + _LIFE, secrets.token_bytes(64))
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
        ("lets expire", lambda: _expires(store, past)),
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


def _latency(store: Store, clock: Clock) -> Finding:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        store.load(_key())
        times.append(time.perf_counter() - start)
    median, high = statistics.median(times), max(times)
    found = f"a load takes {median * 1000:.2f} ms, at most {high * 1000:.2f} of {_ROUNDS}"
    if median < _SLOW:
        return Finding("ok", "latency", found)
    return Finding("warning", "latency", found, "Every request with a session waits for it.")


def _application(app: Flask, interface: SessionInterface) -> Iterator[Finding | None]:
    secret = app.secret_key
    if not secret:
        yield Finding(
            "error", "SECRET_KEY", "not set", "No session can be kept without: set a random one."
        )
    elif len(secret) < _SHORT_SECRET:
        yield Finding(
            "error",
            "SECRET_KEY",
            f"{len(secret)} characters",
            "Who guesses it can sign tokens: use secrets.token_urlsafe(32).",
        )
    if app.debug:
        yield Finding("warning", "debug", "on", "Never in production: it runs code for visitors.")
    if not interface.get_cookie_secure(app):
        yield Finding(
            "warning",
            "SESSION_COOKIE_SECURE",
            "off",
            "The cookie goes over plain HTTP, too: set it to True where the site has HTTPS.",
        )
    if not interface.get_cookie_httponly(app):
        yield Finding(
            "error", "SESSION_COOKIE_HTTPONLY", "off", "Scripts can read the token: set it to True."
        )
    samesite = interface.get_cookie_samesite(app)
    if samesite not in ("Lax", "Strict"):
        yield Finding(
            "warning",
            "SESSION_COOKIE_SAMESITE",
            str(samesite),
            'Other sites can send requests with the cookie: "Lax" prevents most.',
        )


def _expires(store: Store, record: Record) -> bool:
    store.create(record)
    return store.load(record.key) is None


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
