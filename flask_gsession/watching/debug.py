"""The debug dump: the session that a request found, its changes, and the reasons.

The logger ``flask_gsession.debug`` writes one message before and one after each request. The log
record's attribute ``gsession`` holds the same facts for programs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields
from datetime import timedelta
from typing import Any

from flask import Flask, Request, Response, current_app, has_request_context, request
from flask.logging import default_handler, has_level_handler

from ..errors import UnreadableRecord
from ..events import Event, SessionCreated, SessionDestroyed, SessionRotated, WriteDropped, logger
from ..request.debugging import start_trace
from ..request.ending import leads_nowhere
from ..request.lifecycle import Lifecycle
from ..request.session import SessionData, lifecycle_of
from ..request.state import Presented
from ..values.marks import split
from ..values.references import refers
from .redaction import HIDDEN, shown_name, shown_value
from .tracing import Trace

log = logging.getLogger("flask_gsession.debug")

#: The key of the latest dumps in ``app.extensions``; the newest is last.
RECENT = "gsession-debug"
_KEEP_RECENT = 20
_TRACED = "_gsession_traced"  # an attribute of the request
_MAX_KEYS = 30

Facts = dict[str, Any]


def _never_raises(function: Callable[..., None]) -> Callable[..., None]:
    """Log the errors of ``function`` instead of failing the request."""

    def call(*arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            logger.exception("A debug dump failed")

    return call


def prepare(
    app: Flask, cookie: Callable[[], str], present: Callable[[Flask, Request], Presented]
) -> None:
    """Dump the sessions with this cookie in all requests of ``app``.

    ``present`` reads the token of a request.
    """

    def before() -> None:
        app: Any = current_app
        if not app.secret_key:
            return
        presented = present(app._get_current_object(), request)
        facts = {
            "request": _name_of_request(),
            "cookie_name": cookie(),
            "found": _describe_token(presented),
        }
        log_dump(logging.DEBUG, "Session before {request}: {found}".format(**facts), facts)

    app.before_request_funcs.setdefault(None, []).insert(0, _never_raises(before))
    if RECENT not in app.extensions:
        app.extensions[RECENT] = deque(maxlen=_KEEP_RECENT)
        app.teardown_request(_finish)


def begin(session: SessionData, request: Request) -> None:
    """Trace a session from the start of its request."""
    start_trace(lifecycle_of(session), Trace())
    vars(request).setdefault(_TRACED, []).append(session)


@_never_raises
def report(session: SessionData, response: Response | None, error: object = None) -> None:
    """Dump the session at the end of a request, once."""
    trace = lifecycle_of(session).trace
    if trace is None or trace.reported:
        return
    trace.reported = session.accessed
    facts = facts_of(session, response, error)
    text = f"Session after {as_text(facts)}"
    if trace.one_session:
        log_dump(logging.INFO, text, facts)
        return
    if response is not None:
        response.headers.add("Server-Timing", _server_timing(trace))
    current_app.extensions[RECENT].append(facts)
    log_dump(logging.DEBUG, text, facts)


def traced(request: Request) -> list[SessionData]:
    """The sessions that are traced from the start of this request."""
    sessions: list[SessionData] = vars(request).get(_TRACED, [])
    return sessions


@_never_raises
def _finish(error: BaseException | None) -> None:
    """Report sessions that no save has reported, because they were unused or the request failed."""
    for session in vars(request).pop(_TRACED, ()):
        report(session, None, error)


def log_dump(level: int, text: str, facts: Facts) -> None:
    """Write a dump to the log, whose level and handler are set up if needed, as Flask does."""
    if not log.level:
        log.setLevel(logging.DEBUG)
    if not has_level_handler(log):
        log.addHandler(default_handler)
    log.log(level, "%s", text, extra={"gsession": facts})


# -- the facts


def facts_of(
    session: SessionData, response: Response | None, error: object = None, *, saved: bool = True
) -> Facts:
    """The facts about a session now, without secrets. Times are in seconds, sizes in bytes.

    ``saved``: whether the request has ended. Until then, its changes are pending.
    """
    life = lifecycle_of(session)
    trace, repository, record = life.trace, life.repository, life.seen.record
    assert trace is not None
    facts: Facts = {
        "request": _name_of_request(),
        "status": response.status_code if response is not None else None,
        "error": type(error).__name__ if error is not None else None,
        "cookie_name": repository.live.cookie_name(),
        "state": _state(life, trace) if session.accessed else "not looked at",
    }
    if not session.accessed:
        return facts
    if record is not None:
        now = repository.now()
        facts["handle"] = record.key
        facts["bytes"] = len(record.payload)
        facts["idle_left"] = (record.idle_expires_at - now) / 1000
        facts["absolute_left"] = (record.absolute_expires_at - now) / 1000
    else:
        for event in trace.events:
            if isinstance(event, SessionDestroyed):
                facts["handle"] = event.handle
    facts["read"] = [
        _about(life, key, trace.read[key], with_value=key not in trace.written)
        for key in _some(trace.read)
    ]
    facts["absent"] = [shown_name(key) for key in _some(trace.absent)]
    facts["written"] = [
        _about(life, key, written.after, written.before)
        for key, written in ((key, trace.written[key]) for key in _some(trace.written))
    ]
    facts["deleted"] = [shown_name(key) for key in _some(trace.deleted)]
    facts["not_stored" if saved else "pending"] = [
        shown_name(key) for key in _some(_not_stored(life, trace))
    ]
    facts["calls"] = [
        {
            "operation": call.operation,
            "ms": round(call.seconds * 1000, 3),
            "round_trips": call.trips,
            "result": call.result,
        }
        for call in trace.calls
    ]
    facts["ms"] = round(sum(call.seconds for call in trace.calls) * 1000, 3)
    facts["round_trips"] = sum(call.trips or 0 for call in trace.calls)
    facts["events"] = [_of_event(event) for event in trace.events]
    if life.near is not None and life.near.hit:
        facts["near"] = "used for the first read"
    if trace.refusal is not None:
        facts["refused"] = trace.refusal._asdict()
    if trace.failure is not None:
        facts["failure"] = trace.failure
    if not saved or life.presented().handle is not None:
        return facts
    by_header = life.presented().by_header
    facts["header" if by_header else "cookie"] = _token(life, trace, error)
    if response is not None:
        facts["cache"] = {
            name: response.headers[name]
            for name in ("Vary", "Cache-Control")
            if name in response.headers
        }
    return facts


def _name_of_request() -> str:
    """The method and the URL rule, because the path may hold a secret."""
    if not has_request_context():
        return "outside a request"
    rule = request.url_rule
    return f"{ascii(request.method)[1:-1][:20]} {rule.rule if rule is not None else '(no route)'}"


def _describe_token(presented: Presented) -> str:
    """A description of the request's token."""
    checked = presented.checked
    where = "header" if presented.by_header else "cookie"
    if checked is None:
        return "no token"
    if checked.token is None:
        return f"a {where} that was refused: {checked.reason}"
    signed = ", signed with a fallback key" if checked.outdated else ""
    return f"a {where} for {checked.key}{signed}"


