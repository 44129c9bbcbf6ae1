"""Live updates for browsers: a stream of server-sent events, a page to poll, and the script."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from flask import Blueprint, Response, abort, current_app, jsonify, request, send_from_directory

from ..config import Settings
from ..errors import SettingError, StoreUnavailable
from ..extension import NAME, Session
from ..interface import GSessionInterface, session_of_request
from ..live.servers import connection_of, threads
from ..live.states import Digests, State, Versions
from ..live.streams import Limits, Stream, TooManyStreams, as_json, last_of, newer
from ..processes import warn_without_threads
from ..repository.repository import Loaded
from ..repository.user_values import values_key
from ..request.lifecycle import Lifecycle
from ..request.session import SessionData, lifecycle_of
from ..sharing.verify import find_of_request
from ..stores.base import Record

_STATIC = Path(__file__).parent / "static"
_SCRIPT_AGE = 3600  # seconds that browsers keep the script without a request
_RETRY_AFTER = 30  # seconds, after a refusal
_LONGEST = 20  # digits
_UNREAD_BEATS = 2  # heartbeats that a browser may leave unread


def live_blueprint(
    ext: Session | None = None,
    *,
    keys: Iterable[str] = (),
    user_keys: Iterable[str] = (),
    url_prefix: str = "/live",
) -> Blueprint:
    """A blueprint with the pages ``stream``, ``state`` and ``live.js`` under ``url_prefix``.

    ``keys``: the session's keys whose changes pages may see; ``user_keys``: likewise for a user's
    values. Pages get versions, never values. Without keys they get ends, sign-ins, devices and
    messages. ``ext``: by default, the application's first ``Session``.

    Requests don't count as use of the session. ``state`` costs one round trip, and three more for a
    user. Templates get the function ``live_state()``, for the script's attribute ``data-state``.
    """
    shown_keys, shown_user_keys = _names(keys), _names(user_keys)
    blueprint = Blueprint("gsession_live", __name__, url_prefix=url_prefix)
    blueprint.record_once(
        lambda _: warn_without_threads("browsers can't have streams, so they poll")
    )

    def show(digests: Digests, state: State) -> dict[str, Any]:
        session, user = state.session, state.user
        if session is None:
            return {"who": None}
        who = "" if session.user_id is None else digests.of(b"who", session.user_id.encode())
        shown: dict[str, Any] = {"who": who, "keys": _some(session.keys, shown_keys)}
        if user is not None:
            shown |= {"user": _some(user.keys, shown_user_keys), "devices": user.devices}
        return shown

    @blueprint.app_template_global("live_state")
    def live_state() -> str:
        """The state that this page shows, as JSON; "" if the script must request it.

        It is the state at the start of the request, without the keys that the request changed.
        Three round trips if the session has a user.
        """
        own, _ = _owner(ext)
        opened: Any = own.session._get_current_object()  # type: ignore[attr-defined]  # a proxy
        len(opened)  # loads it
        life = lifecycle_of(opened)
        loaded, wishes = life.seen, life.wishes
        if request.method not in ("GET", "HEAD") or life.ended or wishes.cleared or wishes.binding:
            return ""
        found, user_id, hints = State(), None, own.live.hints()
        others: dict[str, Record | None] = {}
        if loaded.record is not None and loaded.body is not None:
            user_id = None if loaded.body.owner is None else loaded.body.owner.user_id
            users = life.of_users.get(user_id)
            if user_id is not None and users is not None and users.opened:
                others[values_key(user_id)] = users.seen.record
            try:
                found = hints.look_from(Loaded(loaded.record, loaded.body), others)
            except StoreUnavailable:
                return ""
        shown = {"keys": {}} | show(hints.digests, found)
        _forget(shown["keys"], shown_keys, life)
        if "user" in shown and user_id in life.of_users:
            _forget(shown["user"], shown_user_keys, life.of_users[user_id])
        messages = () if found.user is None else found.user.messages
        return json.dumps(shown | {"last": last_of(messages)}, separators=(",", ":"))

    @blueprint.get("/stream")
    def stream() -> Response:
        own, interface = _begin(ext)
        settings, hints = interface.repository.settings, own.live.hints()
        most = _most_streams(settings)
        if not most:
            _refuse(501, "This worker can't stream, because it has no spare thread: poll instead")
        loaded = _presented(interface)
        if loaded is None:
            _refuse(401, "There is no session")
        owner, life = loaded.body.owner, settings.live_stream_life
        if loaded.record.key != _presented_key(interface):
            life = settings.rotation_grace  # no longer than the old token is valid
        who = loaded.record.key if owner is None else f"user {owner.user_id}"
        connection = connection_of(request.environ)
        connection.expect_reader(_UNREAD_BEATS * settings.live_heartbeat)
        try:
            body = Stream(
                partial(own.live.subscribe, loaded.record.key, None),
                partial(show, hints.digests),
                Limits(who, most, settings.live_user_streams, connection.is_gone),
                heartbeat=settings.live_heartbeat,
                life=life,
                after=_after(request.headers.get("Last-Event-ID") or request.args.get("after")),
            )
        except TooManyStreams as full:
            if full.of_user:
                _refuse(429, "There are too many streams of this user: poll instead")
            _refuse(503, "This worker has no room for another stream: poll instead")
        response = Response(body, mimetype="text/event-stream", direct_passthrough=True)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would buffer events
        interface.add_vary(response)
        return response

    @blueprint.get("/state")
    def state() -> Response:
        own, interface = _begin(ext)
        settings, hints = interface.repository.settings, own.live.hints()
        loaded = _presented(interface)
        found = State() if loaded is None else hints.look_from(loaded)
        messages = () if found.user is None else found.user.messages
        after = _after(request.args.get("after"))
        last = last_of(messages)
        response = jsonify(
            show(hints.digests, found)
            | {
                "last": last,
                "messages": [
                    json.loads(as_json(message))
                    for message in newer(messages, last if after is None else after)
                ],
                "stream": _most_streams(settings) > 0,
                "every": settings.live_poll,
            }
        )
        response.headers["Cache-Control"] = "private, no-cache"
        interface.add_vary(response)
        response.add_etag()
        response.make_conditional(request)
        return response

    @blueprint.get("/live.js")
    def script() -> Response:
        return send_from_directory(_STATIC, "live.js", max_age=_SCRIPT_AGE)

    return blueprint


def _begin(ext: Session | None) -> tuple[Session, GSessionInterface]:
    """The sessions of this request, which must come from a page of the same origin, or be typed in
    by the user.

    If a hook of the application has read the session, that doesn't count as use either.
    """
    own, interface = _owner(ext)
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is None and origin is not None:
        site = "same-origin" if origin == request.host_url.rstrip("/") else "other"
    if site not in (None, "same-origin", "none"):  # none: the user typed the address
        _refuse(403, "Only pages of the same origin may request this")
    opened = session_of_request()
    life = opened.lifecycle if isinstance(opened, SessionData) else None
    if life is not None:
        life.renews = False
    return own, interface


def _owner(ext: Session | None) -> tuple[Session, GSessionInterface]:
    interfaces: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
    own = next(iter(interfaces), None) if ext is None else ext
    if own not in interfaces:
        raise SettingError("live_blueprint needs a Session: call Session(app)")
    return own, interfaces[own]


def _presented(interface: GSessionInterface) -> Loaded | None:
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
    return find_of_request(interface, app, request)


def _presented_key(interface: GSessionInterface) -> str | None:
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
    checked = interface.tokens.present(app, request).checked
    return None if checked is None or checked.token is None else checked.key


def _most_streams(settings: Settings) -> int:
    """How many streams this process may have; 0 if it can't stream."""
    half = threads(request.environ) // 2
    return half if settings.live_streams is None or not half else settings.live_streams


def _refuse(status: int, error: str) -> NoReturn:
    response = jsonify(error=error)
    response.status_code = status
    response.headers["Cache-Control"] = "no-store"
    if status in (429, 503):
        response.headers["Retry-After"] = str(_RETRY_AFTER)
    abort(response)


def _after(text: str | None) -> int | None:
    """The number of a message, from a request."""
    return int(text) if text and text.isdecimal() and len(text) <= _LONGEST else None


def _names(keys: Iterable[str]) -> tuple[str, ...]:
    names = tuple(keys)
    if isinstance(keys, str) or any(not isinstance(name, str) for name in names):
        raise SettingError("keys and user_keys must be lists of names, such as keys=['cart']")
    return names


def _forget(versions: dict[str, str | None], names: tuple[str, ...], life: Lifecycle) -> None:
    """Drop the keys that the request itself changed, which are stored only after the page."""
    for name in life.pending():
        if name in names:
            versions[name] = None


def _some(versions: Versions, names: tuple[str, ...]) -> dict[str, str]:
    return {name: versions[name] for name in names if name in versions}
