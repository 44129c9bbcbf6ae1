"""Flask-SocketIO: disconnects a session's sockets when it ends, and sends to all of a user's."""

from __future__ import annotations

import json
from typing import Any

from flask import current_app, request

try:
    from flask_socketio import SocketIO
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.socketio needs the package {error.name}: install the extra, "
        "flask-gsession[socketio]"
    ) from None

from ..extension import Session
from ..live.hints import Watch
from ..live.live import changes_between
from ..live.states import State
from ..live.streams import as_json, last_of, newer
from ..sharing.verify import find_of_request, interface_of
from ..users.rosters import checked_user_id

_CHANGED, _MESSAGE = "gsession:changed", "gsession:message"


class SessionSockets:
    """Binds sockets of Flask-SocketIO to the sessions of their visitors.

    ::

        sockets = SessionSockets(socketio, ext)

        @socketio.on("connect")
        def connect():
            return sockets.join()  # refuses a visitor without a session

    When a session ends, its sockets are disconnected. After a change, they get the event
    ``gsession:changed`` with ``{"keys": [...], "user_keys": [...], "devices": False}``, and for
    each message of ``ext.live.publish`` the event ``gsession:message`` with its ``id``, ``name``
    and ``data``. All sockets of a user are in the room ``user_room(user_id)``.
    """

    def __init__(self, socketio: SocketIO, ext: Session) -> None:
        self._socketio = socketio
        self._ext = ext

    def join(self) -> bool:
        """Bind the socket to the session of its handshake. Returns False if there is no session.

        For the handler of ``connect``. The handshake has the cookie, or the header
        ``SESSION_TOKEN_HEADER``. A socket doesn't count as use of the session. One to four round
        trips. Raises ``StoreUnavailable``.
        """
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        interface = interface_of(self._ext, app)
        here: Any = request
        loaded = find_of_request(interface, app, here)
        if loaded is None:
            return False
        # Flask-SocketIO adds these.
        socket = _Socket(self._socketio.server, here.sid, here.namespace)
        watch = self._ext.live.subscribe(loaded.record.key, None, socket.forward, socket.is_gone)
        if watch.state.session is None:  # it ended a moment ago
            watch.close()
            return False
        return True


def user_room(user_id: str | int) -> str:
    """The room of a user: ``socketio.emit("order", data, to=user_room("ada"))``."""
    return f"gsession user {checked_user_id(user_id)}"


class _Socket:
    """Forwards the events of its session to one socket."""

    def __init__(self, server: Any, sid: str, namespace: str) -> None:
        self._server = server
        self._of = {"namespace": namespace}
        self._sid = sid
        self._last: int | None = None
        self._ended = False

    def is_gone(self) -> bool:
        """Whether the socket was disconnected."""
        if self._ended:
            # Disconnect again: while the handler of "connect" runs, that has no effect.
            self._server.disconnect(self._sid, **self._of)
        return self._server.manager.eio_sid_from_sid(self._sid, self._of["namespace"]) is None

    def forward(self, watch: Watch, before: State, after: State) -> None:
        if self.is_gone():
            watch.close()
            return
        was, user = before.user, after.user
        if None in (was, user) or was.user_id != user.user_id:  # type: ignore[union-attr]
            if was is not None:
                self._server.leave_room(self._sid, user_room(was.user_id), **self._of)
            if user is not None:
                self._server.enter_room(self._sid, user_room(user.user_id), **self._of)
            self._last = None
        messages = () if user is None else user.messages
        if self._last is None:
            self._last = last_of(messages)
        for message in newer(messages, self._last):
            self._last = message.id
            self._emit(_MESSAGE, json.loads(as_json(message)))
        if before.session is None:  # the first state
            return
        if after.session is None:
            self._ended = True
            if self.is_gone():
                watch.close()
            return
        for change in changes_between(watch, before, after):
            keys, user_keys = sorted(change.keys), sorted(change.user_keys)
            self._emit(_CHANGED, {"keys": keys, "user_keys": user_keys, "devices": change.devices})

    def _emit(self, event: str, data: object) -> None:
        self._server.emit(event, data, to=self._sid, **self._of)