def _state(life: Lifecycle, trace: Trace) -> str:
    """The state of the session after the request."""
    happened = {type(event) for event in trace.events}
    if life.outage is not None and life.outage.loading:
        return "could not be loaded"
    if life.ended:
        return "ended by another request"
    record, checked = life.seen.record, life.presented().checked
    if record is None:
        if SessionDestroyed in happened:
            return "ended"
        return "no session" if life.opened else "not loaded"
    if SessionCreated in happened:
        return "new"
    if SessionRotated in happened:
        return "loaded, and rotated"
    if checked is not None and checked.token is not None and checked.key != record.key:
        return "loaded, rotated by another request"
    return "loaded"


def _about(
    life: Lifecycle,
    key: str,
    size: int,
    before: int | None = None,
    *,
    with_value: bool = True,
) -> Facts:
    """The facts about a key and its value that a log may show."""
    trace, values = life.trace, life.values
    assert trace is not None
    about: Facts = {"key": shown_name(key), "type": trace.types.get(key), "bytes": size}
    if before is not None:
        about["bytes_before"] = before
    raw = values.stored.get(key)
    large = refers(raw)  # don't load it for a dump
    if large:
        about["large"] = True
    try:
        if raw is not None and values.now is not None:
            end = split(raw)[0].expires_at
            if end:
                about["expires_in"] = (end - life.repository.now()) / 1000
        shown = with_value and key in life.repository.settings.debug_show
        if raw is not None and shown and not large:
            value = shown_value(
                key,
                life.repository.codec.decode(split(raw)[1]),
                life.repository.settings.debug_show,
            )
            if value != HIDDEN:
                about["value"] = value
    except UnreadableRecord:
        about["value"] = "(unreadable)"
    return about


def _not_stored(life: Lifecycle, trace: Trace) -> list[str]:
    """The keys with changes that are not stored, or not stored yet."""
    pending = []
    if life.opened:
        try:
            pending = list(life.pending())
        except Exception:  # a value that can't be stored
            pending = list(trace.touched)
    dropped = any(isinstance(event, WriteDropped) for event in trace.events)
    if dropped or trace.failure is not None:
        pending += trace.touched
    return [
        key
        for key in dict.fromkeys(pending)
        if key not in trace.written and key not in trace.deleted
    ]


def _some(keys: Iterable[str]) -> list[str]:
    return list(keys)[:_MAX_KEYS]


def _of_event(event: Event) -> str:
    details = {field.name: getattr(event, field.name) for field in fields(event)}
    details.pop("handle", None)
    known = (f"{name}={value!r}" for name, value in details.items())
    return f"{type(event).__name__}({', '.join(known)})"


def _token(life: Lifecycle, trace: Trace, error: object) -> str:
    """Whether the response carries a token, and why."""
    if error is not None:
        return "not sent: an error ended the request before the session was saved"
    happened = {type(event) for event in trace.events}
    record, checked = life.seen.record, life.presented().checked
    if life.cookie == "set":
        if SessionCreated in happened:
            return "set: the session is new"
        if SessionRotated in happened:
            return "set: the session has a new token"
        if checked is not None and checked.outdated:
            return "set: signed with the current SECRET_KEY"
        return "set: its expiry moved"
    if life.cookie == "delete":
        return "deleted: the session ended"
    if checked is None:
        return "none: nothing is stored"
    if life.ended:
        return "unchanged: the request that ended the session deletes it"
    if record is None:
        if life.presented().by_header and leads_nowhere(life):
            return "emptied: there is no such session"
        return "unchanged: there is no such session, and no new one was stored"
    if life.seen.token is None:
        return "unchanged: the request that rotated the session sends the new token"
    return "unchanged: the client has it"


def _server_timing(trace: Trace) -> str:
    milliseconds = sum(call.seconds for call in trace.calls) * 1000
    calls = "1 store call" if len(trace.calls) == 1 else f"{len(trace.calls)} store calls"
    return f'gsession;dur={milliseconds:.2f};desc="{calls}"'


# -- as text


def as_text(facts: Facts) -> str:
    """The facts as text: the request in the first line, then one fact per line."""
    request, state = facts["request"], facts["state"]
    result = facts["error"] or facts["status"]
    lines = [f"{request}{f' -> {result}' if result is not None else ''}: {state}"]

    def line(name: str, text: str) -> None:
        if text:
            lines.append(f"  {name:<10} {text}")

    if "handle" in facts:
        line("handle", facts["handle"])
    if "bytes" in facts:
        line(
            "lifetime",
            f"idle timeout in {_span(facts['idle_left'])}, "
            f"absolute timeout in {_span(facts['absolute_left'])}",
        )
        line("size", _bytes(facts["bytes"]))
    if "refused" in facts:
        refused = facts["refused"]
        line("refused", ": ".join(filter(None, [refused["reason"], refused["because"]])))
    for name in ("read", "written"):
        for about in facts.get(name, ()):
            line(name, _as_words(about))
    for name in ("absent", "deleted", "pending", "not_stored"):
        line(name.replace("_", " "), ", ".join(facts.get(name, ())))
    if facts.get("calls"):
        line("store", f"{facts['ms']:.2f} ms: {', '.join(map(_as_call, facts['calls']))}")
    line("near cache", facts.get("near", ""))
    line("failure", facts.get("failure", ""))
    for event in facts.get("events", ()):
        line("event", event)
    for name in ("cookie", "header"):
        line(name, facts.get(name, ""))
    line("cache", ", ".join(f"{name}: {value}" for name, value in facts.get("cache", {}).items()))
    return "\n".join(lines)


def _as_words(about: Facts) -> str:
    words = [about["type"] or "not decoded"]
    if "bytes_before" in about:
        words.append(f"{about['bytes_before']} to {_bytes(about['bytes'])}")
    else:
        words.append(_bytes(about["bytes"]))
    if "large" in about:
        words.append("large value")
    if "expires_in" in about:
        words.append(f"expires in {_span(about['expires_in'])}")
    if "value" in about:
        words.append(about["value"])
    return f"{about['key']}: {', '.join(words)}"


def _as_call(call: Facts) -> str:
    words = [f"{call['operation']} {call['ms']:.2f} ms"]
    trips = call["round_trips"]
    if trips is not None:
        words.append(f"in {trips} round trip{'s' if trips != 1 else ''}")
    if call["result"] != "ok":
        words.append(f"({call['result']})")
    return " ".join(words)


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
